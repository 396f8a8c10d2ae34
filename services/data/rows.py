"""Rows of a manifest as Arrow tables: what ingest makes, what a plan reads, and what guards both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from services.contracts import Split
from services.data.digests import Stamp

CHUNK = 4096
"""Rows that are turned into Python objects at a time."""
_DIGEST = pa.binary(32)
ENTRIES = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("scene_type", pa.string()),
        ("length", pa.int64()),
        ("digests", pa.large_list(_DIGEST)),
        ("content", _DIGEST),
        ("record", pa.large_binary()),
        ("views", pa.large_list(pa.large_binary())),
        ("dropped", pa.string()),
        ("files", pa.large_list(pa.int32())),
    ]
)
FILES = pa.schema(
    [
        ("path", pa.large_string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("inode", pa.uint64()),
        ("digest", _DIGEST),
        ("shared", pa.bool_()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One scene or item, without its record."""

    id: str
    kind: str
    """"scene" or "item"."""
    split: Split | None
    digests: tuple[str, ...]
    """Content digest of each view or image, hexadecimal sha256."""
    n_views: int
    scene_type: str | None
    length: int
    """Estimated tokens of the text (a quarter of its UTF-8 bytes); 0 where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """A file that an entry depends on. Without a digest, another stamp alone means that it changed."""

    path: str
    """Relative to the source's root, or absolute where it lies elsewhere."""
    stamp: Stamp
    digest: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What ingest made of one scene or item."""

    id: str
    kind: str
    split: Split | None
    scene_type: str | None
    length: int
    digests: tuple[bytes, ...]
    content: bytes
    """sha256 over the record without its paths, and over the content of every file that it names."""
    record: bytes
    """The scene without its views, or the item; see :mod:`services.data.codec`."""
    guards: tuple[Guard, ...]
    views: tuple[bytes, ...] = ()
    """Blocks of the scene's views."""
    dropped: dict[str, int] = field(default_factory=dict)


class Entries(Sequence[Entry]):
    """Entries made on demand, many at a time where many are asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.select(["id", "kind", "split", "scene_type", "length", "digests"])

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[Entry]:
        for start in range(0, len(self), CHUNK):
            yield from _made(self._table.slice(start, CHUNK))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _made(self._table.slice(index % len(self), 1))[0]


class Tables:
    """Collects rows; a file that several rows name is kept once."""

    def __init__(self, shared: Sequence[Guard]) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in ENTRIES.names}
        self._guards: dict[str, tuple[int, Guard, bool]] = {}
        for guard in shared:
            self._number(guard, True)

    def _number(self, guard: Guard, shared: bool) -> int:
        return self._guards.setdefault(guard.path, (len(self._guards), guard, shared))[0]

    def add(self, row: Row) -> None:
        """Append a row."""
        for name in ("id", "kind", "scene_type", "length", "content", "record"):
            self._columns[name].append(getattr(row, name))
        self._columns["split"].append(row.split.value if row.split else None)
        self._columns["digests"].append(row.digests)
        self._columns["views"].append(row.views)
        self._columns["dropped"].append(json.dumps(row.dropped) if row.dropped else None)
        self._columns["files"].append([self._number(guard, False) for guard in row.guards])

    def finish(self) -> tuple[pa.Table, pa.Table]:
        """(entries, guarded files)."""
        guards = list(self._guards.values())
        files = {
            "path": [guard.path for _, guard, _ in guards],
            "size": [guard.stamp.size for _, guard, _ in guards],
            "mtime_ns": [guard.stamp.mtime_ns for _, guard, _ in guards],
            "inode": [guard.stamp.inode for _, guard, _ in guards],
            "digest": [guard.digest for _, guard, _ in guards],
            "shared": [shared for _, _, shared in guards],
        }
        return pa.table(self._columns, schema=ENTRIES), pa.table(files, schema=FILES)


def _made(table: pa.Table) -> list[Entry]:
    """Entries of a few rows, column by column: a corpus has millions."""
    lists = table.column("digests").combine_chunks()
    ends = np.cumsum(pc.list_value_length(lists).to_numpy())
    text = b"".join(lists.flatten().to_pylist()).hex()
    columns = [table.column(name).to_pylist() for name in ("id", "kind", "split", "scene_type", "length")]
    entries, start = [], 0
    for end, entry_id, kind, split, scene_type, length in zip(ends.tolist(), *columns, strict=True):
        digests = tuple(text[64 * place : 64 * place + 64] for place in range(start, end))
        entries.append(
            Entry(
                id=entry_id,
                kind=kind,
                split=Split(split) if split else None,
                digests=digests,
                n_views=end - start,
                scene_type=scene_type,
                length=length,
            )
        )
        start = end
    return entries


def guards_of(files: pa.Table) -> list[Guard]:
    """The rows of a table of files."""
    return [
        Guard(path=row["path"], stamp=Stamp(row["size"], row["mtime_ns"], row["inode"]), digest=row["digest"])
        for row in files.to_pylist()
    ]
