"""ScanNet, as its exporter writes it; the procedural rooms are written in the same layout.

Layout: ``scans/<scene>/{color/<i>.jpg, depth/<i>.png, pose/<i>.txt, intrinsic/intrinsic_{color,depth}.txt,
instance-filt/<i>.png, label-filt/<i>.png, <scene>.txt, <scene>.aggregation.json, <scene>_vh_clean_2.ply,
<scene>_vh_clean_2.0.010000.segs.json}``, beside them ``splits/{train,val,test}.txt`` (or ``scannetv2_train.txt`` ...)
and ``scannetv2-labels.combined.tsv``. Scenes may also lie directly below the root. All but colour, pose and
intrinsics may be missing.

Conventions of the source: poses are camera-to-world in metres with OpenCV axes; a pose of ``-inf`` is one that
tracking lost. Intrinsics are for pixel centres at integers (the exporter unprojects pixel (i, j) without a half).
Depth is along z in millimetres, 0 = unknown. So nothing is converted but millimetres. ``instance-filt`` holds
``objectId + 1``, ``label-filt`` the ``id`` column of the label table.

Boxes come from ``obb`` of a segment group where it is given (centre, full lengths, the unit axes one after the other);
otherwise they are those of the group's mesh vertices, aligned with the axes of the axis-alignment frame.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from services.contracts import Box3D, DepthRef, ImageRef, Instance, Intrinsics, Scene, Split, View
from services.data.images import image_size
from services.data.readers.base import (
    Notes,
    Reader,
    intrinsics_of,
    oriented_box,
    to_matrix,
    triple,
)
from services.errors import DataError

_COLOR = frozenset({".jpg", ".jpeg", ".png"})
_LABELS = "scannetv2-labels.combined.tsv"
_METRES_PER_UNIT = 0.001


class ScanNetReader(Reader):
    """Scenes of ScanNet or of anything in its layout."""

    def layout(self) -> str:
        """One line on the layout."""
        return "expected scans/<scene>/color/*.jpg with pose/ and intrinsic/ beside"

    @cached_property
    def scenes(self) -> dict[str, Path]:
        """Scene id -> its folder."""
        folders = [self.root / "scans", self.root / "scans_test", self.root]
        return {
            scene.name: scene
            for folder in folders
            if folder.is_dir()
            for scene in sorted(folder.iterdir())
            if (scene / "color").is_dir()
        }

    def all_ids(self) -> list[str]:
        """Ids of the scenes that have a folder of colour images."""
        return sorted(self.scenes)

    def source_splits(self) -> Mapping[str, Split]:
        """Splits by the lists beside the scenes."""
        splits: dict[str, Split] = {}
        for split in Split:
            for name in (f"splits/{split}.txt", f"scannetv2_{split}.txt"):
                path = self.root / name
                if path.is_file():
                    splits.update(dict.fromkeys(self.shared.text(path).split(), split))
        return splits

    @cached_property
    def labels(self) -> dict[str, tuple[int, str]]:
        """Raw label -> (class id, class name), from the label table; empty without one."""
        path = self.root / _LABELS
        if not path.is_file():
            return {}
        rows = csv.DictReader(self.shared.text(path).splitlines(), delimiter="\t")
        missing = {"id", "raw_category", "category"} - set(rows.fieldnames or ())
        if missing:
            raise DataError(f"{path}: the label table lacks the column {', '.join(sorted(missing))}")
        try:
            return {row["raw_category"]: (int(row["id"]), row["category"]) for row in rows}
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: line {rows.line_num} has no integer id ({error})") from error

    def classes(self) -> tuple[str, ...]:
        """Class names by the ids of ``label-filt``; 0 is "none"."""
        if not self.labels:
            return ()
        names = [""] * (max(number for number, _ in self.labels.values()) + 1)
        for number, name in self.labels.values():
            names[number] = name
        names[0] = names[0] or "none"
        return tuple(names)

    def read_one(self, scene_id: str, notes: Notes) -> Scene:
        """Views with finite poses, instances with boxes, scene type and axis alignment."""
        if scene_id not in self.scenes:
            raise DataError(f"{self.root}: has no scene {scene_id!r}")
        folder = self.scenes[scene_id]
        facts = self._facts(folder, notes)
        mesh = _existing(folder / f"{scene_id}_vh_clean_2.ply")
        segments = _existing(folder / f"{scene_id}_vh_clean_2.0.010000.segs.json")
        alignment = _alignment(facts, folder)
        return Scene(
            id=scene_id,
            views=self._views(folder, notes),
            scene_type=facts.get("sceneType"),
            instances=self._instances(folder, mesh, segments, alignment, notes),
            mesh_path=str(mesh) if mesh else None,
            superpoint_path=str(segments) if segments else None,
            axis_alignment=None if alignment is None else to_matrix(alignment),
        )

    def _facts(self, folder: Path, notes: Notes) -> dict[str, str]:
        path = folder / f"{folder.name}.txt"
        if not path.is_file():
            return {}
        pairs = (line.split("=", 1) for line in notes.text(path).splitlines() if "=" in line)
        return {name.strip(): value.strip() for name, value in pairs}

    def _views(self, folder: Path, notes: Notes) -> tuple[View, ...]:
        colors = self.every_nth(notes.listing(folder / "color", _COLOR))
        if not colors:
            raise DataError(f"{folder / 'color'}: holds no image")
        camera = self._camera(folder / "intrinsic/intrinsic_color.txt", colors[0], notes)
        depth_camera = self._depth_camera(folder, colors, camera, notes)
        views = []
        for color in colors:
            pose = notes.pose(folder / "pose" / f"{color.stem}.txt")
            if pose is None:
                continue
            depth = folder / "depth" / f"{color.stem}.png"
            if depth_camera is not None and not depth.is_file():
                notes.drop("without a depth map", depth)
                continue
            reference = None
            if depth_camera is not None:
                reference = DepthRef(path=str(depth), metres_per_unit=_METRES_PER_UNIT, K=depth_camera)
            views.append(
                View(
                    image=ImageRef(path=str(color)),
                    K=camera,
                    pose=to_matrix(pose),
                    depth=reference,
                    instance_path=_text(_existing(folder / "instance-filt" / f"{color.stem}.png")),
                    label_path=_text(_existing(folder / "label-filt" / f"{color.stem}.png")),
                )
            )
        return tuple(views)

    def _camera(self, path: Path, image: Path, notes: Notes) -> Intrinsics:
        return intrinsics_of(notes.numbers(path, (4, 4)), image_size(ImageRef(path=str(image))), path)

    def _depth_camera(self, folder: Path, colors: list[Path], camera: Intrinsics, notes: Notes) -> Intrinsics | None:
        """Camera of the depth maps; without one of their own they have the colour camera's, if their size is its."""
        first = next((p for c in colors if (p := folder / "depth" / f"{c.stem}.png").is_file()), None)
        if first is None:
            return None
        path = folder / "intrinsic/intrinsic_depth.txt"
        if path.is_file():
            return self._camera(path, first, notes)
        size = image_size(ImageRef(path=str(first)))
        if size != (camera.width, camera.height):
            raise DataError(f"{path}: there is no such file, and the depth maps have another size than the images")
        return camera

    def _instances(
        self, folder: Path, mesh: Path | None, segments: Path | None, alignment: np.ndarray | None, notes: Notes
    ) -> tuple[Instance, ...]:
        path = next((p for p in sorted(folder.glob("*.aggregation.json"))), None)
        if path is None:
            return ()
        groups = notes.json(path).get("segGroups")
        if not isinstance(groups, list):
            raise DataError(f"{path}: has no list 'segGroups'")
        vertices: _Vertices | None = None
        if mesh and segments and not all("obb" in group for group in groups):
            vertices = _Vertices(mesh, segments, np.eye(4) if alignment is None else alignment, notes)
        instances = []
        for group in groups:
            try:
                object_id, raw = int(group["objectId"]), str(group["label"])
                box = oriented_box(group["obb"]) if "obb" in group else None
                parts = group.get("segments", [])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}: a segment group is incomplete or wrong ({error!r})") from error
            if box is None and vertices is not None:
                box = vertices.box(parts)
            class_id, label = self.labels.get(raw, (0, raw))
            instances.append(Instance(id=object_id + 1, label=label, class_id=class_id, box=box))
        return tuple(instances)


class _Vertices:
    """Vertices of a scene's mesh with their segment numbers, for boxes around groups of segments."""

    def __init__(self, mesh: Path, segments: Path, alignment: np.ndarray, notes: Notes) -> None:
        import trimesh

        try:
            loaded: Any = trimesh.load(mesh, process=False)
            points = np.asarray(loaded.vertices, dtype=np.float64)
        except (ValueError, OSError, AttributeError, IndexError, KeyError) as error:
            raise DataError(f"{mesh}: not a readable mesh ({error})") from error
        self.segments = np.asarray(notes.json(segments).get("segIndices", ()))
        if self.segments.shape != (len(points),):
            raise DataError(
                f"{segments}: {self.segments.size} segment indices for {len(points)} vertices of {mesh.name}"
            )
        self.alignment = alignment
        self.aligned = points @ alignment[:3, :3].T + alignment[:3, 3]

    def box(self, segments: list[int]) -> Box3D | None:
        """Box of the segments' vertices, axis-aligned in the alignment frame, expressed in the world frame."""
        points = self.aligned[np.isin(self.segments, segments)]
        if not len(points):
            return None
        low, high = points.min(axis=0), points.max(axis=0)
        inverse = np.linalg.inv(self.alignment)
        center = inverse[:3, :3] @ ((low + high) / 2) + inverse[:3, 3]
        return Box3D(center=triple(center), size=triple(high - low), axes=to_matrix(inverse[:3, :3]))


def _alignment(facts: dict[str, str], folder: Path) -> np.ndarray | None:
    if "axisAlignment" not in facts:
        return None
    words = facts["axisAlignment"].split()
    if len(words) != 16:
        raise DataError(f"{folder / folder.name}.txt: axisAlignment has {len(words)} numbers, 4x4 are needed")
    return np.array([float(word) for word in words]).reshape(4, 4)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
