"""Images and conversations that are no scenes: each becomes an item.

``layout`` says how they lie, "" takes what the root looks like:

- ``folder``: a folder of images; its folders are classes; folders named train, val and test above them are splits.
- ``webdataset``: ``*.tar`` archives (uncompressed). Files of a sample share the name up to the first dot of their last
  part: an image, and ``.txt`` (caption), ``.cls`` (label) or ``.json`` (a record as below).
- ``json``: one ``.json`` list of records in LLaVA's form, ``{"id", "image": name or names, "conversations": [{"from":
  "human" | "gpt" | "system", "value"}]}``.
- ``jsonl``: such a record a line, in one file or (where ``layout`` is given) in all ``*.jsonl`` below a folder; also
  with ``messages`` ([{"role", "content"}]), or ``text`` / ``caption``.
- ``parquet``: ``*.parquet`` with the same fields as columns; ``image`` holds bytes, a struct with ``bytes`` and
  ``path``, or a path.

A ``label`` field is kept, and a ``split`` unless ``splits`` are given. ``question_type`` with ``answer`` (and
``question``, ``options``, ``views``, as `loom3d data questions` writes them) make a record a question that can be
scored. Names of images are relative to ``images``, by default the folder of the file; an image may also be an object
with ``path`` and ``frame`` (of a video) or ``member`` (of an archive).

Options: ``layout``, ``images`` (folder).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from services.contracts import ImageRef, Item, Split
from services.data.images import IMAGE_SUFFIXES
from services.data.readers.base import Notes, Reader
from services.data.readers.corpus_files import (
    JsonLines,
    JsonList,
    ParquetRows,
    Records,
    TarSamples,
    question_of,
    split_of,
    turns_of,
)
from services.errors import ConfigError, DataError

_LAYOUTS = ("folder", "webdataset", "json", "jsonl", "parquet")


class CorpusReader(Reader):
    """Items from folders, archives, JSON, JSONL and Parquet."""

    version: ClassVar[int] = 2
    options: ClassVar[Mapping[str, Any]] = {"layout": "", "images": ""}

    @cached_property
    def form(self) -> str:
        """The layout: as given, or as the root looks."""
        given = self.option("layout")
        if given and given not in _LAYOUTS:
            raise ConfigError(f"options.layout={given!r} is not one of {', '.join(_LAYOUTS)}")
        suffixes = {".tar": "webdataset", ".parquet": "parquet", ".json": "json", ".jsonl": "jsonl"}
        if given or self.root.is_file():
            return given or suffixes.get(self.root.suffix, "json")
        for suffix in (".tar", ".parquet"):
            if any(self.root.glob(f"*{suffix}")):
                return suffixes[suffix]
        return "folder"

    def layout(self) -> str:
        """One line on the layout."""
        return f"read as layout={self.form}; others are {', '.join(name for name in _LAYOUTS if name != self.form)}"

    @cached_property
    def pictures(self) -> dict[str, Path]:
        """Id (path below the root without suffix, unless that is taken) -> image, for a folder."""
        found: dict[str, Path] = {}
        for path in sorted(self.root.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                name = path.relative_to(self.root)
                key = name.with_suffix("").as_posix()
                found[name.as_posix() if key in found else key] = path
        return found

    @cached_property
    def records(self) -> Records:
        """The records of everything but a folder."""
        if self.form == "json":
            return JsonList(self.root, self.shared)
        if self.form == "jsonl":
            files = [self.root] if self.root.is_file() else sorted(self.root.rglob("*.jsonl"))
            return JsonLines(files, self.shared)
        suffix = ".tar" if self.form == "webdataset" else ".parquet"
        files = [self.root] if self.root.is_file() else sorted(self.root.glob(f"*{suffix}"))
        return TarSamples(files) if self.form == "webdataset" else ParquetRows(files)

    def all_ids(self) -> list[str]:
        """Ids in the order of the source (a folder: sorted)."""
        return list(self.pictures) if self.form == "folder" else list(self.records.ids)

    def source_splits(self) -> Mapping[str, Split]:
        """Splits of a folder that has folders named after them."""
        if self.form != "folder":
            return {}
        first = {key: path.relative_to(self.root).parts[0] for key, path in self.pictures.items()}
        return {key: Split(name) for key, name in first.items() if name in set(Split)}

    def prepare(self) -> None:
        """List the records: that reads the file they all lie in."""
        self.all_ids()

    def read_one(self, scene_id: str, notes: Notes) -> Item:
        """One item. DataError when an image is missing or a conversation has no turns."""
        if self.form == "folder":
            if scene_id not in self.pictures:
                raise DataError(f"{self.root}: has no image {scene_id!r}")
            path = self.pictures[scene_id]
            return Item(id=scene_id, images=(ImageRef(path=str(path)),), label=self._label(path))
        if scene_id not in self.records.ids:
            raise DataError(f"{self.root}: has no record {scene_id!r}")
        notes.containers += self.records.containers(scene_id)
        record, where = self.records.read(scene_id)
        images = tuple(self._image(ref, where) for ref in self.records.images(scene_id, record, where))
        turns = turns_of(record, where)
        if not images and not turns:
            raise DataError(f"{where}: the record has neither an image nor text")
        label = record.get("label")
        return Item(
            id=scene_id,
            images=images,
            turns=turns,
            split=None if self.source.splits else split_of(record, where),
            label=None if label is None else str(label),
            question=question_of(record, scene_id, turns, where),
        )

    def _label(self, path: Path) -> str | None:
        parts = path.relative_to(self.root).parts[:-1]
        if parts and parts[0] in set(Split):
            parts = parts[1:]
        return parts[0] if parts else None

    def _image(self, ref: ImageRef, where: str) -> ImageRef:
        if ref.member is not None and Path(ref.path).is_absolute():
            return ref
        base = Path(self.option("images") or (self.root.parent if self.root.is_file() else self.root)).expanduser()
        path = (base if base.is_absolute() else self.root.parent / base) / ref.path
        if not path.is_file():
            raise DataError(f"{path}: there is no such file ({where}); options.images names the folder of the images")
        return dataclasses.replace(ref, path=str(path))
