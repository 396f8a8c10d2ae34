"""``transforms.json`` of nerfstudio, instant-ngp and the NeRF synthetic scenes.

Layout: the root holds ``transforms.json`` (one scene, named like the folder), or folders that do.

Conventions of the source: ``transform_matrix`` is camera-to-world with OpenGL axes (y up, z backward): the camera's y
and z axes are negated. Pixel centres lie at halves (the first pixel's centre is at 0.5): half a pixel is taken from
cx and cy. ``applied_transform`` and ``applied_scale`` tell what was already done to the poses and are not applied
again. Frames may be in any order and are sorted by name; intrinsics of a frame win over those of the file;
``camera_angle_x`` alone means a centred pinhole. Depth (``depth_file_path``) is along z, in ``depth_unit`` metres, and
has the field of view of its picture whatever its size.

Options: ``file`` (name of the JSON file), ``depth_unit`` (metres of one stored unit; ``depth_unit_scale_factor`` of
the file wins), ``metres_per_unit`` (of the poses, which have no scale of their own), ``undistort`` (write | refuse).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from services.contracts import DepthRef, ImageRef, Intrinsics, Scene, View
from services.data.images import image_size
from services.data.readers.base import Notes, checked_pose, frame_order, from_opengl, to_matrix, usable_pose
from services.data.readers.lenses import Lens, LensReader
from services.errors import DataError

_BROWN = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")
_FISHEYE = ("k1", "k2", "k3", "k4")
_PINHOLES = frozenset({"PINHOLE", "SIMPLE_PINHOLE"})
_BROWNS = frozenset({"OPENCV", "FULL_OPENCV", "SIMPLE_RADIAL", "RADIAL", ""})


class NerfstudioReader(LensReader):
    """Scenes described by a ``transforms.json``."""

    options: ClassVar[Mapping[str, Any]] = {
        "file": "transforms.json",
        "depth_unit": 0.001,
        "metres_per_unit": 1.0,
        "undistort": "write",
    }

    def layout(self) -> str:
        """One line on the layout."""
        return f"expected {self.option('file')} in it or in its folders"

    @cached_property
    def scenes(self) -> dict[str, Path]:
        """Scene id -> its folder."""
        name = self.option("file")
        if (self.root / name).is_file():
            return {self.root.name: self.root}
        folders = sorted(self.root.iterdir()) if self.root.is_dir() else []
        return {folder.name: folder for folder in folders if (folder / name).is_file()}

    def all_ids(self) -> list[str]:
        """Ids of the folders with a file of poses."""
        return sorted(self.scenes)

    def read_one(self, scene_id: str, notes: Notes) -> Scene:
        """All frames that have a usable pose, in the order of their names."""
        if scene_id not in self.scenes:
            raise DataError(f"{self.root}: has no scene {scene_id!r}")
        folder = self.scenes[scene_id]
        path = folder / self.option("file")
        meta = notes.json(path)
        frames = read_frames(meta, path)
        views = []
        for frame in self.every_nth(frames):
            pose = frame_pose(frame, path)
            if not usable_pose(pose):
                notes.drop("with a pose that is not finite", f"{path} ({frame['file_path']})")
                continue
            pose = from_opengl(checked_pose(pose, path))
            pose[:3, 3] *= float(self.option("metres_per_unit"))
            image = _image_path(folder, frame["file_path"])
            size = image_size(ImageRef(path=str(image)))
            lens = frame_lens({**meta, **frame}, size, path)
            depth = self._depth(folder, meta, frame, lens.camera)
            reference, depth, camera = self.undistorter.apply(image, depth, lens, scene_id, notes)
            views.append(View(image=reference, K=camera, pose=to_matrix(pose), depth=depth))
        return Scene(id=scene_id, views=tuple(views))

    def _depth(self, folder: Path, meta: Any, frame: Any, camera: Intrinsics) -> DepthRef | None:
        name = frame.get("depth_file_path")
        if not name:
            return None
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: there is no such file (depth of {frame['file_path']})")
        if path.suffix == ".npy":
            height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
        else:
            width, height = image_size(ImageRef(path=str(path)))
        unit = float(meta.get("depth_unit_scale_factor", self.option("depth_unit")))
        return DepthRef(path=str(path), metres_per_unit=unit, K=camera.resized(width, height))


def read_frames(meta: Any, path: Path, keys: tuple[str, ...] = ("frames",)) -> list[dict[str, Any]]:
    """The frames of a ``transforms.json`` under ``keys``, sorted by name. DataError when they are not a list."""
    frames: list[dict[str, Any]] = []
    for key in keys:
        part = meta.get(key, []) if isinstance(meta, dict) else None
        if not isinstance(part, list) or not all(isinstance(f, dict) and "file_path" in f for f in part):
            raise DataError(f"{path}: {key!r} must be a list of frames with 'file_path' and 'transform_matrix'")
        frames += part
    if not frames:
        raise DataError(f"{path}: has no frames")
    return sorted(frames, key=lambda frame: frame_order(frame["file_path"]))


def frame_pose(frame: Mapping[str, Any], path: Path) -> np.ndarray:
    """The 4x4 ``transform_matrix`` of a frame as it is written (a 3x4 one gets its last row)."""
    try:
        pose = np.asarray(frame["transform_matrix"], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: frame {frame['file_path']} has no readable transform_matrix ({error})") from error
    if pose.shape == (3, 4):
        pose = np.vstack([pose, [0.0, 0.0, 0.0, 1.0]])
    if pose.shape != (4, 4):
        raise DataError(f"{path}: transform_matrix of {frame['file_path']} has the shape {pose.shape}, 4x4 is needed")
    return pose


def frame_lens(facts: Mapping[str, Any], size: tuple[int, int], path: Path) -> Lens:
    """Camera of a frame whose stored picture has ``size`` (width, height); half a pixel is taken from its centre.

    DataError when the intrinsics are missing, are for another size, or the camera model is none that can be undone.
    """
    width, height = size
    stated = (int(facts.get("w", width)), int(facts.get("h", height)))
    if stated != size:
        raise DataError(
            f"{path}: the intrinsics are for {stated[0]}x{stated[1]} but {facts['file_path']} is {width}x{height}"
        )
    camera = Intrinsics(**_focal(facts, width, path), **_center(facts, size), width=width, height=height)
    model = str(facts.get("camera_model", "")).upper()
    if model in _PINHOLES:
        return Lens(camera=camera)
    if model == "OPENCV_FISHEYE" or facts.get("is_fisheye"):
        return Lens(camera=camera, model="fisheye", coefficients=_coefficients(facts, _FISHEYE))
    if model in _BROWNS:
        return Lens(camera=camera, coefficients=_coefficients(facts, _BROWN))
    known = ", ".join(sorted(_PINHOLES | _BROWNS - {""} | {"OPENCV_FISHEYE"}))
    raise DataError(f"{path}: camera_model={model!r} cannot be turned into a pinhole; known are {known}")


def _focal(facts: Mapping[str, Any], width: int, path: Path) -> dict[str, float]:
    if "fl_x" in facts:
        return {"fx": float(facts["fl_x"]), "fy": float(facts.get("fl_y", facts["fl_x"]))}
    if "camera_angle_x" in facts:
        focal = 0.5 * width / float(np.tan(0.5 * float(facts["camera_angle_x"])))
        return {"fx": focal, "fy": focal}
    raise DataError(f"{path}: has no intrinsics (fl_x, fl_y, cx, cy or camera_angle_x) for {facts['file_path']}")


def _center(facts: Mapping[str, Any], size: tuple[int, int]) -> dict[str, float]:
    cx, cy = float(facts.get("cx", size[0] / 2)), float(facts.get("cy", size[1] / 2))
    return {"cx": cx - 0.5, "cy": cy - 0.5}


def _coefficients(facts: Mapping[str, Any], names: tuple[str, ...]) -> tuple[float, ...]:
    return tuple(float(facts.get(name, 0.0)) for name in names)


def _image_path(folder: Path, name: str) -> Path:
    path = folder / name
    # The NeRF synthetic scenes leave the suffix out.
    if not path.suffix and not path.is_file():
        path = path.with_suffix(".png")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    return path
