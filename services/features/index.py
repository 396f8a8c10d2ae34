"""Key -> place: the newest generation of the index, and in memory the commit records that it does not cover yet.

The folder is read again when a look-up misses and the folder has changed. What was read is published as one
immutable view, so readers take no lock. Every source of truth is a commit record; a generation that is torn,
stale or gone costs time, never a wrong answer: a shard's own rows are compared with the key on every read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from services.errors import CacheError
from services.features import forks
from services.features.commits import Commit, read_commit
from services.features.leases import owner_tag
from services.features.quarantine import WHOLE_SHARD, Quarantine
from services.features.segments import Segment, read_generation, split_keys, write_generation

log = logging.getLogger(__name__)

#: A folder's time stamp has the grain of the kernel's tick: a change within this time of the last is not seen by it.
_GRAIN_S = 0.05
#: Commit records that are not covered by a generation before a writer compacts.
TAIL_SHARDS = 64
TAIL_RECORDS = 131_072


class Place(NamedTuple):
    """Where a record lies."""

    shard: str
    row: int


@dataclass(frozen=True, slots=True)
class _View:
    """What look-ups see: the tail first, because it holds what replaced bad or merged records."""

    segments: tuple[Segment, ...]
    commits: dict[str, Commit]
    generation: str


class Index:
    """The index of one namespace folder. Thread-safe."""

    def __init__(self, folder: Path, fingerprint: str, quarantine: Quarantine) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.quarantine = quarantine
        self._lock = threading.Lock()
        self._stamp = -1
        self._stamp_seen = 0.0
        self._settled = False
        self._bad_generations: set[str] = set()
        self._view = _View((), {}, "")
        forks.reset_in_child(self)
        self.refresh(force=True)

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def find(self, key: bytes) -> Place | None:
        """Where a good record of ``key`` lies, as far as this process has read the folder."""
        high, low = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
        for segment in self._view.segments:
            at = segment.find(high, low) if segment.n else -1
            if at >= 0 and (place := self._good(segment, at)) is not None:
                return place
        return None

    def find_many(self, keys: np.ndarray) -> list[Place | None]:
        """Places of keys (N, 16) uint8."""
        high, low = split_keys(keys)
        result: list[Place | None] = [None] * len(keys)
        open_ = np.arange(len(keys))
        for segment in self._view.segments:
            found = segment.find_many(high[open_], low[open_])
            for i in np.flatnonzero(found >= 0):
                result[open_[i]] = self._good(segment, int(found[i]))
            open_ = np.array([i for i in open_ if result[i] is None], np.int64)
            if not len(open_):
                break
        return result

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys (N, 16) uint8 have a good record; (N,) bool."""
        high, low = split_keys(keys)
        result = np.zeros(len(keys), bool)
        for segment in self._view.segments:
            if not segment.n:
                continue
            at = segment.find_many(high, low)
            found = np.flatnonzero(at >= 0)
            good = segment.alive[segment.shard[at[found]]]
            if len(self.quarantine):
                good &= np.array([self._place(segment, int(at[i])) not in self.quarantine.bad for i in found], bool)
            result[found[good]] = True
            # A duplicate may stand behind a row that is gone: rare, so one by one.
            for i in found[~good]:
                result[i] |= self._good(segment, int(at[i])) is not None
        return result

    def refresh(self, *, force: bool = False) -> bool:
        """Read the folder again if it may have changed; True when it was read."""
        if not force and not self._changed():
            return False
        with self._lock:
            # Read before the folder is listed: what is added meanwhile shows as another stamp next time.
            self._note_stamp()
            self.quarantine.refresh()
            names = self._committed()
            self._view = self._build(names)
        return True

    def distrust(self) -> None:
        """Leave the generation out: it named a row that holds another key. The commit records are read instead."""
        with self._lock:
            if self._view.generation:
                log.warning("index %s of %s is stale and is not used any more", self._view.generation, self.folder)
                self._bad_generations.add(self._view.generation)
                self._view = _View((), self._view.commits, "")
        self.refresh(force=True)

    def drop_shard(self, name: str) -> None:
        """Forget a shard that is not there any more."""
        for segment in self._view.segments:
            for i, shard in enumerate(segment.shards):
                if shard == name:
                    segment.alive[i] = False

    def shards(self) -> list[str]:
        """Names of all shards that are known to exist."""
        return [name for _, name in self._alive()]

    def commit(self, name: str) -> Commit | None:
        """The commit record of a shard of the tail, if it was read already."""
        return self._view.commits.get(name)

    def keys(self) -> np.ndarray:
        """All keys with a good record, (n, 16) uint8, sorted, each once."""
        keys = Segment.merged(self._view.segments).keys()
        return keys[self.contains(keys)] if len(self.quarantine) else keys

    def __len__(self) -> int:
        return int(sum(segment.alive[segment.shard].sum() for segment in self._view.segments if segment.n))

    def tail(self) -> tuple[int, int]:
        """Shards and records that no generation covers."""
        commits = self._view.commits
        return len(commits), sum(len(commit.rows) for commit in commits.values())

    def due(self) -> bool:
        """Whether the tail is long enough to be worth a new generation."""
        shards, records = self.tail()
        covered = sum(segment.n for segment in self._view.segments) - records
        return shards > TAIL_SHARDS or records > max(TAIL_RECORDS, covered // 16)

    def compact(self) -> Path | None:
        """Write a generation that covers every shard known now, and remove older ones.

        Two processes may compact at once: names are unique, and any valid generation is right. Returns its path,
        None when there was nothing to write. OSError when the disk refuses.
        """
        self.refresh(force=True)
        with self._lock:
            view = self._view
            if not view.commits and view.generation and all(s.alive.all() for s in view.segments):
                return None
            segment = Segment.merged(view.segments)
            folder = self.folder / "index"
            folder.mkdir(exist_ok=True)
            older = [path.name for path in folder.glob("*.gen")]
            number = 1 + max((_number(name) for name in older), default=0)
            path = folder / f"{number:012d}-{uuid.uuid4().hex}.gen"
            temporary = self.folder / "tmp" / f"{uuid.uuid4().hex}.{owner_tag()}.gen.tmp"
            write_generation(path, segment, temporary)
        self.refresh(force=True)
        for name in older:
            # Who has it mapped keeps it; who was about to open it takes the newer one.
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        return path

    def _good(self, segment: Segment, at: int) -> Place | None:
        while True:
            shard, row = segment.shards[number := segment.shard[at]], int(segment.row[at])
            if segment.alive[number] and (not self.quarantine.bad or (shard, row) not in self.quarantine):
                return Place(shard, row)
            if not segment.same_key(at):
                return None
            at += 1

    def _place(self, segment: Segment, at: int) -> tuple[str, int]:
        return segment.shards[segment.shard[at]], int(segment.row[at])

    def _alive(self) -> Iterator[tuple[Segment, str]]:
        for segment in self._view.segments:
            for name, alive in zip(segment.shards, segment.alive, strict=True):
                if alive:
                    yield segment, name

    def _changed(self) -> bool:
        try:
            stamp = os.stat(self.folder).st_mtime_ns  # noqa: PTH116  several times faster than Path.stat
        except FileNotFoundError:
            return self._stamp != 0
        return stamp != self._stamp or not self._settled or self.quarantine.refresh()

    def _note_stamp(self) -> None:
        try:
            stamp = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        now = time.monotonic()
        if stamp != self._stamp:
            self._stamp, self._stamp_seen = stamp, now
        # Time that passed here since the stamp was first seen: needs no agreement of clocks.
        self._settled = now - self._stamp_seen > _GRAIN_S

    def _committed(self) -> set[str]:
        """Names of shards of which both files are there."""
        arrows, commits = set(), set()
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.endswith(".idx"):
                        commits.add(name[:-4])
                    elif name.endswith(".arrow"):
                        arrows.add(name[:-6])
        except FileNotFoundError:
            return set()
        return arrows & commits

    def _build(self, names: set[str]) -> _View:
        old = self._view
        generation, name = self._newest_generation(old)
        covered: set[str] = set()
        if generation is not None:
            covered = set(generation.shards)
            generation.alive[:] = [
                shard in names and (shard, WHOLE_SHARD) not in self.quarantine.bad for shard in generation.shards
            ]
        commits: dict[str, Commit] = {}
        for shard in sorted(names - covered):
            if (shard, WHOLE_SHARD) in self.quarantine.bad:
                continue
            commit = old.commits.get(shard) or self._read(shard)
            if commit is not None:
                commits[shard] = commit
        if commits.keys() == old.commits.keys() and name == old.generation and old.segments:
            tail = old.segments[0]
        else:
            tail = Segment.of_commits(list(commits.values()))
        return _View((tail, generation) if generation is not None else (tail,), commits, name)

    def _newest_generation(self, old: _View) -> tuple[Segment | None, str]:
        folder = self.folder / "index"
        try:
            names = sorted((p.name for p in folder.iterdir() if p.name.endswith(".gen")), key=_order, reverse=True)
        except FileNotFoundError:
            names = []
        for name in names:
            if name == old.generation:
                return old.segments[1], name
            if name in self._bad_generations:
                continue
            try:
                return read_generation(folder / name), name
            except FileNotFoundError:
                continue
            except CacheError as error:
                log.warning("%s", error)
                self._bad_generations.add(name)
        return None, ""

    def _read(self, shard: str) -> Commit | None:
        try:
            commit = read_commit(self.folder / f"{shard}.idx")
            size = (self.folder / f"{shard}.arrow").stat().st_size
        except FileNotFoundError:
            return None
        except CacheError as error:
            self.quarantine.add(shard, WHOLE_SHARD, "", str(error))
            return None
        if size != commit.size or commit.fingerprint != self.fingerprint:
            reason = (
                f"shard {shard} of {commit.fingerprint} has {size} bytes; committed were {commit.size}, "
                f"the folder is {self.fingerprint}"
            )
            self.quarantine.add(shard, WHOLE_SHARD, "", reason)
            return None
        return commit


def _number(name: str) -> int:
    head = name.partition("-")[0]
    return int(head) if head.isdigit() else 0


def _order(name: str) -> tuple[int, str]:
    return _number(name), name
