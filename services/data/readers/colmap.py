"""COLMAP reconstructions, read through pycolmap.

Layout: the root (or each of its folders) holds a model (``cameras``, ``images`` and ``points3D`` as .bin or .txt) in
``sparse/0``, ``sparse``, ``colmap/sparse/0``, ``colmap`` or itself, and the pictures in ``images``.

Conventions of the source: world-to-camera with OpenCV axes, inverted here. The first pixel's centre is at 0.5, so half
a pixel is taken from cx and cy. The scale is whatever the reconstruction has: ``metres_per_unit`` turns it into metres.

Options: ``images`` (folder of the pictures below the scene), ``metres_per_unit``, ``undistort`` (write | refuse).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from services.contracts import ImageRef, Intrinsics, Scene, View
from services.data.images import image_size
from services.data.readers.base import Notes, frame_order, inverse_pose, to_matrix, usable_pose
from services.data.readers.lenses import Lens, LensReader, Undistorter
from services.errors import DataError

_PLACES = ("sparse/0", "sparse", "colmap/sparse/0", "colmap", ".")

# Camera model -> (lens model, which parameters are fx, fy, cx, cy). What follows them are the coefficients, in the
# order that the lens has them in; those that a model leaves out at the end are zero.
_MODELS: dict[str, tuple[str, tuple[int, int, int, int]]] = {
    "SIMPLE_PINHOLE": ("brown", (0, 0, 1, 2)),
    "PINHOLE": ("brown", (0, 1, 2, 3)),
    "SIMPLE_RADIAL": ("brown", (0, 0, 1, 2)),
    "RADIAL": ("brown", (0, 0, 1, 2)),
    "OPENCV": ("brown", (0, 1, 2, 3)),
    "FULL_OPENCV": ("brown", (0, 1, 2, 3)),
    "SIMPLE_RADIAL_FISHEYE": ("fisheye", (0, 0, 1, 2)),
    "RADIAL_FISHEYE": ("fisheye", (0, 0, 1, 2)),
    "OPENCV_FISHEYE": ("fisheye", (0, 1, 2, 3)),
}


class ColmapReader(LensReader):
    """Scenes reconstructed by COLMAP."""

    options: ClassVar[Mapping[str, Any]] = {"images": "images", "metres_per_unit": 1.0, "undistort": "write"}

    def layout(self) -> str:
        """One line on the layout."""
        return "expected sparse/0/{cameras,images,points3D}.bin or .txt, in it or in its folders"

    @cached_property
    def scenes(self) -> dict[str, tuple[Path, Path]]:
        """Scene id -> (its folder, folder of its model)."""
        candidates = [self.root, *(sorted(self.root.iterdir()) if self.root.is_dir() else [])]
        found = {folder.name: (folder, model) for folder in candidates if (model := find_model(folder)) is not None}
        return {self.root.name: found[self.root.name]} if self.root.name in found else found

    def all_ids(self) -> list[str]:
        """Ids of the folders with a model."""
        return sorted(self.scenes)

    def read_one(self, scene_id: str, notes: Notes) -> Scene:
        """The registered pictures in the order of their names."""
        if scene_id not in self.scenes:
            raise DataError(f"{self.root}: has no scene {scene_id!r}")
        folder, model = self.scenes[scene_id]
        views = []
        for name, pose, lens in self.every_nth(read_model(model, notes)):
            image = folder / self.option("images") / name
            if not usable_pose(pose):
                notes.drop("with a pose that is not finite", image)
                continue
            pose[:3, 3] *= float(self.option("metres_per_unit"))
            views.append(plain_view(image, pose, lens, scene_id, self.undistorter, notes))
        return Scene(id=scene_id, views=tuple(views))


def plain_view(
    image: Path, pose: np.ndarray, lens: Lens, scene_id: str, undistorter: Undistorter, notes: Notes
) -> View:
    """A view without distortion. DataError when the picture is missing or has another size than its camera."""
    if not image.is_file():
        raise DataError(f"{image}: there is no such file (it is registered in the model)")
    size = image_size(ImageRef(path=str(image)))
    if size != (lens.camera.width, lens.camera.height):
        raise DataError(
            f"{image}: the picture is {size[0]}x{size[1]} but its intrinsics are for "
            f"{lens.camera.width}x{lens.camera.height}"
        )
    reference, _, camera = undistorter.apply(image, None, lens, scene_id, notes)
    return View(image=reference, K=camera, pose=to_matrix(pose))


def find_model(folder: Path) -> Path | None:
    """The folder below ``folder`` that holds a model; None without one."""
    for place in _PLACES:
        if any((folder / place / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return folder / place
    return None


def read_model(model: Path, notes: Notes) -> list[tuple[str, np.ndarray, Lens]]:
    """(name, camera-to-world pose, lens) of the registered pictures of a model, sorted by name."""
    import pycolmap

    notes.files += sorted(p for p in model.iterdir() if p.stem in ("cameras", "images", "points3D", "rigs", "frames"))
    try:
        reconstruction = pycolmap.Reconstruction(model)
    except (RuntimeError, ValueError, OSError, IndexError) as error:
        raise DataError(f"{model}: not a readable COLMAP model ({str(error).splitlines()[0]})") from error
    lenses = {number: _lens(camera, model) for number, camera in reconstruction.cameras.items()}
    found = []
    for image in reconstruction.images.values():
        if image.has_pose:
            world_to_camera = np.asarray(image.cam_from_world().matrix())
            found.append((image.name, inverse_pose(world_to_camera), lenses[image.camera_id]))
    return sorted(found, key=lambda entry: frame_order(entry[0]))


def _lens(camera: Any, model: Path) -> Lens:
    name = camera.model_name
    if name not in _MODELS:
        raise DataError(f"{model}: camera model {name} cannot be turned into a pinhole; known are {', '.join(_MODELS)}")
    kind, places = _MODELS[name]
    params = [float(value) for value in camera.params]
    fx, fy, cx, cy = (params[place] for place in places)
    pinhole = Intrinsics(fx=fx, fy=fy, cx=cx - 0.5, cy=cy - 0.5, width=int(camera.width), height=int(camera.height))
    coefficients = params[places[3] + 1 :]
    padding = [0.0] * (4 - len(coefficients))
    return Lens(camera=pinhole, model=kind, coefficients=(*coefficients, *padding))
