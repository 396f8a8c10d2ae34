"""Merging small shards and reading everything again: what keeps a store tidy without stopping anybody.

A merge writes a new shard like any other, and removes the old ones only after it is committed, so at every instant
each record is visible at least once. Two processes that merge the same shards leave duplicates, which is allowed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.errors import CacheError
from services.features.commits import Commit
from services.features.eviction import remove_shard
from services.features.quarantine import WHOLE_SHARD
from services.features.shards import BadRecordError
from services.features.writer import ShardWriter, kinds

if TYPE_CHECKING:
    from services.features.namespace import Namespace

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScrubReport:
    """What a full verification found."""

    shards: int = 0
    records: int = 0
    nbytes: int = 0
    bad_records: int = 0
    bad_shards: int = 0

    def __add__(self, other: ScrubReport) -> ScrubReport:
        return ScrubReport(
            shards=self.shards + other.shards,
            records=self.records + other.records,
            nbytes=self.nbytes + other.nbytes,
            bad_records=self.bad_records + other.bad_records,
            bad_shards=self.bad_shards + other.bad_shards,
        )


def scrub(namespace: Namespace) -> ScrubReport:
    """Verify every record of a namespace; bad ones are quarantined and counted."""
    report = ScrubReport()
    namespace.index.refresh(force=True)
    # A shard already condemned is not read again.
    for name in namespace.index.shards():
        before = namespace.stats.corrupt
        shard = namespace.open_shard(name)
        if shard is None:
            report += ScrubReport(bad_shards=namespace.stats.corrupt - before)
            continue
        bad = 0
        for row in range(shard.n):
            if (name, row) not in namespace.quarantine and not shard.verify(row):
                reason = f"{shard.path} row {row} at byte {shard.offset(row)}: checksum does not match"
                namespace.condemn(name, row, shard.key(row).hex(), reason)
                bad += 1
        report += ScrubReport(shards=1, records=shard.n, nbytes=shard.size, bad_records=bad)
    return report


def merge_small(namespace: Namespace, shard_bytes: int) -> int:
    """Merge shards below a quarter of ``shard_bytes``, and those with bad records; returns how many went.

    OSError when the disk refuses; then nothing has changed.
    """
    gone = 0
    for group in _groups(namespace, shard_bytes):
        commit = _merge(namespace, group)
        if commit is None:
            continue
        namespace.index.refresh(force=True)
        if namespace.remote is not None:
            namespace.remote.push([commit.shard])
        for old in group:
            remove_shard(namespace.folder, old.shard)
            if namespace.remote is not None:
                namespace.remote.remove(old.shard)
        gone += len(group)
    if gone:
        namespace.index.refresh(force=True)
        log.info("%s: merged %d small shards", namespace.folder, gone)
    return gone


def _groups(namespace: Namespace, shard_bytes: int) -> list[list[Commit]]:
    """Small shards of the same columns, together at most ``shard_bytes``, at least two each."""
    by_kind: dict[object, list[Commit]] = defaultdict(list)
    for commit in sorted(namespace.commits(), key=lambda commit: commit.size):
        mine = namespace.remote is None or namespace.remote.is_mine(commit.shard)
        if commit.size < shard_bytes // 4 and len(commit.rows) and mine:
            fields = commit.layouts[0].fields
            by_kind[kinds(tuple((f.name, f.dtype, f.shape) for f in fields))].append(commit)
    groups = []
    for commits in by_kind.values():
        group: list[Commit] = []
        size = 0
        for commit in commits:
            if size + commit.size > shard_bytes and group:
                groups.append(group)
                group, size = [], 0
            group.append(commit)
            size += commit.size
        groups.append(group)
    return [group for group in groups if len(group) > 1]


def _merge(namespace: Namespace, group: list[Commit]) -> Commit | None:
    """Write the good records of some shards into one. None when a shard went meanwhile, or nothing is left."""
    writer: ShardWriter | None = None
    seen: set[bytes] = set()
    try:
        for old in group:
            shard = namespace.open_shard(old.shard)
            if shard is None:
                if writer is not None:
                    writer.abandon()
                return None
            for row in range(shard.n):
                if (old.shard, row) in namespace.quarantine or shard.key(row) in seen:
                    continue
                try:
                    key, record = shard.stored(row)
                except BadRecordError as error:
                    namespace.condemn(old.shard, row, shard.key(row).hex(), str(error))
                    continue
                if writer is None:
                    first = tuple((name, tensor.dtype, tensor.data.shape) for name, tensor in record.items())
                    writer = ShardWriter(namespace.folder, namespace.fingerprint, first)
                writer.append(key, record, {})
                seen.add(key)
        if writer is None:
            return None
        for old in group:
            writer.add_errors(old.codec_error)
        return writer.seal()
    except (OSError, CacheError):
        if writer is not None:
            writer.abandon()
        raise


__all__ = ["WHOLE_SHARD", "ScrubReport", "merge_small", "scrub"]
