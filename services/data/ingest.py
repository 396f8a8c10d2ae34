"""Ingest: a reader's scenes become rows of a manifest, several at a time, with every file's content named.

A scene that cannot be read is left out with its reason; only when more than a share of them breaks does it end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from services.contracts import ImageRef, Item, Scene, View
from services.data.codec import encode, to_plain
from services.data.digests import Digester, FileDigest, Stamp, digest_file
from services.data.images import image_size
from services.data.manifest import Facts, Manifest
from services.data.readers import Notes, Reader
from services.data.rows import Guard, Row
from services.errors import DataError, QuarantineLimitError

Progress = Callable[[int, int, str], None]
"""Called with how many are done, how many there are, and the id of the last one."""

_BATCH = 256


@dataclass(kw_only=True)
class Ingest:
    """Reads scenes with one reader; counts what it leaves out."""

    reader: Reader
    workers: int = 8
    broken: dict[str, str] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._digester = Digester()

    def rows(self, ids: list[str], progress: Progress | None = None) -> Iterator[Row]:
        """A row for each id that can be read, in order; the others go to ``broken``."""
        done = 0
        with ThreadPoolExecutor(self.workers) as pool:
            for batch in _batches(ids, _BATCH):
                for scene_id, (row, notes, error) in zip(batch, pool.map(self._attempt, batch), strict=True):
                    self.dropped.update(notes.dropped)
                    for reason, path in notes.examples.items():
                        self.examples.setdefault(reason, path)
                    if row is None:
                        self.broken[scene_id] = error
                    else:
                        yield row
                done += len(batch)
                if progress is not None:
                    progress(done, len(ids), batch[-1])

    def _attempt(self, scene_id: str) -> tuple[Row | None, Notes, str]:
        notes = Notes()
        try:
            return self._row(scene_id, notes), notes, ""
        except DataError as error:
            return None, notes, str(error)

    def _row(self, scene_id: str, notes: Notes) -> Row:
        record = self.reader.read(scene_id, notes)
        files = _Files(self.reader.root, self._digester, self.reader.shares_pictures)
        views = record.views if isinstance(record, Scene) else ()
        for view in views:
            check_sizes(view)
        refs = [view.image for view in views] if isinstance(record, Scene) else list(record.images)
        digests = tuple(files.image(ref) for ref in refs)
        others = [files.content(path) for path in _other_paths(record)]
        for path in notes.files:
            files.content(str(path))
        for path in notes.containers:
            files.container(str(path))
        bare, blocks = encode(record, files.relative)
        plain = json.dumps(to_plain(record, lambda _: ""), sort_keys=True).encode()
        return Row(
            id=scene_id,
            kind="scene" if isinstance(record, Scene) else "item",
            split=record.split,
            scene_type=record.scene_type if isinstance(record, Scene) else record.label,
            length=text_length(record),
            digests=digests,
            content=hashlib.sha256(b"".join([hashlib.sha256(plain).digest(), *digests, *others])).digest(),
            record=bare,
            views=blocks,
            guards=tuple(files.guards.values()),
            dropped=dict(notes.dropped),
        )


class _Files:
    """The files that one record names: their digests, and the guards that its row gets."""

    def __init__(self, root: Path, digester: Digester, shared: bool = False) -> None:
        self._root = str(root) + os.sep
        self._digester = digester
        self._shared = shared
        self.guards: dict[str, Guard] = {}

    def relative(self, path: str) -> str:
        """``path`` below the root, or as it is where it lies elsewhere."""
        return path[len(self._root) :] if path.startswith(self._root) else path

    def image(self, ref: ImageRef) -> bytes:
        """Content digest of a picture."""
        if ref.frame is not None:
            self._guard(ref.path, self._digester.file(ref.path))
            return self._digester.image(ref)
        if ref.member is not None:
            # An archive is not hashed as a whole: each member has its digest, and another stamp means reading again.
            self.container(ref.path)
            return self._digester.image(ref)
        if self._shared:
            return self._guard(ref.path, self._digester.file(ref.path))
        return self.content(ref.path)

    def container(self, path: str) -> None:
        """Guard a file by its stamp alone."""
        stamp = Stamp.of(path)
        if stamp is None:
            raise DataError(f"{path}: there is no such file")
        self.guards[path] = Guard(path=self.relative(path), stamp=stamp)

    def content(self, path: str) -> bytes:
        """Content digest of a file; read once a record."""
        known = self.guards.get(path)
        if known is not None and known.digest is not None:
            return known.digest
        return self._guard(path, digest_file(path))

    def _guard(self, path: str, digest: FileDigest) -> bytes:
        self.guards[path] = Guard(path=self.relative(path), stamp=digest.stamp, digest=digest.digest)
        return digest.digest


def index_reader(
    name: str,
    reader: Reader,
    settings: str,
    *,
    max_broken: float,
    previous: Manifest | None = None,
    keep: Iterable[str] = (),
    workers: int = 8,
    progress: Progress | None = None,
) -> Manifest:
    """The manifest of everything that ``reader`` lists.

    Args:
        name: Name of the source in the config.
        reader: The opened source.
        settings: Digest of what the manifest depends on beside the files.
        max_broken: Share of the ids that may be unreadable.
        previous: An older manifest of the same settings.
        keep: Ids whose rows are taken from ``previous`` as they are.
        workers: Threads that read and hash.
        progress: Called after every batch of scenes.

    Raises:
        DataError: There is nothing, or nothing that can be read.
        QuarantineLimitError: More than ``max_broken`` of the ids cannot be read.
    """
    ids = reader.list_ids()
    reader.prepare()
    shared = _Files(reader.root, Digester())
    for path in dict.fromkeys(reader.shared.files):
        shared.content(str(path))
    old = set(keep) if previous is not None else set()
    ingest = Ingest(reader=reader, workers=workers)
    fresh = {row.id: row for row in ingest.rows([i for i in ids if i not in old], progress)}
    _check_share(name, ids, ingest.broken, max_broken)
    kept = {row.id: row for row in previous.rows(i for i in ids if i in old)} if previous is not None else {}
    examples = {**(previous.facts.examples if previous is not None else {}), **ingest.examples}
    facts = Facts(
        name=name,
        root=str(reader.root),
        settings=settings,
        classes=reader.classes(),
        broken=ingest.broken,
        examples=examples,
    )
    rows = (kept.get(i) or fresh[i] for i in ids if i in kept or i in fresh)
    return Manifest.build(facts, rows, tuple(shared.guards.values()))


def check_sizes(view: View) -> None:
    """DataError when the image or its depth map has another size than its intrinsics. Reads headers only."""
    pairs = [(view.image, view.K)]
    if view.depth is not None and not view.depth.path.endswith(".npy"):
        pairs.append((ImageRef(path=view.depth.path), view.depth.K))
    for ref, camera in pairs:
        size = image_size(ref)
        if camera is not None and size != (camera.width, camera.height):
            raise DataError(
                f"{ref.path}: the picture is {size[0]}x{size[1]} but its intrinsics are for "
                f"{camera.width}x{camera.height}"
            )


def text_length(record: Scene | Item) -> int:
    """Tokens of a record for planning before a tokeniser is known: as its source states, else a quarter of its bytes.

    0 for what has no text.
    """
    if isinstance(record, Scene):
        return 0
    if record.tokens and record.turns:
        return record.tokens
    return -(-sum(len(turn.text.encode()) for turn in record.turns) // 4)


def _other_paths(record: Scene | Item) -> list[str]:
    """Paths that a record names beside its images, in a fixed order."""
    if isinstance(record, Item):
        return []
    paths: list[str | None] = [record.mesh_path, record.superpoint_path]
    for view in record.views:
        paths += [view.depth.path if view.depth else None, view.instance_path, view.label_path]
    return [path for path in paths if path is not None]


def _check_share(name: str, ids: list[str], broken: dict[str, str], max_broken: float) -> None:
    if not broken:
        return
    some = "\n  ".join(f"{scene_id}: {reason}" for scene_id, reason in islice(broken.items(), 5))
    if len(broken) == len(ids):
        raise DataError(f"source {name!r}: none of the {len(ids)} scenes or items can be read:\n  {some}")
    if len(broken) > max_broken * len(ids):
        raise QuarantineLimitError(
            f"source {name!r}: {len(broken)} of {len(ids)} scenes or items cannot be read, "
            f"data.max_broken={max_broken} allows {int(max_broken * len(ids))}; repair them or raise it:\n  {some}"
        )


def _batches(ids: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
