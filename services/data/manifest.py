"""The manifest of a source: what it holds, named by content, made at ingest and revalidated at every start.

A manifest is one immutable file: two Arrow IPC streams (entries, guarded files) and a checksum of both. It is mapped,
and a scene is decoded only when it is asked for, so millions of items cost what is used of them. Its ``digest`` covers
ids, splits, classes, pixels and everything else the reader found (poses, intrinsics, boxes, text), but no path, no
time and no root: moving a source changes nothing. Size, time and inode of the files behind it guard the digests.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from services.contracts import Item, Scene, Split
from services.data.codec import decode
from services.data.digests import Stamp, digest_file
from services.errors import DataError

LAYOUT = 1
_MAGIC = b"LOOM3DMF"
# Rows that are turned into Python objects at a time.
_CHUNK = 4096
_DIGEST = pa.binary(32)
_ENTRIES = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("scene_type", pa.string()),
        ("length", pa.int64()),
        ("digests", pa.large_list(_DIGEST)),
        ("content", _DIGEST),
        ("record", pa.large_binary()),
        ("dropped", pa.string()),
        ("files", pa.large_list(pa.int32())),
    ]
)
_FILES = pa.schema(
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
    guards: tuple[Guard, ...]
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What holds for the whole manifest."""

    name: str
    root: str
    settings: str
    """Digest of the settings and the reader that made it."""
    classes: tuple[str, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)
    """Id -> why it was left out."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason for dropping views -> the first file that it holds for."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What :meth:`Manifest.revalidate` found."""

    manifest: Manifest
    """The same content with the stamps as they are now."""
    changed: dict[str, str] = field(default_factory=dict)
    """Id of an entry -> the file whose content changed or that is gone."""
    shared: tuple[str, ...] = ()
    """Files that all entries depend on and that changed: everything has to be read again."""
    touched: int = 0
    """Files with another stamp and the same content."""
    rehashed: int = 0
    """Files that were read again."""

    def __bool__(self) -> bool:
        return bool(self.changed or self.shared)


class Manifest:
    """One indexed source. Make it with :meth:`build` or :meth:`load`."""

    def __init__(self, facts: Facts, digest: str, entries: pa.Table, files: pa.Table) -> None:
        self.facts = facts
        self.digest = digest
        self._entries = entries
        self._files = files
        # A scene of a thousand views takes milliseconds to decode and is asked for once a view.
        self._decoded = lru_cache(maxsize=128)(self._decode)

    @classmethod
    def build(cls, facts: Facts, rows: Iterable[Row], shared: Sequence[Guard] = ()) -> Manifest:
        """A manifest of ``rows`` in their order; ``shared`` guards files that all of them depend on."""
        tables = _Tables(shared)
        seen: set[str] = set()
        for row in rows:
            if row.id in seen:
                raise DataError(f"{facts.root}: the id {row.id!r} occurs twice")
            seen.add(row.id)
            tables.add(row)
        entries, files = tables.finish()
        return cls(facts, _digest(facts.classes, entries), entries, files)

    @property
    def name(self) -> str:
        """Name of the source in the run's config."""
        return self.facts.name

    @property
    def root(self) -> Path:
        """Folder or file of the source."""
        return Path(self.facts.root)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of semantic classes, index = class id, "" where an id is not used."""
        return self.facts.classes

    @property
    def entries(self) -> Sequence[Entry]:
        """All entries, made when they are looked at."""
        return _Entries(self._entries)

    @property
    def ids(self) -> list[str]:
        """Ids in order."""
        return self._entries.column("id").to_pylist()

    def __len__(self) -> int:
        return self._entries.num_rows

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (self.facts, self.digest, self._entries, self._files)

    def __repr__(self) -> str:
        return f"Manifest({self.name!r}, {len(self)} entries, {self.digest[:12]})"

    def entry(self, entry_id: str) -> Entry:
        """The entry of that id. DataError when there is none."""
        return _Entries(self._entries)[self._row(entry_id)]

    def of_split(self, split: Split | str) -> list[Entry]:
        """Entries of a split in order."""
        chosen = self._entries.filter(pc.equal(self._entries.column("split"), Split(split).value))
        return list(_Entries(chosen))

    def splits(self) -> dict[str, int]:
        """Number of entries in each split; those of none count as "none"."""
        return dict(Counter(value or "none" for value in self._entries.column("split").to_pylist()))

    def count_views(self) -> int:
        """Views or images of all entries together."""
        return int(pc.sum(pc.list_value_length(self._entries.column("digests"))).as_py() or 0)

    def scene(self, entry_id: str) -> Scene | Item:
        """The scene or item with absolute paths. The last 128 are kept decoded."""
        return self._decoded(self._row(entry_id))

    def dropped(self) -> Counter[str]:
        """Views that were left out, by reason."""
        total: Counter[str] = Counter()
        for text in self._entries.column("dropped").to_pylist():
            if text:
                total.update(json.loads(text))
        return total

    def rows(self, ids: Iterable[str]) -> Iterator[Row]:
        """What :meth:`build` was given for these entries."""
        places = [self._row(entry_id) for entry_id in ids]
        for start in range(0, len(places), _CHUNK):
            part = self._entries.take(places[start : start + _CHUNK])
            numbers = pc.list_flatten(part.column("files"))
            guards = iter(_guards(self._files.take(numbers)))
            for values in part.to_pylist():
                count = len(values.pop("files"))
                values["split"] = Split(values["split"]) if values["split"] else None
                values["digests"] = tuple(values["digests"])
                values["dropped"] = json.loads(values["dropped"]) if values["dropped"] else {}
                yield Row(**values, guards=tuple(islice(guards, count)))

    def shared_guards(self) -> list[Guard]:
        """Guards of the files that all entries depend on."""
        return _guards(self._files.filter(self._files.column("shared")))

    def revalidate(self, workers: int = 8) -> Changes:
        """Compare every guarded file with its stamp and read again only those that differ."""
        paths = self._files.column("path").to_pylist()
        with ThreadPoolExecutor(workers) as pool:
            # A future a file would cost more than the call it makes.
            parts = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
            now = [stamp for stamps in pool.map(self._stamps, parts) for stamp in stamps]
            stored = zip(*(_numpy(self._files, name).tolist() for name in ("size", "mtime_ns", "inode")), strict=True)
            suspects = [i for i, (new, old) in enumerate(zip(now, stored, strict=True)) if new != Stamp(*old)]
            if not suspects:
                return Changes(manifest=self)
            same = list(pool.map(self._same_content, _guards(self._files.take(suspects))))
        touched = {index: now[index] for index, is_same in zip(suspects, same, strict=True) if is_same}
        changed = [index for index, is_same in zip(suspects, same, strict=True) if not is_same]
        shared = _numpy(self._files, "shared")
        return Changes(
            manifest=self._with_stamps(touched),
            changed=self._owners(changed),
            shared=tuple(paths[index] for index in changed if shared[index]),
            touched=len(touched),
            rehashed=sum(now[index] is not None for index in suspects),
        )

    def save(self, path: str | Path) -> None:
        """Write the manifest; a reader sees the old file or the whole new one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        facts = {**self.facts.__dict__, "layout": LAYOUT, "digest": self.digest}
        metadata = {b"loom3d": json.dumps(facts).encode()}
        for table in (self._entries.replace_schema_metadata(metadata), self._files):
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=65536)
        body = sink.getvalue()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(body)
                file.write(_MAGIC + xxhash.xxh3_64(body).digest())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"{path}: the manifest cannot be written ({error.strerror or error})") from error

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Map a saved manifest. DataError names the file when it is missing, damaged, or of another layout."""
        path = Path(path)
        try:
            body = _verified(path)
            source = pa.BufferReader(body)
            entries = pa.ipc.open_stream(source).read_all()
            files = pa.ipc.open_stream(source).read_all()
            facts: dict[str, Any] = json.loads(entries.schema.metadata[b"loom3d"])
        except FileNotFoundError as error:
            raise DataError(f"{path}: there is no such manifest") from error
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: the manifest is damaged ({error}); delete it, the next start makes it again"
            ) from error
        if facts.pop("layout") != LAYOUT:
            raise DataError(
                f"{path}: the manifest is of another layout than {LAYOUT}; delete it, the next start makes it again"
            )
        digest = facts.pop("digest")
        facts["classes"] = tuple(facts["classes"])
        return cls(Facts(**facts), digest, entries.replace_schema_metadata(None), files)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {entry_id: index for index, entry_id in enumerate(self.ids)}

    def _row(self, entry_id: str) -> int:
        if entry_id in self.facts.broken:
            raise DataError(f"source {self.name!r}: {entry_id!r} was left out at ingest: {self.facts.broken[entry_id]}")
        try:
            return self._rows[entry_id]
        except KeyError:
            raise DataError(f"source {self.name!r} has no scene or item {entry_id!r} ({len(self)} entries)") from None

    def _decode(self, index: int) -> Scene | Item:
        record, kind = self._entries.column("record")[index].as_py(), self._entries.column("kind")[index].as_py()
        return decode(record, kind, self.absolute)

    def absolute(self, path: str) -> str:
        """A path of the manifest as an absolute one."""
        return os.path.join(self.facts.root, path)  # noqa: PTH118 - an absolute path stays itself; called per file

    def _stamps(self, paths: list[str]) -> list[Stamp | None]:
        return [Stamp.of(self.absolute(path)) for path in paths]

    def _same_content(self, guard: Guard) -> bool:
        path = self.absolute(guard.path)
        if guard.digest is None or Stamp.of(path) is None:
            return False
        return digest_file(path).digest == guard.digest

    def _owners(self, files: list[int]) -> dict[str, str]:
        """Id -> path, for the entries that depend on one of the files."""
        lists = self._entries.column("files").combine_chunks()
        flat = lists.flatten().to_numpy()
        hits = np.flatnonzero(np.isin(flat, files))
        owners = self._entries.column("id").take(lists.value_parent_indices().take(hits)).to_pylist()
        return dict(zip(owners, self._files.column("path").take(flat[hits]).to_pylist(), strict=True))

    def _with_stamps(self, stamps: dict[int, Stamp | None]) -> Manifest:
        columns = {name: _numpy(self._files, name).copy() for name in ("size", "mtime_ns", "inode")}
        for index, stamp in stamps.items():
            for name, values in columns.items():
                values[index] = getattr(stamp, name)
        files = self._files
        for name, values in columns.items():
            place = files.schema.get_field_index(name)
            files = files.set_column(place, _FILES.field(name), pa.array(values, _FILES.field(name).type))
        return Manifest(self.facts, self.digest, self._entries, files)


class _Entries(Sequence[Entry]):
    """Entries made on demand, many at a time where many are asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.select(["id", "kind", "split", "scene_type", "length", "digests"])

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[Entry]:
        for start in range(0, len(self), _CHUNK):
            yield from _made(self._table.slice(start, _CHUNK))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _made(self._table.slice(index % len(self), 1))[0]


class _Tables:
    """Collects rows; a file that several rows name is kept once."""

    def __init__(self, shared: Sequence[Guard]) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in _ENTRIES.names}
        self._guards: dict[str, tuple[int, Guard, bool]] = {}
        for guard in shared:
            self._number(guard, True)

    def _number(self, guard: Guard, shared: bool) -> int:
        return self._guards.setdefault(guard.path, (len(self._guards), guard, shared))[0]

    def add(self, row: Row) -> None:
        for name in ("id", "kind", "scene_type", "length", "content", "record"):
            self._columns[name].append(getattr(row, name))
        self._columns["split"].append(row.split.value if row.split else None)
        self._columns["digests"].append(list(row.digests))
        self._columns["dropped"].append(json.dumps(row.dropped) if row.dropped else None)
        self._columns["files"].append([self._number(guard, False) for guard in row.guards])

    def finish(self) -> tuple[pa.Table, pa.Table]:
        guards = list(self._guards.values())
        files = {
            "path": [guard.path for _, guard, _ in guards],
            "size": [guard.stamp.size for _, guard, _ in guards],
            "mtime_ns": [guard.stamp.mtime_ns for _, guard, _ in guards],
            "inode": [guard.stamp.inode for _, guard, _ in guards],
            "digest": [guard.digest for _, guard, _ in guards],
            "shared": [shared for _, _, shared in guards],
        }
        return pa.table(self._columns, schema=_ENTRIES), pa.table(files, schema=_FILES)


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


def _guards(files: pa.Table) -> list[Guard]:
    return [
        Guard(path=row["path"], stamp=Stamp(row["size"], row["mtime_ns"], row["inode"]), digest=row["digest"])
        for row in files.to_pylist()
    ]


def _digest(classes: tuple[str, ...], entries: pa.Table) -> str:
    total = sha256(json.dumps(["loom3d-manifest", LAYOUT, classes]).encode())
    columns = [entries.column(name).to_pylist() for name in ("id", "split", "content")]
    for entry_id, split, content in zip(*columns, strict=True):
        total.update(json.dumps([entry_id, split]).encode() + content)
    return total.hexdigest()


def _numpy(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table.column(name).to_numpy())


def _verified(path: Path) -> pa.Buffer:
    """The mapped file without its trailer. ValueError when the checksum does not hold."""
    tail = len(_MAGIC) + 8
    whole = pa.memory_map(str(path)).read_buffer()
    if whole.size <= tail:
        raise ValueError(f"it has only {whole.size} bytes")
    body, trailer = whole.slice(0, whole.size - tail), whole.slice(whole.size - tail).to_pybytes()
    if trailer[: len(_MAGIC)] != _MAGIC:
        raise ValueError("its end is missing; it is truncated")
    if xxhash.xxh3_64(body).digest() != trailer[len(_MAGIC) :]:
        raise ValueError("its checksum does not hold")
    return body
