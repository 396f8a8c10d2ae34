"""7-Scenes: Kinect sequences with colour, depth and pose files.

Layout: ``<scene>/seq-01/frame-000000.{color,depth}.png`` and ``.pose.txt``, with ``<scene>/{Train,Test}Split.txt``
("sequence1" ...). The root may also be one scene. A sequence is a scene of ours, named ``<scene>-seq-01``; its split is
the published one, which is by sequence.

Conventions of the source: poses are camera-to-world in metres with OpenCV axes, pixel centres at integers. Depth is
along z in millimetres; 0 and 65535 are unknown. The data come without calibration: the depth camera's published default
is a focal length of 585 and a centre of (320, 240) at 640x480; colour is taken with 525, as its users do. Colour and
depth are not registered, so each has its own camera at the same pose.

Options: ``depth_camera`` and ``color_camera`` ([fx, fy, cx, cy] in pixels of the stored maps).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from services.contracts import DepthRef, ImageRef, Intrinsics, Scene, Split, View
from services.data.images import image_size
from services.data.readers.base import Notes, Reader, checked_intrinsics, to_matrix
from services.errors import ConfigError, DataError

_UNKNOWN_DEPTH = 65535


class SevenScenesReader(Reader):
    """Sequences of 7-Scenes."""

    options: ClassVar[Mapping[str, Any]] = {
        "depth_camera": (585.0, 585.0, 320.0, 240.0),
        "color_camera": (525.0, 525.0, 320.0, 240.0),
    }

    def layout(self) -> str:
        """One line on the layout."""
        return "expected <scene>/seq-*/frame-*.color.png"

    @cached_property
    def sequences(self) -> dict[str, Path]:
        """Id -> folder of the sequence."""
        folders = [*self.root.glob("seq-*"), *self.root.glob("*/seq-*")]
        return {f"{folder.parent.name}-{folder.name}": folder for folder in sorted(folders) if folder.is_dir()}

    def all_ids(self) -> list[str]:
        """Ids of the sequences."""
        return sorted(self.sequences)

    def source_splits(self) -> Mapping[str, Split]:
        """Train and test, as the lists beside the sequences say."""
        splits: dict[str, Split] = {}
        for name, split in (("TrainSplit.txt", Split.TRAIN), ("TestSplit.txt", Split.TEST)):
            for path in [*self.root.glob(name), *self.root.glob(f"*/{name}")]:
                for number in re.findall(r"\d+", self.shared.text(path)):
                    splits[f"{path.parent.name}-seq-{int(number):02d}"] = split
        return splits

    def read_one(self, scene_id: str, notes: Notes) -> Scene:
        """Frames in order, each with its depth where there is one."""
        if scene_id not in self.sequences:
            raise DataError(f"{self.root}: has no sequence {scene_id!r}")
        folder = self.sequences[scene_id]
        images = [path for path in notes.listing(folder, frozenset({".png"})) if path.name.endswith(".color.png")]
        views = []
        for image in self.every_nth(images):
            stem = image.name.removesuffix(".color.png")
            pose = notes.pose(folder / f"{stem}.pose.txt")
            if pose is None:
                continue
            views.append(
                View(
                    image=ImageRef(path=str(image)),
                    K=self._camera("color_camera", image),
                    pose=to_matrix(pose),
                    depth=self._depth(folder / f"{stem}.depth.png"),
                )
            )
        return Scene(id=scene_id, views=tuple(views))

    def _depth(self, path: Path) -> DepthRef | None:
        if not path.is_file():
            return None
        camera = self._camera("depth_camera", path)
        return DepthRef(path=str(path), metres_per_unit=0.001, K=camera, unknown=_UNKNOWN_DEPTH)

    def _camera(self, option: str, image: Path) -> Intrinsics:
        numbers = np.asarray(self.option(option), dtype=np.float64)
        if numbers.shape != (4,):
            raise ConfigError(f"options.{option}={self.option(option)!r} must be four numbers: fx, fy, cx, cy")
        fx, fy, cx, cy = numbers.tolist()
        width, height = image_size(ImageRef(path=str(image)))
        return checked_intrinsics(Intrinsics(fx=fx, fy=fy, cx=cx, cy=cy, width=width, height=height), image)
