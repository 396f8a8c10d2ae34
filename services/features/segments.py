"""A sorted table of keys, and the generation files that hold one: look-ups without parsing and without a tree.

Keys are halves of sha256, so they are evenly spread: where a key lies in the sorted table follows from its first
eight bytes to within a few times the square root of the number of keys. A look-up guesses, and searches a small
window by halves; a table that is not evenly spread (made by hand) falls back to a search of the whole.

A generation file, little-endian: magic (8), length of the header (8), header (JSON: n, names of the shards it
covers), padding to 64, then the columns high (8 bytes a key, the first half as a number), low (8), shard (4), row
(4), and xxh3_128 of all before it: 24 bytes a key. It is derived data, and can be rebuilt from commit records.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import xxhash

from services.errors import CacheError
from services.features.commits import Commit, write_durable

MAGIC = b"LOOM3DGN"
_UNIFORM_BITS = 64


class Segment:
    """Sorted keys with the shard and row of each record. Equal keys stand side by side (duplicates are kept).

    ``alive[i]`` says whether shard ``i`` still exists; it is the only part that changes.
    """

    def __init__(
        self, high: np.ndarray, low: np.ndarray, shard: np.ndarray, row: np.ndarray, shards: Sequence[str]
    ) -> None:
        self.high, self.low, self.shard, self.row = high, low, shard, row
        self.shards = list(shards)
        self.alive = np.ones(len(self.shards), bool)
        self.n = len(high)
        # Five standard deviations of an order statistic of n evenly spread keys are 2.5 sqrt(n).
        self._window = 3 * isqrt(self.n) + 32
        # Plain memory views give Python integers several times faster than numpy's item access.
        self._high, self._low = high.data, low.data

    @classmethod
    def of_commits(cls, commits: Sequence[Commit]) -> Segment:
        """The table of all rows of some shards, in memory."""
        keys = np.concatenate([commit.keys for commit in commits]) if commits else np.zeros((0, 16), np.uint8)
        sizes = [len(commit.rows) for commit in commits]
        shard = np.repeat(np.arange(len(commits), dtype=np.uint32), sizes)
        row = np.concatenate([np.arange(n, dtype=np.uint32) for n in sizes]) if sizes else np.zeros(0, np.uint32)
        high, low = split_keys(keys)
        return cls(*_sorted(high, low, shard, row), [commit.shard for commit in commits])

    @classmethod
    def merged(cls, segments: Sequence[Segment]) -> Segment:
        """One table of several; rows of shards that are gone are left out."""
        parts, shards, base = [], [], 0
        for segment in segments:
            keep = segment.alive[segment.shard]
            number = np.cumsum(segment.alive, dtype=np.uint32) - np.uint32(1) + np.uint32(base)
            parts.append(
                (
                    segment.high[keep],
                    segment.low[keep],
                    number[segment.shard[keep]].astype(np.uint32),
                    segment.row[keep],
                )
            )
            shards += [name for name, alive in zip(segment.shards, segment.alive, strict=True) if alive]
            base = len(shards)
        if not parts:
            return cls.of_commits([])
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return cls(*_sorted(*columns), shards)

    def find(self, high: int, low: int) -> int:
        """Position of the first row of a key, or -1."""
        n = self.n
        guess = (high * n) >> _UNIFORM_BITS
        start, stop = max(0, guess - self._window), min(n, guess + self._window)
        value = np.uint64(high)
        at = start + int(self.high[start:stop].searchsorted(value))
        if (at == start and start > 0) or (at == stop and stop < n):
            at = int(self.high.searchsorted(value))
        while at < n and self._high[at] == high:
            if self._low[at] == low:
                return at
            at += 1
        return -1

    def find_many(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Position of the first row of every key (N,), -1 where there is none; int64."""
        result = np.full(len(high), -1, np.int64)
        if not self.n or not len(high):
            return result
        # In order, neighbouring searches touch neighbouring memory.
        order = np.argsort(high)
        at = np.empty(len(high), np.int64)
        at[order] = self.high.searchsorted(high[order])
        open_ = np.flatnonzero(at < self.n)
        while len(open_):
            same = self.high[at[open_]] == high[open_]
            open_ = open_[same]
            hit = self.low[at[open_]] == low[open_]
            result[open_[hit]] = at[open_[hit]]
            open_ = open_[~hit]
            at[open_] += 1
            open_ = open_[at[open_] < self.n]
        return result

    def same_key(self, at: int) -> bool:
        """Whether the row after ``at`` has the same key."""
        following = at + 1
        return following < self.n and self._high[following] == self._high[at] and self._low[following] == self._low[at]

    def keys(self) -> np.ndarray:
        """Keys of rows whose shard still exists, (n, 16) uint8, sorted; duplicates once."""
        keep = self.alive[self.shard] if self.n else np.zeros(0, bool)
        pairs = np.stack([self.high[keep], self.low[keep]], axis=1).astype(">u8")
        if len(pairs):
            pairs = pairs[np.r_[True, (pairs[1:] != pairs[:-1]).any(axis=1)]]
        return np.ascontiguousarray(pairs).view(np.uint8).reshape(-1, 16)


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys (N, 16) uint8 as two numbers each (N,) uint64, ordered as the bytes are."""
    halves = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2).astype(np.uint64)
    return np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1])


def write_generation(path: Path, segment: Segment, temporary: Path) -> None:
    """Write a generation file durably. OSError when the disk refuses."""
    header = json.dumps({"n": segment.n, "shards": segment.shards}, separators=(",", ":")).encode()
    start = (16 + len(header) + 63) // 64 * 64
    head = MAGIC + len(header).to_bytes(8, "little") + header
    parts = [head + bytes(start - len(head))]
    for column, dtype in ((segment.high, "<u8"), (segment.low, "<u8"), (segment.shard, "<u4"), (segment.row, "<u4")):
        parts.append(np.ascontiguousarray(column, dtype=dtype).tobytes())
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    write_durable(path, b"".join([*parts, hasher.digest()]), temporary)


def read_generation(path: Path) -> Segment:
    """Map a generation file, after checking all of it. CacheError when it is torn or altered."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size < 32:
            raise CacheError(f"index {path} is torn ({size} bytes)")
        data = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    view = memoryview(data)
    if view[:8] != MAGIC or xxhash.xxh3_128_digest(view[:-16]) != view[-16:]:
        raise CacheError(f"index {path} is torn or altered; it will be rebuilt from the commit records")
    length = int.from_bytes(view[8:16], "little")
    header = json.loads(bytes(view[16 : 16 + length]))
    n, at = header["n"], (16 + length + 63) // 64 * 64
    columns: list[np.ndarray] = []
    for dtype in (np.uint64, np.uint64, np.uint32, np.uint32):
        columns.append(np.frombuffer(data, dtype, n, at))
        at += n * np.dtype(dtype).itemsize
    high, low, shard, row = columns
    return Segment(high, low, shard, row, header["shards"])


def _sorted(
    high: np.ndarray, low: np.ndarray, shard: np.ndarray, row: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    # Stable (in numpy a merge of runs for 8-byte numbers): two sorted tables are merged in linear time.
    order = np.argsort(high, kind="stable")
    high, low = high[order], low[order]
    ties = np.flatnonzero(high[1:] == high[:-1])
    if len(ties):
        # Equal first halves are duplicates, almost always; only then the second half matters.
        again = np.lexsort((low, high))
        high, low, order = high[again], low[again], order[again]
    return high, low, shard[order], row[order]
