"""One fingerprint of the store: the folder that holds the records of one encoder in one configuration.

``identity.json`` (what the fingerprint stands for) · ``<shard>.arrow`` and ``<shard>.idx`` (records and their commit)
· ``index/`` (generations) · ``quarantine.jsonl`` · ``access/`` (one empty file a shard, its time the last use) ·
``tmp/`` (what is being written).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from services.contracts import CacheStats, FeatureKey, Record, Tensor
from services.errors import CacheError
from services.features import codecs, eviction, forks, maintenance
from services.features.codecs import CodecError
from services.features.commits import Commit, read_commit, write_durable
from services.features.index import Index, Place
from services.features.keys import key_array, namespace_identity
from services.features.layout import check_record
from services.features.leases import owner_tag
from services.features.quarantine import WHOLE_SHARD, Quarantine
from services.features.remote import RemoteNamespace
from services.features.sealing import Sealing
from services.features.shards import BadRecordError, BadShardError, Shard, ShardGoneError, WrongKeyError

if TYPE_CHECKING:
    from services.features.store import FeatureStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskStats:
    """What lies on the disk of a namespace."""

    records: int
    shards: int
    nbytes: int
    quarantined: int
    codec_error: dict[str, CodecError]


class Namespace:
    """Records of one fingerprint. Safe for many threads and many processes; pickles as its identity.

    With ``create=False`` (looking at a folder whose identity may not be readable) nothing is written at opening.
    """

    def __init__(
        self,
        store: FeatureStore,
        identity: Mapping[str, Any],
        fingerprint: str,
        *,
        exact: Collection[str] = (),
        create: bool = True,
    ) -> None:
        self.fingerprint = fingerprint
        self.identity = dict(identity)
        self.exact = frozenset(exact)
        """Tensors that no codec touches."""
        self.folder: Path = store.root / fingerprint
        self._store = store
        self._quarantine = Quarantine(self.folder)
        self._remote: RemoteNamespace | None = None
        if create:
            # Reading may work all the same: a store on a read-only file system is of use, and put() will say why.
            with contextlib.suppress(OSError):
                self._prepare()
        if store.tier is not None:
            self._remote = store.tier.namespace(fingerprint, self.folder, self._prepare)
        self._index = Index(self.folder, fingerprint, self._quarantine)
        self._shards: dict[str, Shard] = {}
        self._counts = dict.fromkeys((f.name for f in dataclasses.fields(CacheStats)), 0)
        self._lock = threading.Lock()
        self._sealing = Sealing(
            self.folder,
            fingerprint,
            shard_bytes=store.shard_bytes,
            seal_s=store.seal_s,
            prepare=self._prepare,
            on_commit=self._committed,
            on_failure=store.say_refused,
        )
        forks.reset_in_child(self)

    def after_fork(self) -> None:
        """See services.features.forks."""
        self._lock = threading.Lock()

    # -- reading

    def get(self, key: FeatureKey, into: Mapping[str, np.ndarray] | None = None) -> Record | None:
        """The record of ``key``, or None (a miss, also when what is stored turned out bad).

        With ``into`` (name -> contiguous buffer of the stored dtype and size; bfloat16 as int16) the tensors are
        copied there and verified there; without, they are read-only views that hold the shard open. With
        ``cache.verify=always`` every call checks the bytes; a view is not checked again later. After a miss the
        content of the buffers is undefined.

        Raises:
            CacheError: a buffer in ``into`` is missing or does not fit.
        """
        found = self._local(key.digest, into)
        if found is None and self._index.refresh():
            found = self._local(key.digest, into)
        if found is None and self._remote is not None:
            found = self._from_remote(key.digest, into)
        with self._lock:
            if found is None:
                self._counts["misses"] += 1
                return None
            self._counts["hits"] += 1
            self._counts["bytes_read"] += found[1]
        return found[0]

    def get_many(self, keys: Sequence[FeatureKey], into: Mapping[str, np.ndarray] | None = None) -> list[Record | None]:
        """The records of ``keys``, None for each miss; read in the order in which they lie on the disk.

        ``into[name]`` has one leading axis of at least ``len(keys)``: record i goes to ``into[name][i]``.
        """
        places = self._index.find_many(key_array(keys)) if keys else []
        order = sorted(range(len(keys)), key=lambda i: places[i] or ("", 0))
        result: list[Record | None] = [None] * len(keys)
        for i in order:
            target = {name: buffer[i] for name, buffer in into.items()} if into is not None else None
            place = places[i]
            found = self._read(place, keys[i].digest, target) if place is not None else None
            if found is None:
                result[i] = self.get(keys[i], target)
            else:
                self._count(hits=1, bytes_read=found[1])
                result[i] = found[0]
        return result

    def contains(self, keys: np.ndarray | Sequence[FeatureKey]) -> np.ndarray:
        """Which keys have a committed, good record, here or in the remote tier: (N,) bool.

        ``keys`` is (N, 16) uint8, or a sequence of keys.
        """
        array = keys if isinstance(keys, np.ndarray) else key_array(keys)
        self._index.refresh()
        found = self._index.contains(array)
        if self._remote is not None and not found.all():
            found |= self._remote.contains(array)
        return found

    def keys(self) -> np.ndarray:
        """All keys with a good local record, (n, 16) uint8, sorted."""
        self._index.refresh()
        return self._index.keys()

    # -- writing

    def put(self, key: FeatureKey, record: Mapping[str, Tensor]) -> bool:
        """Write a record; it is visible to readers after its shard is sealed (by size, by age, or by flush).

        Returns False when the record was not taken because the budget is full of what live runs reread. A key that
        is committed already is not written again.

        Raises:
            CacheError: a tensor does not fit its dtype, or the disk or folder refuses. Nothing else is affected:
                the caller has the tensors and may go on.
        """
        checked = check_record(record)
        digest = key.digest
        if self._sealing.pending(digest):
            return True
        if self._index.find(digest) is not None:
            self._sealing.acknowledge(digest)
            return True
        stored, errors = codecs.encode(self._store.codec, checked, self.exact)
        if not self._store.budget.admit(eviction.record_bytes(stored), self.fingerprint):
            self._count(refused=1)
            return False
        self._count(bytes_written=self._sealing.put(digest, stored, errors))
        return True

    def flush(self) -> list[FeatureKey]:
        """Commit what was put, and return the keys committed since the last flush (acknowledged).

        Raises:
            CacheError: a shard could not be committed; its records are not acknowledged.
        """
        return self._sealing.flush()

    def close(self) -> None:
        """Commit what was put, stop the sealing thread and forget the open shards."""
        try:
            self._sealing.close()
        finally:
            self._shards = {}

    def compact(self) -> None:
        """Merge small shards and write a new generation of the index."""
        maintenance.merge_small(self, self._store.shard_bytes)
        self._index.compact()

    # -- looking after it

    @property
    def stats(self) -> CacheStats:
        """Counters of this process."""
        with self._lock:
            return CacheStats(**self._counts)

    @property
    def index(self) -> Index:
        """The index, for maintenance."""
        return self._index

    @property
    def quarantine(self) -> Quarantine:
        """The list of bad records."""
        return self._quarantine

    @property
    def remote(self) -> RemoteNamespace | None:
        """The same fingerprint in the remote tier; None without one."""
        return self._remote

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files on the local disk."""
        return eviction.folder_bytes(self.folder)

    @property
    def open_shards(self) -> dict[str, int]:
        """Shards that this process writes and has not committed, with the bytes they will take, about."""
        return self._sealing.open_shards()

    def disk_stats(self) -> DiskStats:
        """Counts, bytes, and the summed error of the codec, from the commit records."""
        self._index.refresh(force=True)
        errors: dict[str, CodecError] = {}
        names = self._index.shards()
        for commit in self.commits():
            for name, error in commit.codec_error.items():
                errors[name] = errors.get(name, CodecError()) + error
        return DiskStats(
            records=len(self._index),
            shards=len(names),
            nbytes=self.size_bytes,
            quarantined=len(self._quarantine),
            codec_error=errors,
        )

    def commits(self) -> list[Commit]:
        """Commit records of all shards that are there."""
        result = []
        for name in self._index.shards():
            commit = self._index.commit(name)
            if commit is None:
                try:
                    commit = read_commit(self.folder / f"{name}.idx")
                except FileNotFoundError:
                    continue
                except CacheError as error:
                    self.condemn(name, WHOLE_SHARD, "", str(error))
                    continue
            result.append(commit)
        return result

    def open_shard(self, name: str) -> Shard | None:
        """The shard, mapped; None when it is gone or turned out bad."""
        shard = self._shards.get(name)
        if shard is not None:
            return shard
        try:
            shard = Shard(self.folder, name, verify=self._store.verify)
        except ShardGoneError:
            self._index.drop_shard(name)
            return None
        except BadShardError as error:
            self.condemn(name, WHOLE_SHARD, "", str(error))
            return None
        with self._lock:
            while len(self._shards) >= self._store.most_mapped:
                # Views that callers still hold keep their map alive.
                self._shards.pop(next(iter(self._shards)))
            self._shards[name] = shard
        return shard

    def condemn(self, shard: str, row: int, key: str, reason: str) -> None:
        """Quarantine a bad record (or a whole shard) and count it."""
        self._quarantine.add(shard, row, key, reason)
        self._count(corrupt=1)
        if row == WHOLE_SHARD:
            self._shards.pop(shard, None)
            self._index.drop_shard(shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._store, self.identity, self.exact)

    def _local(self, digest: bytes, into: Mapping[str, np.ndarray] | None) -> tuple[Record, int] | None:
        while (place := self._index.find(digest)) is not None:
            # Whatever makes a read fail also takes the place out of the index, so this ends.
            if (found := self._read(place, digest, into)) is not None:
                return found
        return None

    def _read(self, place: Place, digest: bytes, into: Mapping[str, np.ndarray] | None) -> tuple[Record, int] | None:
        if self._quarantine.bad and place in self._quarantine:
            return None
        shard = self._shards.get(place.shard) or self.open_shard(place.shard)
        if shard is None:
            return None
        try:
            found = shard.read(place.row, digest, into)
        except WrongKeyError:
            self._index.distrust()
            return None
        except BadShardError as error:
            self.condemn(place.shard, WHOLE_SHARD, digest.hex(), str(error))
            return None
        except BadRecordError as error:
            self.condemn(place.shard, place.row, digest.hex(), str(error))
            return None
        if time.monotonic() >= shard.next_touch:
            eviction.note_access(self.folder, shard)
        return found

    def _from_remote(self, digest: bytes, into: Mapping[str, np.ndarray] | None) -> tuple[Record, int] | None:
        assert self._remote is not None
        place = self._remote.find(digest)
        if place is None:
            return None
        size = self._remote.shard_bytes(place.shard)
        if self._store.budget.admit(size, self.fingerprint) and self._remote.fetch(place.shard):
            self._index.refresh(force=True)
            return self._local(digest, into)
        return self._remote.read(place, digest, into)

    def _committed(self, _: Commit) -> None:
        """Housekeeping in the sealing thread."""
        self._store.budget.measure_again()
        self._index.refresh()
        if self._remote is not None:
            self._remote.push(self._index.shards())
        if self._index.due():
            maintenance.merge_small(self, self._store.shard_bytes)
            self._index.compact()

    def _prepare(self) -> None:
        """The folders and ``identity.json``; OSError when they cannot be made."""
        for name in ("tmp", "index", "access"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        path = self.folder / "identity.json"
        if not path.exists():
            codec = codecs.codec_label(self._store.codec, self.exact)
            text = json.dumps(namespace_identity(self.identity, codec), indent=1, sort_keys=True)
            temporary = self.folder / "tmp" / f"{os.urandom(8).hex()}.{owner_tag()}.json.tmp"
            write_durable(path, text.encode(), temporary)

    def _count(self, **increments: int) -> None:
        with self._lock:
            for name, value in increments.items():
                self._counts[name] += value


def _reopen(store: FeatureStore, identity: Mapping[str, Any], exact: frozenset[str]) -> Namespace:
    return store.open(identity, exact)
