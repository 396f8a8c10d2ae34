"""ARKitScenes: low-resolution pictures and depth with ARKit's poses.

Layout: ``{Training,Validation}/<video>/`` (or ``<video>/<video>_frames/`` of the 3DOD download) with
``{lowres_wide,lowres_depth}/<video>_<time>.png``, ``lowres_wide_intrinsics/<video>_<time>.pincam`` and
``lowres_wide.traj``; beside them ``<video>_3dod_mesh.ply`` and ``<video>_3dod_annotation.json``.

Conventions of the source: a line of the ``.traj`` is time, axis-angle, translation: **world-to-camera** with OpenCV
axes, inverted here. ``.pincam`` is width height fx fy cx cy for pixel centres at integers (the published tools
unproject pixel (i, j) without a half). Depth is along z in millimetres, 0 = unknown. Poses come at other times than
pictures: each picture takes the nearest in time, and is left out when none is nearer than ``max_gap_s``. Pictures stay
as the sensor stored them, whichever way the device was held.

Options: ``max_gap_s`` (seconds between a picture and its pose, depth or intrinsics).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from services.contracts import DepthRef, ImageRef, Instance, Intrinsics, Scene, Split, View
from services.data.images import image_size
from services.data.readers.base import (
    Notes,
    Reader,
    checked_intrinsics,
    inverse_pose,
    oriented_box,
    to_matrix,
    usable_pose,
)
from services.errors import DataError

_PNG = frozenset({".png"})
_CLASSES = (
    *("none", "bathtub", "bed", "cabinet", "chair", "dishwasher", "fireplace", "oven", "refrigerator", "shelf"),
    *("sink", "sofa", "stool", "stove", "table", "toilet", "tv_monitor", "washer"),
)
_T = TypeVar("_T")


class ARKitScenesReader(Reader):
    """Videos of ARKitScenes."""

    options: ClassVar[Mapping[str, Any]] = {"max_gap_s": 0.05}

    def layout(self) -> str:
        """One line on the layout."""
        return "expected {Training,Validation}/<video>/lowres_wide with lowres_wide.traj beside"

    @cached_property
    def scenes(self) -> dict[str, tuple[Path, Split | None]]:
        """Video id -> (folder that holds lowres_wide, split)."""
        found: dict[str, tuple[Path, Split | None]] = {}
        for name, split in (("Training", Split.TRAIN), ("Validation", Split.VAL), ("", None)):
            parent = self.root / name
            for video in sorted(parent.iterdir()) if parent.is_dir() else []:
                for folder in (video, video / f"{video.name}_frames"):
                    if (folder / "lowres_wide").is_dir():
                        found[video.name] = (folder, split)
        return found

    def all_ids(self) -> list[str]:
        """Ids of the videos that have pictures."""
        return sorted(self.scenes)

    def source_splits(self) -> Mapping[str, Split]:
        """Training and Validation, as the folders say."""
        return {video: split for video, (_, split) in self.scenes.items() if split is not None}

    def classes(self) -> tuple[str, ...]:
        """The seventeen annotated classes; 0 is "none"."""
        return _CLASSES

    def read_one(self, scene_id: str, notes: Notes) -> Scene:
        """Pictures with the nearest pose, depth and intrinsics, and the annotated boxes."""
        if scene_id not in self.scenes:
            raise DataError(f"{self.root}: has no scene {scene_id!r}")
        folder = self.scenes[scene_id][0]
        beside = folder.parent if folder.name.endswith("_frames") else folder
        mesh = beside / f"{scene_id}_3dod_mesh.ply"
        return Scene(
            id=scene_id,
            views=tuple(self._views(folder, notes)),
            instances=_instances(beside / f"{scene_id}_3dod_annotation.json", notes),
            mesh_path=str(mesh) if mesh.is_file() else None,
        )

    def _views(self, folder: Path, notes: Notes) -> list[View]:
        gap = float(self.option("max_gap_s"))
        trajectory = _Timeline(read_trajectory(folder / "lowres_wide.traj", notes), gap)
        pincams = notes.listing(folder / "lowres_wide_intrinsics", frozenset({".pincam"}))
        cameras = _Timeline({_time(path): path for path in pincams}, gap)
        depths = _Timeline({_time(path): path for path in notes.listing(folder / "lowres_depth", _PNG)}, gap)
        if not cameras:
            raise DataError(f"{folder / 'lowres_wide_intrinsics'}: holds no .pincam file")
        views = []
        for image in self.every_nth(notes.listing(folder / "lowres_wide", _PNG)):
            time = _time(image)
            pose = trajectory.nearest(time)
            camera_path = cameras.nearest(time)
            depth_path = depths.nearest(time)
            if pose is None or not usable_pose(pose):
                notes.drop(f"without a finite pose within {gap} s", image)
            elif camera_path is None:
                notes.drop(f"without intrinsics within {gap} s", image)
            elif depths and depth_path is None:
                notes.drop(f"without a depth map within {gap} s", image)
            else:
                camera = read_pincam(camera_path, notes)
                views.append(
                    View(
                        image=ImageRef(path=str(image)),
                        K=camera,
                        pose=to_matrix(pose),
                        depth=_depth(depth_path, camera),
                        timestamp=time,
                    )
                )
        return views


def read_trajectory(path: Path, notes: Notes) -> dict[float, np.ndarray]:
    """Time -> camera-to-world pose, from lines of time, axis-angle and translation (world-to-camera)."""
    from scipy.spatial.transform import Rotation

    poses = {}
    for number, line in enumerate(notes.text(path).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            time, *values = (float(word) for word in words)
        except ValueError as error:
            raise DataError(f"{path}: line {number} holds something that is no number ({error})") from error
        if len(values) != 6:
            raise DataError(
                f"{path}: line {number} has {len(words)} numbers, 7 are needed (time, rotation, translation)"
            )
        if not np.isfinite(values).all():
            poses[time] = np.full((4, 4), np.nan)
            continue
        world_to_camera = np.eye(4)
        world_to_camera[:3, :3] = Rotation.from_rotvec(values[:3]).as_matrix()
        world_to_camera[:3, 3] = values[3:]
        poses[time] = inverse_pose(world_to_camera)
    if not poses:
        raise DataError(f"{path}: holds no pose")
    return poses


def read_pincam(path: Path, notes: Notes) -> Intrinsics:
    """Camera from a line of width, height, fx, fy, cx, cy."""
    width, height, fx, fy, cx, cy = notes.numbers(path, (6,)).tolist()
    camera = Intrinsics(fx=fx, fy=fy, cx=cx, cy=cy, width=int(width), height=int(height))
    return checked_intrinsics(camera, path)


def _depth(path: Path | None, camera: Intrinsics) -> DepthRef | None:
    if path is None:
        return None
    size = image_size(ImageRef(path=str(path)))
    return DepthRef(path=str(path), metres_per_unit=0.001, K=camera.resized(*size))


def _time(path: Path) -> float:
    try:
        return float(path.stem.rpartition("_")[2])
    except ValueError as error:
        raise DataError(f"{path}: the name does not end in _<time in seconds>") from error


class _Timeline(Generic[_T]):
    """Things with a time; the nearest one within a gap."""

    def __init__(self, by_time: Mapping[float, _T], gap: float) -> None:
        self._times = sorted(by_time)
        self._by_time = by_time
        self._gap = gap

    def __len__(self) -> int:
        return len(self._times)

    def nearest(self, time: float) -> _T | None:
        """What is nearest to ``time``; None when it is farther than the gap."""
        place = bisect.bisect(self._times, time)
        around = self._times[max(0, place - 1) : place + 1]
        best = min(around, key=lambda other: abs(other - time), default=None)
        return None if best is None or abs(best - time) > self._gap else self._by_time[best]


def _instances(path: Path, notes: Notes) -> tuple[Instance, ...]:
    if not path.is_file():
        return ()
    instances = []
    for number, item in enumerate(notes.json(path).get("data", []), start=1):
        try:
            label, box = str(item["label"]), oriented_box(item["segments"]["obbAligned"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: object {number} is incomplete or wrong ({error!r})") from error
        class_id = _CLASSES.index(label) if label in _CLASSES else 0
        instances.append(Instance(id=number, label=label, class_id=class_id, box=box))
    return tuple(instances)
