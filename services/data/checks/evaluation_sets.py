"""Scenes that must not be trained on, and how scenes are told by the names of files.

A scene is named by its id wherever that stands in a path: ``scene0011_00`` (ScanNet), ten hexadecimal digits
(ScanNet++), eight decimal ones (the videos of ARKitScenes); or by a whole part of the path, where a list names others.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from services.data.checks.findings import Fault, Finding, read_ids
from services.data.readers.corpus_files import a_dict
from services.errors import DataError

_SCENES = re.compile(
    r"scene\d{4}_\d{2}(?!\d)"  # ScanNet
    r"|(?<![0-9a-z])[0-9a-f]{10}(?![0-9a-z])"  # ScanNet++
    r"|(?<![0-9a-z])4\d{7}(?![0-9a-z])"  # ARKitScenes; all of its videos begin so, and no date does
)
_SCANNET = re.compile(r"(scene\d{4})_\d{2}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MEDIA = re.compile(r"\.(mp4|mov|avi|mkv|webm|zip|tar|ply|json|txt)$")

_ID_FIELDS = ("scene_name", "scene_id", "video_id", "scene")
_MEDIA_FIELDS = ("video", "image", "images", "image_path")
_SPLIT_FIELDS = ("fold", "split")
_HELD_OUT = frozenset({"validation", "val", "test", "testing"})
_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".csv")


def normalised(scene_id: str) -> str:
    """A scene id as sets are compared: last part of a path, without a media suffix, in lower case."""
    name = PurePosixPath(scene_id.strip().replace("\\", "/")).name.casefold()
    return _MEDIA.sub("", name)


def scenes_in(path: str) -> set[str]:
    """Ids of the forms of ScanNet, ScanNet++ and ARKitScenes that stand anywhere in a path."""
    return set(_SCENES.findall(path.casefold()))


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationSet:
    """Scenes that must not be trained on: normalised ids, and content digests of pictures."""

    name: str
    ids: frozenset[str]
    digests: frozenset[str] = frozenset()

    @classmethod
    def read(cls, name: str, path: Path) -> EvaluationSet:
        """From a file, or from all files of a folder that are of a known form.

        - a text file with one scene id, or one sha256 of a picture, a line (ScanNet's and ScanNet++'s lists of splits);
        - ``.json``, ``.jsonl``, ``.parquet``: records of a benchmark; scenes are their ``scene_name`` or ``scene_id``,
          and what the names of their media hold;
        - ``.csv``: a table of splits with ``video_id`` and ``fold`` (ARKitScenes); rows of validation and test count.

        DataError when it cannot be read, or names no scene.
        """
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        lines = [line.casefold() for file in files for line in _lines(file)]
        if not lines:
            raise DataError(
                f"{path}: names no scene of the evaluation set {name!r}; give a list of scene ids, the benchmark's own "
                f"{', '.join(_SUFFIXES[1:4])}, or a folder of such files"
            )
        digests = frozenset(line for line in lines if _DIGEST.fullmatch(line))
        return cls(name=name, ids=frozenset(normalised(line) for line in lines if line not in digests), digests=digests)

    @cached_property
    def rooms(self) -> dict[str, str]:
        """Room of ScanNet -> one of its scans in the set."""
        found = ((_SCANNET.fullmatch(name), name) for name in sorted(self.ids, reverse=True))
        return {match[1]: name for match, name in found if match}

    def match(self, path: str) -> tuple[str, str] | None:
        """(scene that a path or an id names, scene of this set): the same one, or another scan of its room; or None."""
        parts = {normalised(part) for part in PurePosixPath(path.replace("\\", "/")).parts}
        named = sorted(parts | scenes_in(path))
        for name in named:
            if name in self.ids:
                return name, name
        for name in named:
            scan = _SCANNET.fullmatch(name)
            if scan and scan[1] in self.rooms:
                return name, self.rooms[scan[1]]
        return None

    def why(self, scene_id: str, paths: Iterable[str] = (), digests: Iterable[str] = ()) -> str | None:
        """Why a scene or item with these files is held to be in the set; None if it is not."""
        for place in (scene_id, *paths):
            found = self.match(place)
            if found is not None and found[0] == found[1]:
                return f"the scene {found[0]} is in the evaluation set {self.name}"
            if found is not None:
                return (
                    f"{found[0]} is another scan of the room of {found[1]}, which is in the evaluation set {self.name}"
                )
        shared = self.digests.intersection(digests)
        return f"{len(shared)} of its pictures are in the evaluation set {self.name}" if shared else None


def findings(scenes: Mapping[str, tuple[Sequence[str], Sequence[str]]], sets: Sequence[EvaluationSet]) -> list[Finding]:
    """A finding for each scene or item (id -> paths of its media, content digests) that an evaluation set holds."""
    found = []
    for scene_id, (paths, digests) in scenes.items():
        reason = next((why for one in sets if (why := one.why(scene_id, paths, digests))), None)
        if reason is not None:
            found.append(Finding(fault=Fault.EVALUATION, scene=scene_id, reason=reason))
    return found


def _lines(path: Path) -> Iterator[str]:
    """Scene ids, and digests, of one file."""
    if path.suffix == ".csv":
        yield from _held_out(path)
    elif path.suffix in (".json", ".jsonl", ".parquet"):
        for record in _records(path):
            yield from (str(record[name]) for name in _ID_FIELDS if isinstance(record.get(name), str | int))
            for name in _MEDIA_FIELDS:
                value = record.get(name)
                for media in value if isinstance(value, list) else [value]:
                    yield from scenes_in(media) if isinstance(media, str) else ()
    else:
        yield from read_ids(path)


def _records(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from services.data.readers.benchmarks.files import PictureTable

        table = PictureTable(path)
        return [table.row(row) for row in range(len(table))]
    text = _text(path)
    try:
        if path.suffix == ".jsonl":
            return [a_dict(json.loads(line), str(path)) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: broken JSON ({error})") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: must hold a list of records, holds {type(content).__name__}")
    return [a_dict(record, str(path)) for record in content]


def _held_out(path: Path) -> list[str]:
    """Ids of a table's rows that are no training data."""
    rows = list(csv.DictReader(io.StringIO(_text(path))))
    columns = set(rows[0]) if rows else set()
    split = next((name for name in _SPLIT_FIELDS if name in columns), None)
    named = next((name for name in _ID_FIELDS if name in columns), None)
    if split is None or named is None:
        raise DataError(
            f"{path}: a table of splits has a column of {', '.join(_ID_FIELDS)} and one of {', '.join(_SPLIT_FIELDS)}; "
            f"this one has {sorted(columns)}"
        )
    return [row[named] for row in rows if (row[split] or "").casefold() in _HELD_OUT]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the evaluation set cannot be read ({error})") from error
