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

A record with ``video`` (a video file, or a folder of frames in the order of their numbers) shows frames of it, the same
every time (:func:`services.data.frames.choose_frames`), in the place of its one mark ``<video>`` or ``<image>``. Of
records without ``splits`` those about one video are all of one split. ``num_tokens`` is kept as the length.

Options:

- ``layout``: see above.
- ``images``: folder of the media that records name.
- ``percent``: use this share of the records, chosen by their ids (the suffix ``%NN`` of published data registries).
- ``tag``: label of records without one (published registries tell 2d from 3d data).
- ``least_frames``, ``most_frames``, ``frame_seconds``: frames of a video: one every ``frame_seconds``, within limits.
- ``folder_fps``: rate at which the frames of a folder were taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from services.contracts import ImageRef, Item, Split, Turn
from services.data.images import IMAGE_SUFFIXES
from services.data.readers.base import Notes, Reader, stable_split
from services.data.readers.corpus_files import (
    JsonLines,
    JsonList,
    ParquetRows,
    Record,
    Records,
    TarSamples,
    question_of,
    split_of,
    tokens_of,
    turns_of,
)
from services.data.readers.corpus_video import Videos, asks_for_video, check_marks, share_of, video_name, with_frames
from services.errors import ConfigError, DataError

_LAYOUTS = ("folder", "webdataset", "json", "jsonl", "parquet")


class CorpusReader(Reader):
    """Items from folders, archives, JSON, JSONL and Parquet."""

    version: ClassVar[int] = 3
    shares_pictures: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {
        "layout": "", "images": "", "percent": 100, "tag": "", "least_frames": 4, "most_frames": 8,
        "frame_seconds": 2.0, "folder_fps": 1.0,
    }  # fmt: skip

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
        """Ids in the order of the source (a folder: sorted), as many as ``percent`` says."""
        ids = list(self.pictures) if self.form == "folder" else list(self.records.ids)
        percent = self._options.get("percent", 100)
        if not isinstance(percent, int | float) or not 0 < percent <= 100:
            raise ConfigError(f"options.percent={percent!r} must be a number above 0 and at most 100")
        return ids if percent == 100 else share_of(ids, percent)

    def source_splits(self) -> Mapping[str, Split]:
        """Splits of a folder that has folders named after them."""
        if self.form != "folder":
            return {}
        first = {key: path.relative_to(self.root).parts[0] for key, path in self.pictures.items()}
        return {key: Split(name) for key, name in first.items() if name in set(Split)}

    def prepare(self) -> None:
        """List the records: that reads the file they all lie in. ConfigError for settings of videos that cannot be."""
        Videos.from_options({**CorpusReader.options, **self._options})
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
        images, turns = self._media(scene_id, record, where, notes)
        if not images and not turns:
            raise DataError(f"{where}: the record has neither an image nor text")
        label = record.get("label") or self._options.get("tag") or None
        return Item(
            id=scene_id,
            images=images,
            turns=turns,
            split=None if self.source.splits else split_of(record, where) or self._split_of_video(record),
            label=None if label is None else str(label),
            question=question_of(record, scene_id, turns, where),
            tokens=tokens_of(record, where),
        )

    def _media(
        self, record_id: str, record: Record, where: str, notes: Notes
    ) -> tuple[tuple[ImageRef, ...], tuple[Turn, ...]]:
        """The pictures of a record and its turns, with a mark for each frame of a video."""
        turns = turns_of(record, where)
        if record.get("video") is not None:
            images = self._videos.frames(self._base / video_name(record, where), where, notes)
            return images, with_frames(turns, len(images), where)
        images = tuple(self._image(ref, where) for ref in self.records.images(record_id, record, where))
        if images and asks_for_video(turns):
            images = self._videos.thinned(images)
            turns = with_frames(turns, len(images), where)
        check_marks(turns, len(images), where)
        return images, turns

    @cached_property
    def _videos(self) -> Videos:
        return Videos.from_options({**CorpusReader.options, **self._options})

    @cached_property
    def _base(self) -> Path:
        base = Path(self.option("images") or (self.root.parent if self.root.is_file() else self.root)).expanduser()
        return base if base.is_absolute() else self.root.parent / base

    def _split_of_video(self, record: Record) -> Split | None:
        """One split for all questions about a video: none of its frames is trained on and judged by."""
        video = record.get("video")
        return None if video is None else stable_split(str(video))

    def _label(self, path: Path) -> str | None:
        parts = path.relative_to(self.root).parts[:-1]
        if parts and parts[0] in set(Split):
            parts = parts[1:]
        return parts[0] if parts else None

    def _image(self, ref: ImageRef, where: str) -> ImageRef:
        if ref.member is not None and Path(ref.path).is_absolute():
            return ref
        path = self._base / ref.path
        if not path.is_file():
            raise DataError(f"{path}: there is no such file ({where}); options.images names the folder of the images")
        return dataclasses.replace(ref, path=str(path))
