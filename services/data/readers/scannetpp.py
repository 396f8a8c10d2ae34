"""ScanNet++: the DSLR pictures, with cameras from COLMAP or from nerfstudio's ``transforms.json``.

Layout: ``data/<scene>/dslr/{resized_images/*.JPG, colmap/{cameras,images,points3D}.txt, nerfstudio/transforms.json}``,
``data/<scene>/scans/{mesh_aligned_0.05.ply, segments.json, segments_anno.json}``, ``splits/*_{train,val,test}.txt``,
``metadata/scene_types.json``, ``metadata/semantic_benchmark/top100.txt``.

Conventions of the source: metres, z up. COLMAP's poses are world-to-camera with OpenCV axes in the frame of the mesh.
The ``transforms.json`` has OpenGL camera-to-world poses, and its **world** is another: the converter that made it
swapped the world's x and y and negated z. Both are undone, so that either file gives poses in the mesh's frame. Pixel
centres lie at halves in both. The lens is a fisheye: pictures are undistorted at ingest (``lenses``). Frames that are
marked ``is_bad`` are left out and counted; test frames are views like the others.

Options: ``cameras`` (colmap | nerfstudio; "" takes COLMAP's where it is there), ``file`` and ``images`` (below
``dslr``; ``nerfstudio/transforms_undistorted.json`` with ``resized_undistorted_images`` reads what the toolkit of the
data set undistorted), ``classes`` (file with one class name a line, ids from 1), ``undistort`` (write | refuse).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from services.contracts import ImageRef, Instance, Scene, Split, View
from services.data.images import image_size
from services.data.readers.base import Notes, checked_pose, from_opengl, oriented_box, usable_pose
from services.data.readers.colmap import find_model, plain_view, read_model
from services.data.readers.lenses import LensReader
from services.data.readers.nerfstudio import frame_lens, frame_pose, read_frames
from services.errors import ConfigError, DataError

# Turns the world of the transforms.json back: z negated, then x and y swapped. It is its own inverse.
_WORLD = np.array([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


class ScanNetppReader(LensReader):
    """Scenes of ScanNet++."""

    options: ClassVar[Mapping[str, Any]] = {
        "cameras": "",
        "file": "nerfstudio/transforms.json",
        "images": "resized_images",
        "classes": "metadata/semantic_benchmark/top100.txt",
        "undistort": "write",
    }

    def layout(self) -> str:
        """One line on the layout."""
        return "expected data/<scene>/dslr"

    @cached_property
    def scenes(self) -> dict[str, Path]:
        """Scene id -> its folder."""
        parents = [self.root / "data", self.root]
        return {
            folder.name: folder
            for parent in parents
            if parent.is_dir()
            for folder in sorted(parent.iterdir())
            if (folder / "dslr").is_dir()
        }

    @cached_property
    def scene_types(self) -> dict[str, str]:
        """Scene id -> type, where the metadata has it."""
        path = self.root / "metadata/scene_types.json"
        return self.shared.json(path) if path.is_file() else {}

    def all_ids(self) -> list[str]:
        """Ids of the scenes with DSLR pictures."""
        return sorted(self.scenes)

    def source_splits(self) -> Mapping[str, Split]:
        """Splits by the lists in ``splits``; where lists overlap, the stricter wins (test, then val)."""
        splits: dict[str, Split] = {}
        for split in (Split.TRAIN, Split.VAL, Split.TEST):
            for path in sorted((self.root / "splits").glob(f"*{split}.txt")):
                splits.update(dict.fromkeys(self.shared.text(path).split(), split))
        return splits

    @cached_property
    def class_ids(self) -> dict[str, int]:
        """Class name -> id, counted from 1."""
        path = self.root / self.option("classes")
        if not path.is_file():
            return {}
        names = [line.strip() for line in self.shared.text(path).splitlines() if line.strip()]
        return {name: number for number, name in enumerate(names, start=1)}

    def classes(self) -> tuple[str, ...]:
        """Class names by id; 0 is "none"."""
        return ("none", *self.class_ids) if self.class_ids else ()

    def prepare(self) -> None:
        """Read the classes and the types of all scenes."""
        super().prepare()
        _ = self.scene_types

    def read_one(self, scene_id: str, notes: Notes) -> Scene:
        """Views, undistorted, with instances and mesh."""
        if scene_id not in self.scenes:
            raise DataError(f"{self.root}: has no scene {scene_id!r}")
        folder = self.scenes[scene_id]
        mesh, segments = folder / "scans/mesh_aligned_0.05.ply", folder / "scans/segments.json"
        views = self._from_colmap(folder, notes) if self._uses_colmap(folder) else self._from_nerfstudio(folder, notes)
        return Scene(
            id=scene_id,
            views=tuple(views),
            scene_type=self.scene_types.get(scene_id),
            instances=self._instances(folder / "scans/segments_anno.json", notes),
            mesh_path=str(mesh) if mesh.is_file() else None,
            superpoint_path=str(segments) if segments.is_file() else None,
        )

    def _uses_colmap(self, folder: Path) -> bool:
        cameras = self.option("cameras")
        if cameras not in ("", "colmap", "nerfstudio"):
            raise ConfigError(f"options.cameras={cameras!r} is not one of colmap, nerfstudio, ''")
        has_model = find_model(folder / "dslr") is not None
        if cameras == "colmap" and not has_model:
            raise DataError(f"{folder / 'dslr/colmap'}: there is no COLMAP model")
        return cameras == "colmap" or (cameras == "" and has_model)

    def _from_colmap(self, folder: Path, notes: Notes) -> list[View]:
        model = find_model(folder / "dslr")
        assert model is not None
        bad = self._bad_frames(folder, notes)
        views = []
        for name, pose, lens in self.every_nth(read_model(model, notes)):
            image = folder / "dslr" / self.option("images") / name
            if name in bad:
                notes.drop("marked as bad", image)
                continue
            views.append(plain_view(image, pose, lens, folder.name, self.undistorter, notes))
        return views

    def _from_nerfstudio(self, folder: Path, notes: Notes) -> list[View]:
        path = folder / "dslr" / self.option("file")
        meta = notes.json(path)
        views = []
        for frame in self.every_nth(read_frames(meta, path, ("frames", "test_frames"))):
            image = folder / "dslr" / self.option("images") / Path(frame["file_path"]).name
            pose = frame_pose(frame, path)
            if frame.get("is_bad"):
                notes.drop("marked as bad", image)
                continue
            if not usable_pose(pose):
                notes.drop("with a pose that is not finite", image)
                continue
            pose = _WORLD @ from_opengl(checked_pose(pose, path))
            lens = frame_lens({**meta, **frame}, image_size(ImageRef(path=str(image))), path)
            views.append(plain_view(image, pose, lens, folder.name, self.undistorter, notes))
        return views

    def _bad_frames(self, folder: Path, notes: Notes) -> set[str]:
        path = folder / "dslr" / self.option("file")
        if not path.is_file():
            return set()
        frames = read_frames(notes.json(path), path, ("frames", "test_frames"))
        return {Path(frame["file_path"]).name for frame in frames if frame.get("is_bad")}

    def _instances(self, path: Path, notes: Notes) -> tuple[Instance, ...]:
        if not path.is_file():
            return ()
        groups = notes.json(path).get("segGroups")
        if not isinstance(groups, list):
            raise DataError(f"{path}: has no list 'segGroups'")
        instances = []
        for group in groups:
            try:
                label = str(group["label"])
                box = oriented_box(group["obb"]) if "obb" in group else None
                number = int(group["objectId"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}: a segment group is incomplete or wrong ({error!r})") from error
            instances.append(Instance(id=number, label=label, class_id=self.class_ids.get(label, 0), box=box))
        return tuple(instances)
