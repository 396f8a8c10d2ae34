"""What every reader shares: options, splits, strides, and the small parsers that name the file when they fail."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from configs.schema import SourceConfig
from services.contracts import Box3D, Intrinsics, Item, Matrix, Scene, Split
from services.errors import ConfigError, DataError


@dataclass
class Notes:
    """What a reader says beside the scene: the files it read, and the views it left out and why."""

    files: list[Path] = field(default_factory=list)
    containers: list[Path] = field(default_factory=list)
    """Archives that it read a part of: too large to hash whole, so another stamp alone means that they changed."""
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """For each reason the first file that it holds for."""

    def drop(self, reason: str, path: Path | str) -> None:
        """Count a view that is left out."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, str(path))

    def listing(self, folder: Path, suffixes: frozenset[str]) -> list[Path]:
        """Files of a folder with one of the suffixes (lower case), in the order of their frame numbers.

        The folder becomes one of the files that the manifest guards, so that a frame that is added is noticed.
        """
        if not folder.is_dir():
            return []
        self.files.append(folder)
        return sorted((path for path in folder.iterdir() if path.suffix.lower() in suffixes), key=frame_order)

    def text(self, path: Path) -> str:
        """Content of a text file; it becomes one of the files that the manifest guards."""
        try:
            content = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise DataError(f"{path}: there is no such file") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a readable text file ({error})") from error
        self.files.append(path)
        return content

    def json(self, path: Path) -> Any:
        """Content of a JSON file."""
        try:
            return json.loads(self.text(path))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}: broken JSON at line {error.lineno}, column {error.colno} ({error.msg})"
            ) from error

    def numbers(self, path: Path, shape: tuple[int, ...]) -> np.ndarray:
        """The numbers of a text file as float64 of ``shape``; inf and nan are let through."""
        try:
            values = np.array([float(word) for word in self.text(path).replace(",", " ").split()])
        except ValueError as error:
            raise DataError(f"{path}: holds something that is no number ({error})") from error
        if values.size != np.prod(shape):
            wanted = "x".join(str(n) for n in shape)
            raise DataError(f"{path}: holds {values.size} numbers, {wanted} are needed")
        return values.reshape(shape)

    def pose(self, path: Path) -> np.ndarray | None:
        """The 4x4 camera-to-world pose of a text file; None, and a view left out, where it is missing or not finite."""
        if not path.is_file():
            self.drop("without a pose file", path)
            return None
        pose = self.numbers(path, (4, 4))
        if not usable_pose(pose):
            self.drop("with a pose that is not finite", path)
            return None
        return checked_pose(pose, path)


class Reader(ABC):
    """One source on disk. Subclasses convert their format's conventions to those of ``services.contracts``.

    Args:
        root: Absolute path of the source.
        source: Its settings; ``frame_stride``, ``limit``, ``splits`` and ``options`` are honoured here.
        cache: Folder for derived files, where a format needs one.
    """

    #: Raised when the reader's conversions change, so that older manifests are made again.
    version: ClassVar[int] = 1
    #: Whether many records show the same pictures, which ingest then hashes once.
    shares_pictures: ClassVar[bool] = False
    #: Options of the format and what holds when they are not given.
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, root: Path, source: SourceConfig, *, cache: Path | None = None) -> None:
        self.root = root
        self.source = source
        self.cache = cache
        self.shared = Notes()
        """Files that all scenes depend on (lists of splits, label tables)."""
        self._options = _checked_options(source, self.options)
        self._splits = self._explicit_splits()

    @abstractmethod
    def all_ids(self) -> list[str]:
        """Ids of everything that the source holds, sorted, before ``limit``."""

    @abstractmethod
    def read_one(self, scene_id: str, notes: Notes) -> Scene | Item:
        """The scene or item, with absolute paths and without its split. DataError names what is wrong with it."""

    def classes(self) -> tuple[str, ...]:
        """Names of the semantic classes by id ("" where an id is not used); () where the source has none."""
        return ()

    def prepare(self) -> None:
        """Read what all scenes share, so that its files are known and threads need not race for it."""
        self.classes()

    def source_splits(self) -> Mapping[str, Split]:
        """Scene id -> split as the source itself defines it; empty where it does not."""
        return {}

    def list_ids(self) -> list[str]:
        """Ids in a stable order, at most ``source.limit`` of them. DataError when there are none."""
        ids = self.all_ids()
        if not ids:
            raise DataError(f"{self.root}: no {self.source.format} scenes or items below it ({self.layout()})")
        return ids[: self.source.limit] if self.source.limit else ids

    def read(self, scene_id: str, notes: Notes | None = None) -> Scene | Item:
        """The scene or item with its split, every ``frame_stride``-th view. DataError when no view is left."""
        notes = notes if notes is not None else Notes()
        record = self.read_one(scene_id, notes)
        if isinstance(record, Scene) and not record.views:
            reasons = ", ".join(f"{count} {reason}" for reason, count in notes.dropped.items())
            raise DataError(f"{self.root}: scene {scene_id!r} has no usable view ({reasons or 'it has none at all'})")
        return _with_split(record, self.split_of(scene_id))

    def split_of(self, scene_id: str) -> Split | None:
        """Split by the files of ``source.splits``, else the source's own, else a stable hash of the id (80/10/10).

        None for a scene that the lists leave out.
        """
        if self._splits:
            return self._splits.get(scene_id)
        return stable_split(scene_id)

    def layout(self) -> str:
        """One line on what the format looks like on disk, for error messages."""
        return "see the module of this format for the layout it reads"

    def every_nth(self, frames: Sequence[Any]) -> list[Any]:
        """``frames`` thinned by ``source.frame_stride``."""
        return list(frames[:: max(1, self.source.frame_stride)])

    def option(self, name: str) -> Any:
        """Value of one of the format's options."""
        return self._options[name]

    def _explicit_splits(self) -> Mapping[str, Split]:
        if not self.source.splits:
            return self.source_splits()
        splits: dict[str, Split] = {}
        for name, file in self.source.splits.items():
            if name not in set(Split):
                raise ConfigError(f"splits: {name!r} is not one of {', '.join(Split)}")
            path = Path(file).expanduser()
            path = path if path.is_absolute() else self.root / path
            for scene_id in self.shared.text(path).split():
                if splits.setdefault(scene_id, Split(name)) != name:
                    raise DataError(f"{path}: scene {scene_id!r} is also in the split {splits[scene_id].value!r}")
        return splits


def _checked_options(source: SourceConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    for name in source.options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            allowed = ", ".join(sorted(known)) or "none"
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"options.{name} is unknown to the format {source.format!r}; it has: {allowed}{hint}")
    return {**known, **source.options}


def _with_split(record: Scene | Item, split: Split | None) -> Scene | Item:
    return dataclasses.replace(record, split=split) if record.split is None else record


def stable_split(scene_id: str) -> Split:
    """80 % train, 10 % val, 10 % test by the sha256 of the id: the same on every machine, whatever else is there."""
    bucket = int.from_bytes(hashlib.sha256(scene_id.encode()).digest()[:8], "big") % 10
    return Split.TRAIN if bucket < 8 else Split.VAL if bucket == 8 else Split.TEST


def frame_order(name: str | Path) -> tuple[int, tuple[float | str, ...], str]:
    """Sort key of frame files: by the number that the name is, otherwise by name with its numbers as numbers."""
    stem = Path(name).stem
    try:
        return (0, (float(stem),), str(name))
    except ValueError:
        parts = re.split(r"(\d+)", stem)
        return (1, tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), str(name))


def to_matrix(array: np.ndarray) -> Matrix:
    """An array as nested tuples of floats."""
    return tuple(tuple(float(value) for value in row) for row in array)


def from_opengl(pose: np.ndarray) -> np.ndarray:
    """A camera-to-world pose with OpenGL axes (y up, z backward) as one with OpenCV axes: columns 1 and 2 negated."""
    return pose * np.array([1.0, -1.0, -1.0, 1.0])


def inverse_pose(pose: np.ndarray) -> np.ndarray:
    """World-to-camera to camera-to-world and back, for a rigid 4x4 or 3x4 matrix: transposed, not solved for."""
    rotation, translation = pose[:3, :3], pose[:3, 3]
    result = np.eye(4)
    result[:3, :3] = rotation.T
    result[:3, 3] = -rotation.T @ translation
    return result


def oriented_box(obb: Mapping[str, Any]) -> Box3D:
    """Box of an annotation: centre, full lengths, and nine numbers that list the unit axes one after the other."""
    axes = np.asarray(obb["normalizedAxes"], dtype=np.float64).reshape(3, 3)
    return Box3D(center=triple(obb["centroid"]), size=triple(obb["axesLengths"]), axes=to_matrix(axes.T))


def triple(values: Iterable[Any]) -> tuple[float, float, float]:
    """Three numbers as a tuple of floats. ValueError when they are not three."""
    x, y, z = (float(value) for value in values)
    return x, y, z


def usable_pose(pose: np.ndarray) -> bool:
    """Whether a 4x4 pose is finite."""
    return bool(np.isfinite(pose).all())


def checked_pose(pose: np.ndarray, path: Path) -> np.ndarray:
    """A finite 4x4 pose as it came; DataError when its last row is not 0 0 0 1 (transposed, or no pose)."""
    if not np.allclose(pose[3], [0, 0, 0, 1], atol=1e-6):
        raise DataError(
            f"{path}: the last row of a pose is 0 0 0 1, this one has {pose[3].tolist()}; is it transposed?"
        )
    return pose


def intrinsics_of(matrix: np.ndarray, size: tuple[int, int], path: Path) -> Intrinsics:
    """Camera from the upper left 3x3 of ``matrix`` for an image of ``size`` (width, height)."""
    fx, fy, cx, cy = (float(matrix[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
    camera = Intrinsics(fx=fx, fy=fy, cx=cx, cy=cy, width=size[0], height=size[1])
    return checked_intrinsics(camera, path)


def checked_intrinsics(camera: Intrinsics, path: Path) -> Intrinsics:
    """The camera as it came; DataError when it cannot be that of an image of its size."""
    numbers = (camera.fx, camera.fy, camera.cx, camera.cy)
    if not np.isfinite(numbers).all() or camera.fx <= 0 or camera.fy <= 0:
        raise DataError(f"{path}: focal lengths and centre must be finite and positive, got {numbers}")
    if not (-0.5 <= camera.cx <= camera.width and -0.5 <= camera.cy <= camera.height):
        raise DataError(
            f"{path}: the principal point ({camera.cx:.1f}, {camera.cy:.1f}) lies outside of the image of "
            f"{camera.width}x{camera.height}; are these intrinsics those of another size?"
        )
    return camera
