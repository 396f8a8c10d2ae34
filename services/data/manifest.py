"""The manifest of a source: what it holds, named by content, made at ingest and revalidated at every start.

A manifest is one immutable file: two Arrow IPC streams (entries, guarded files) and a checksum of both. It is mapped,
and what is asked for is decoded (a scene, or some of its views), so millions of items cost what is used of them. Its
``digest`` covers ids, splits, classes, pixels and everything else the reader found (poses, intrinsics, boxes, text),
but no path, no time and no root: moving a source changes nothing. Size, time and inode of the files behind it guard
the digests.
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

from services.contracts import Item, Scene, Split, View
from services.data.codec import BLOCK, decode, decode_views
from services.data.digests import Stamp, digest_file
from services.data.rows import CHUNK, FILES, Entries, Entry, Guard, Row, Tables, guards_of
from services.errors import DataError

LAYOUT = 2
_MAGIC = b"LOOM3DMF"
# Blocks of views that stay decoded, some 2 kB a view: neighbours are asked for together, and by several consumers.
_BLOCKS = 1024


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
        self._blocks = lru_cache(maxsize=_BLOCKS)(self._block)

    @classmethod
    def build(cls, facts: Facts, rows: Iterable[Row], shared: Sequence[Guard] = ()) -> Manifest:
        """A manifest of ``rows`` in their order; ``shared`` guards files that all of them depend on."""
        tables = Tables(shared)
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
        return Entries(self._entries)

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
        return Entries(self._entries)[self._row(entry_id)]

    def of_split(self, split: Split | str) -> Sequence[Entry]:
        """Entries of a split in order, made when they are looked at."""
        return Entries(self._entries.filter(pc.equal(self._entries.column("split"), Split(split).value)))

    def places(self, split: Split | str | None = None, without: Iterable[str] = ()) -> list[str]:
        """Names by which scenes are told: ids of entries, folders of scenes' files, and files of items; each once.

        ``split`` limits them to entries of a split (None: of all), ``without`` leaves entries out by their ids. Paths
        are relative to the root.
        """
        entries = self._entries
        if split is not None:
            entries = entries.filter(pc.equal(entries.column("split"), Split(split).value))
        skipped = pa.array(sorted(without), pa.string())
        entries = entries.filter(pc.invert(pc.is_in(entries.column("id"), value_set=skipped)))
        found = entries.column("id").to_pylist()
        for kind in ("scene", "item"):
            files = pc.list_flatten(entries.filter(pc.equal(entries.column("kind"), kind)).column("files"))
            paths = self._files.column("path").take(pc.unique(files))
            if kind == "scene":
                paths = pc.unique(pc.replace_substring_regex(paths, r"(^|/)[^/]*$", ""))
            found += paths.to_pylist()
        return list(dict.fromkeys(path for path in found if path))

    @property
    def scene_types(self) -> tuple[str, ...]:
        """Every type of scene (label of an item) that occurs, sorted."""
        return tuple(sorted(pc.unique(self._entries.column("scene_type")).drop_null().to_pylist()))

    def splits(self) -> dict[str, int]:
        """Number of entries in each split; those of none count as "none"."""
        return dict(Counter(value or "none" for value in self._entries.column("split").to_pylist()))

    def count_views(self) -> int:
        """Views or images of all entries together."""
        return int(pc.sum(pc.list_value_length(self._entries.column("digests"))).as_py() or 0)

    def scene(self, entry_id: str) -> Scene | Item:
        """The scene or item, whole, with absolute paths. A scene of a thousand views takes tens of milliseconds."""
        row = self._row(entry_id)
        record, kind, blocks = (self._value(name, row).as_py() for name in ("record", "kind", "views"))
        return decode(record, kind, self.absolute, blocks)

    def views(self, entry_id: str, places: Sequence[int]) -> list[View]:
        """Some views of a scene with absolute paths; the images of an item as views that are nothing else.

        Costs what these views cost, however many the scene has. DataError when it has no such view.
        """
        row = self._row_with(entry_id, places)
        return [self._blocks(row, place // BLOCK)[place % BLOCK] for place in places]

    def digests(self, entry_id: str, places: Sequence[int]) -> list[str]:
        """Content digests of some views or images, as in the entry. DataError when there is no such view."""
        values = self._value("digests", self._row_with(entry_id, places)).values
        return [values[place].as_py().hex() for place in places]

    def scene_type(self, entry_id: str) -> str | None:
        """Type of the scene (label of the item), None where it has none."""
        kind: str | None = self._value("scene_type", self._row(entry_id)).as_py()
        return kind

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
        for start in range(0, len(places), CHUNK):
            part = self._entries.take(places[start : start + CHUNK])
            numbers = pc.list_flatten(part.column("files"))
            guards = iter(guards_of(self._files.take(numbers)))
            for values in part.to_pylist():
                count = len(values.pop("files"))
                values["split"] = Split(values["split"]) if values["split"] else None
                values |= {name: tuple(values[name]) for name in ("digests", "views")}
                values["dropped"] = json.loads(values["dropped"]) if values["dropped"] else {}
                yield Row(**values, guards=tuple(islice(guards, count)))

    def shared_guards(self) -> list[Guard]:
        """Guards of the files that all entries depend on."""
        return guards_of(self._files.filter(self._files.column("shared")))

    def revalidate(self, workers: int = 8) -> Changes:
        """Compare every guarded file with its stamp and read again only those that differ."""
        paths = self._files.column("path").to_pylist()
        with ThreadPoolExecutor(workers) as pool:
            # A future a file would cost more than the call it makes.
            parts = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
            now = [stamp for stamps in pool.map(self._stamps, parts) for stamp in stamps]
            stored = zip(*(_numpy(self._files, name).tolist() for name in ("size", "mtime_ns", "inode")), strict=True)
            suspects = [i for i, (new, old) in enumerate(zip(now, stored, strict=True)) if new != Stamp(*old)]
            if not suspects:
                return Changes(manifest=self)
            same = list(pool.map(self._same_content, guards_of(self._files.take(suspects))))
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

    def _row_with(self, entry_id: str, places: Sequence[int]) -> int:
        """The row of an entry that has all these views."""
        row = self._row(entry_id)
        count = len(self._value("digests", row).values)
        wrong = [place for place in places if not 0 <= place < count]
        if wrong:
            raise DataError(
                f"source {self.name!r}: {entry_id!r} has {count} views, not {wrong}; index the source again"
            )
        return row

    def _value(self, name: str, row: int) -> Any:
        return self._entries.column(name)[row]

    def _block(self, row: int, number: int) -> tuple[View, ...]:
        """Views ``number * BLOCK`` and the following ones of a row."""
        if self._value("kind", row).as_py() == "scene":
            return decode_views(self._value("views", row).values[number].as_py(), self.absolute)
        item = decode(self._value("record", row).as_py(), "item", self.absolute)
        assert isinstance(item, Item)
        return tuple(View(image=image) for image in item.images[number * BLOCK : (number + 1) * BLOCK])

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
            files = files.set_column(place, FILES.field(name), pa.array(values, FILES.field(name).type))
        return Manifest(self.facts, self.digest, self._entries, files)


def _digest(classes: tuple[str, ...], entries: pa.Table) -> str:
    total = sha256(json.dumps(["loom3d-manifest", 1, classes]).encode())
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
