"""Lenses that bend lines: pictures are undistorted once, at ingest, or the source is refused by name.

Behind the readers every camera is a pinhole. The undistorted picture shows only what the lens saw (no black border);
its camera keeps the lens's optical centre and direction, so poses and depth along z stay what they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from services.contracts import DepthRef, ImageRef, Intrinsics
from services.data.images import load_image, load_stored
from services.data.readers.base import Notes, Reader, checked_intrinsics
from services.errors import ConfigError, DataError

_JPEG = frozenset({".jpg", ".jpeg"})
# Neighbours whose depths differ by less than this share of the depth belong to one surface.
_SURFACE = 0.1
# Steps by which the view is narrowed where a border would show, and how many of them a sane lens may need.
_ZOOM, _ZOOMS = 1.005, 200

Remap = Callable[[Path, "Lens", np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Lens:
    """A camera with distortion, pixel centres at integers.

    ``model`` is "brown" (coefficients k1 k2 p1 p2 [k3 k4 k5 k6], OpenCV's order) or "fisheye" (k1 k2 k3 k4 of the
    equidistant model).
    """

    camera: Intrinsics
    model: str = "brown"
    coefficients: tuple[float, ...] = ()

    @property
    def distorts(self) -> bool:
        """Whether it is anything but a pinhole. A fisheye lens is none even with all coefficients zero."""
        return self.model == "fisheye" or any(self.coefficients)

    def pinhole(self) -> Intrinsics:
        """The camera of the undistorted picture: same size, every pixel of it seen by the lens."""
        import cv2

        camera, size = self.camera.matrix(), (self.camera.width, self.camera.height)
        if self.model == "fisheye":
            new = cv2.fisheye.estimateNewCameraMatrixForUndistortRectify(
                camera, np.array(self.coefficients), size, np.eye(3), balance=0.0
            )
        else:
            new, _ = cv2.getOptimalNewCameraMatrix(camera, np.array(self.coefficients), size, 0.0)
        pinhole = dataclasses.replace(
            self.camera, fx=float(new[0, 0]), fy=float(new[1, 1]), cx=float(new[0, 2]), cy=float(new[1, 2])
        )
        # OpenCV samples the border coarsely: narrow the view until every pixel lies inside of the stored picture.
        for _ in range(_ZOOMS):
            if self._sees(pinhole):
                return pinhole
            pinhole = dataclasses.replace(pinhole, fx=pinhole.fx * _ZOOM, fy=pinhole.fy * _ZOOM)
        raise DataError(f"a {self.model} lens with the coefficients {list(self.coefficients)} cannot be undistorted")

    def _sees(self, pinhole: Intrinsics) -> bool:
        u, v = self.maps(pinhole)
        right, bottom = self.camera.width - 1, self.camera.height - 1
        return bool(u.min() >= 0 and v.min() >= 0 and u.max() <= right and v.max() <= bottom)

    def maps(self, pinhole: Intrinsics) -> tuple[np.ndarray, np.ndarray]:
        """For every pixel of the undistorted picture the place in the stored one, as two float32 (H, W) maps."""
        import cv2

        size = (pinhole.width, pinhole.height)
        camera, coefficients = self.camera.matrix(), np.array(self.coefficients)
        rectify = cv2.fisheye.initUndistortRectifyMap if self.model == "fisheye" else cv2.initUndistortRectifyMap
        u, v = rectify(camera, coefficients, np.eye(3), pinhole.matrix(), size, cv2.CV_32FC1)
        return np.asarray(u), np.asarray(v)


class Undistorter:
    """Undistorted copies of a source's pictures below ``folder``, written once.

    Args:
        folder: Where they go; None where the caller offers no place.
        mode: "write", or "refuse" to refuse distorted pictures.
    """

    def __init__(self, folder: Path | None, mode: str) -> None:
        if mode not in ("write", "refuse"):
            raise ConfigError(f"options.undistort={mode!r} is not one of write, refuse")
        self._folder = folder
        self._mode = mode

    def apply(
        self, image: Path, depth: DepthRef | None, lens: Lens, scene_id: str, notes: Notes
    ) -> tuple[ImageRef, DepthRef | None, Intrinsics]:
        """The picture, its depth and its camera without distortion; the stored ones where there is none.

        DataError when the mode is "refuse" or the picture has another size than the lens.
        """
        if not lens.distorts:
            return ImageRef(path=str(image)), depth, checked_intrinsics(lens.camera, image)
        if self._mode == "refuse" or self._folder is None:
            raise DataError(
                f"{image}: taken through a {lens.model} lens with the coefficients {list(lens.coefficients)}; "
                "set options.undistort=write to undistort at ingest, or give undistorted pictures"
            )
        if depth is not None and (depth.K.width, depth.K.height) != (lens.camera.width, lens.camera.height):
            raise DataError(f"{depth.path}: a depth map through a lens must have the size of its picture")
        # The stored files decide what the copies hold, so they are guarded as well.
        notes.files.append(image)
        copy = self._copy(image, lens, scene_id, _remap_color)
        pinhole = _pinhole(lens)
        if depth is not None:
            notes.files.append(Path(depth.path))
            plain = self._copy(Path(depth.path), lens, scene_id, _remap_depth)
            depth = dataclasses.replace(depth, path=str(plain), K=pinhole)
        return ImageRef(path=str(copy)), depth, pinhole

    def _copy(self, path: Path, lens: Lens, scene_id: str, remap: Remap) -> Path:
        assert self._folder is not None
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        # The name says everything that determines the copy: a changed picture or lens gets another one.
        parts = json.dumps([str(path), stat.st_size, stat.st_mtime_ns, dataclasses.asdict(lens)])
        name = hashlib.sha256(parts.encode()).hexdigest()[:12]
        suffix = path.suffix.lower() if path.suffix.lower() in _JPEG else ".png"
        copy = self._folder / "undistorted" / scene_id / f"{path.stem}-{name}{suffix}"
        if not copy.exists():
            _write(remap(path, lens, *_maps(lens)), copy)
        return copy


class LensReader(Reader):
    """A reader of pictures that may have been taken through a lens; it has the option ``undistort``."""

    @cached_property
    def undistorter(self) -> Undistorter:
        """Where pictures taken through a lens go."""
        return Undistorter(self.cache, self.option("undistort"))


# Reconstructions of internet pictures have a lens for each: their cameras are small, the maps are not.
@lru_cache(maxsize=65536)
def _pinhole(lens: Lens) -> Intrinsics:
    return lens.pinhole()


@lru_cache(maxsize=8)
def _maps(lens: Lens) -> tuple[np.ndarray, np.ndarray]:
    return lens.maps(_pinhole(lens))


def _checked(pixels: np.ndarray, path: Path, lens: Lens) -> np.ndarray:
    if pixels.shape[:2] != (lens.camera.height, lens.camera.width):
        raise DataError(
            f"{path}: the picture is {pixels.shape[1]}x{pixels.shape[0]} but its intrinsics are for "
            f"{lens.camera.width}x{lens.camera.height}"
        )
    return pixels


def _remap_color(path: Path, lens: Lens, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    import cv2

    pixels = _checked(load_image(ImageRef(path=str(path))), path, lens)
    return np.asarray(cv2.remap(pixels, u, v, cv2.INTER_LINEAR))


def _remap_depth(path: Path, lens: Lens, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Stored depth at other places: interpolated within a surface, never across an edge or into the unknown."""
    import cv2

    stored = _checked(load_stored(path), path, lens)
    depth = stored.astype(np.float32)
    around = np.ones((3, 3), np.uint8)
    low, high = cv2.erode(depth, around), cv2.dilate(depth, around)
    smooth = ((low > 0) & (high - low < _SURFACE * high)).astype(np.uint8)
    nearest = cv2.remap(depth, u, v, cv2.INTER_NEAREST)
    within = cv2.remap(smooth, u, v, cv2.INTER_NEAREST) > 0
    merged = np.where(within, cv2.remap(depth, u, v, cv2.INTER_LINEAR), nearest)
    return np.round(merged).astype(stored.dtype) if stored.dtype.kind in "iu" else merged


def _write(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{path.name}")
    if pixels.dtype.kind == "f":
        # Pillow writes floats as TIFF only; the suffix of the copy says nothing to a reader that looks inside.
        Image.fromarray(pixels.astype(np.float32)).save(temporary, format="TIFF")
    else:
        Image.fromarray(pixels).save(temporary, quality=97)
    temporary.replace(path)
