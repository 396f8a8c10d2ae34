"""RealEstate10K: camera text files, and frames as pictures named by their time, or a video.

Layout: ``{train,test}/<clip>.txt`` (or ``<clip>.txt`` in the root), frames in ``frames/[<split>/]<clip>/<time>.png``
(or .jpg), or a video ``videos/<clip>.mp4`` or ``videos/<id of the URL>.mp4``.

A text file has the URL, then lines of: time in microseconds, fx fy cx cy, two zeros, a 3x4 matrix.

Conventions of the source: the matrix is world-to-camera with OpenCV axes, inverted here. The intrinsics are fractions
of width and height on the continuous image plane, whose origin is the corner of the first pixel: half a pixel is taken
from the centre. There is no metric scale: translations have that of the clip's reconstruction, another one in every
clip, so that no factor for the whole source could turn them into metres. A video gives the frame that is
nearest in time, if that is nearer than ``max_gap_s``.

Options: ``frames`` and ``videos`` (folders), ``max_gap_s``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlparse

import numpy as np

from services.contracts import ImageRef, Intrinsics, Scene, Split, View
from services.data.images import VIDEO_SUFFIXES, image_size
from services.data.readers.base import Notes, Reader, checked_intrinsics, inverse_pose, to_matrix, usable_pose
from services.errors import DataError

_SUFFIXES = (".png", ".jpg", ".jpeg")


class Re10kReader(Reader):
    """Clips of RealEstate10K."""

    options: ClassVar[Mapping[str, Any]] = {"frames": "frames", "videos": "videos", "max_gap_s": 0.05}

    def layout(self) -> str:
        """One line on the layout."""
        return "expected {train,test}/<clip>.txt and frames/<clip>/<time>.png or videos/<clip>.mp4"

    @cached_property
    def clips(self) -> dict[str, tuple[Path, str]]:
        """Clip -> (its text file, name of the split folder)."""
        found = {}
        for split in ("", "train", "val", "test"):
            for path in sorted((self.root / split).glob("*.txt")):
                found[path.stem] = (path, split)
        return found

    def all_ids(self) -> list[str]:
        """Names of the text files."""
        return sorted(self.clips)

    def source_splits(self) -> Mapping[str, Split]:
        """Splits as the folders say."""
        return {clip: Split(split) for clip, (_, split) in self.clips.items() if split}

    def read_one(self, scene_id: str, notes: Notes) -> Scene:
        """The frames of a clip for which there is a picture, in order of time."""
        if scene_id not in self.clips:
            raise DataError(f"{self.root}: has no clip {scene_id!r}")
        path, split = self.clips[scene_id]
        url, rows = read_cameras(path, notes)
        pictures = self._pictures(scene_id, split, url, path)
        views = []
        for time, row in self.every_nth(rows):
            image = pictures.at(time)
            if image is None:
                notes.drop("without a frame at its time", f"{path} ({time})")
                continue
            world_to_camera = row[6:].reshape(3, 4)
            if not usable_pose(world_to_camera):
                notes.drop("with a pose that is not finite", f"{path} ({time})")
                continue
            views.append(
                View(
                    image=image,
                    K=_camera(row, image_size(image), path),
                    pose=to_matrix(inverse_pose(world_to_camera)),
                    timestamp=time / 1e6,
                )
            )
        return Scene(id=scene_id, views=tuple(views))

    def _pictures(self, clip: str, split: str, url: str, path: Path) -> _Files | _Video:
        base = self.root / self.option("frames")
        for folder in (base / split / clip, base / clip):
            if folder.is_dir():
                return _Files(folder)
        names = [clip, *parse_qs(urlparse(url).query).get("v", [])]
        for name in names:
            for video in sorted((self.root / self.option("videos")).glob(f"{name}.*")):
                if video.suffix.lower() in VIDEO_SUFFIXES:
                    return _Video(video, float(self.option("max_gap_s")))
        raise DataError(f"{path}: there is neither a folder {base / clip} nor a video of {' or '.join(names)}")


class _Files:
    """Frames as pictures named by their time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def at(self, time: int) -> ImageRef | None:
        """The picture of that time in microseconds."""
        for suffix in _SUFFIXES:
            path = self._folder / f"{time}{suffix}"
            if path.is_file():
                return ImageRef(path=str(path))
        return None


class _Video:
    """Frames of a video by time."""

    def __init__(self, path: Path, gap: float) -> None:
        from services.data.videos import frame_times

        self._path, self._gap = path, gap
        self._times = np.array(frame_times(path))

    def at(self, time: int) -> ImageRef | None:
        """The frame nearest to that time in microseconds."""
        nearest = int(np.abs(self._times - time / 1e6).argmin())
        if abs(self._times[nearest] - time / 1e6) > self._gap:
            return None
        return ImageRef(path=str(self._path), frame=nearest)


def read_cameras(path: Path, notes: Notes) -> tuple[str, list[tuple[int, np.ndarray]]]:
    """(URL, [(microseconds, the 18 numbers after it)]) of a camera file, in order of time."""
    lines = notes.text(path).splitlines()
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        words = line.split()
        if not words:
            continue
        try:
            time, values = int(words[0]), np.array([float(word) for word in words[1:]])
        except ValueError as error:
            raise DataError(f"{path}: line {number} holds something that is no number ({error})") from error
        if values.size != 18:
            raise DataError(f"{path}: line {number} has {len(words)} numbers, 19 are needed")
        rows.append((time, values))
    if not rows:
        raise DataError(f"{path}: holds no camera")
    return lines[0].strip(), sorted(rows, key=lambda row: row[0])


def _camera(row: np.ndarray, size: tuple[int, int], path: Path) -> Intrinsics:
    width, height = size
    fx, fy, cx, cy = (float(value) for value in row[:4])
    camera = Intrinsics(
        fx=fx * width, fy=fy * height, cx=cx * width - 0.5, cy=cy * height - 0.5, width=width, height=height
    )
    return checked_intrinsics(camera, path)
