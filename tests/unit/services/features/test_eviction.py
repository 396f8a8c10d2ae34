"""Admission, eviction, collection: what goes, in which order, and what never goes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from services.contracts import FeatureKey
from services.errors import CacheError
from services.features import eviction
from services.features.leases import pinned
from services.features.namespace import Namespace
from services.features.store import FeatureStore
from tests.support.stores import IDENTITY, key_of, record_of, same


def _fill(namespace: Namespace, names: range, tokens: int = 100) -> list[FeatureKey]:
    keys = [key_of(name) for name in names]
    for key in keys:
        assert namespace.put(key, record_of(key, tokens))
    namespace.flush()
    return keys


def _age(root: Path, fingerprint: str, seconds: float) -> None:
    then = time.time() - seconds
    for path in (root / fingerprint).glob("*.idx"):
        os.utime(path, (then, then))


def test_a_budget_of_half_an_epoch_gives_half_the_hits(tmp_path: Path) -> None:
    keys = [key_of(i) for i in range(200)]
    records = {key: record_of(key, tokens=1000) for key in keys}
    epoch_bytes = sum(tensor.data.nbytes for record in records.values() for tensor in record.values())
    store = FeatureStore(tmp_path, budget_bytes=epoch_bytes // 2, shard_bytes=2**20)
    namespace = store.open(IDENTITY)
    rates = []
    with store.lease([namespace.fingerprint]):
        for epoch in range(3):
            hits = 0
            # Another order each epoch, as training has it.
            for key in sorted(keys, key=lambda key: key.digest[epoch:]):
                record = namespace.get(key)
                if record is None:
                    namespace.put(key, records[key])
                else:
                    hits += 1
                    assert same(record, records[key])
            namespace.flush()
            rates.append(hits / len(keys))
            assert eviction.store_bytes(tmp_path) <= epoch_bytes // 2
    assert rates[0] < 0.1
    assert rates[1] >= 0.45
    assert rates[2] >= 0.45
    assert namespace.stats.refused > 0


def test_unpinned_fingerprints_make_room_oldest_first(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, shard_bytes=10_000)
    old, middle, live = (store.open({"version": i}) for i in range(3))
    for namespace, age in ((old, 3000), (middle, 2000), (live, 4000)):
        _fill(namespace, range(20))
        _age(tmp_path, namespace.fingerprint, age)
    store.close()
    used = eviction.store_bytes(tmp_path)
    # Room for the three as they are, and nothing more. The oldest is pinned by a run that lives.
    tight = FeatureStore(tmp_path, budget_bytes=used + 1000, shard_bytes=10_000)
    new = tight.open({"version": 9})
    with tight.lease([live.fingerprint]):
        _fill(new, range(100, 115))
        reader = FeatureStore(tmp_path)
        assert len(reader.open({"version": 2}).keys()) == 20
        assert len(reader.open({"version": 1}).keys()) == 20
        assert len(reader.open({"version": 0}).keys()) < 20
        assert len(new.keys()) == 15
        # More than all unpinned ones together: admission stops, the pinned stay.
        taken = sum(new.put(key_of(i), record_of(key_of(i), 100)) for i in range(200, 400))
        new.flush()
        assert 0 < taken < 200
        assert new.stats.refused == 200 - taken
        assert len(FeatureStore(tmp_path).open({"version": 2}).keys()) == 20
        assert len(new.keys()) == 15 + taken
        assert eviction.store_bytes(tmp_path) <= used + 1000
    tight.close()


def test_within_a_fingerprint_the_least_recently_used_shard_goes(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    namespace = store.open(IDENTITY)
    groups = [_fill(namespace, range(10 * i, 10 * i + 10)) for i in range(4)]
    _age(tmp_path, namespace.fingerprint, 5000)
    assert namespace.get(groups[0][3]) is not None  # stamps its shard
    store.close()
    for _ in range(3):
        assert eviction.evict(tmp_path, 1) > 0
    left = FeatureStore(tmp_path).open(IDENTITY)
    assert [bool(left.contains(group).all()) for group in groups] == [True, False, False, False]


def test_views_outlive_the_eviction_of_their_shard(tmp_path: Path) -> None:
    namespace = FeatureStore(tmp_path).open(IDENTITY)
    keys = _fill(namespace, range(5))
    held = namespace.get(keys[0])
    assert held is not None
    eviction.remove_namespace(namespace.folder)
    assert same(held, record_of(keys[0], 100))
    other = FeatureStore(tmp_path).open(IDENTITY)
    assert other.get(keys[0]) is None
    # The writer whose folder was taken away goes on.
    more = _fill(namespace, range(50, 53))
    assert other.contains(more).all()
    assert (namespace.folder / "identity.json").exists()


def test_a_shard_that_is_evicted_under_a_reader_is_a_miss(tmp_path: Path) -> None:
    namespace = FeatureStore(tmp_path).open(IDENTITY)
    keys = _fill(namespace, range(5))
    other = FeatureStore(tmp_path).open(IDENTITY)
    assert other.contains(keys).all()
    for shard in eviction.shard_files(tmp_path):
        eviction.remove_shard(namespace.folder, shard.name)
    assert other.get_many(keys) == [None] * 5
    assert not other.contains(keys).any()
    assert other.stats.corrupt == 0


def test_gc_keeps_what_it_is_told_and_what_lives(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    kept, pinned, gone = (store.open({"version": i}) for i in range(3))
    for namespace in (kept, pinned, gone):
        _fill(namespace, range(5))
    store.close()
    with store.lease([pinned.fingerprint]):
        infos = {info.fingerprint: info for info in store.namespaces()}
        assert infos[pinned.fingerprint].pinned
        assert infos[gone.fingerprint].identity["identity"] == {"version": 2}
        assert infos[gone.fingerprint].stats.records == 5
        report = store.gc(keep=[kept.fingerprint[:10]])
    assert report.fingerprints == (gone.fingerprint,)
    assert report.shards == 1
    assert report.nbytes > 0
    assert {info.fingerprint for info in store.namespaces()} == {kept.fingerprint, pinned.fingerprint}
    assert store.gc(budget=0).shards == 2


def test_gc_refuses_a_name_that_is_none(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    _fill(store.open({"version": 0}), range(1))
    _fill(store.open({"version": 1}), range(1))
    with pytest.raises(CacheError, match="'zz' is no fingerprint of this store; there are: "):
        store.gc(keep=["zz"])
    with pytest.raises(CacheError, match="begins 2 fingerprints"):
        store.gc(keep=[""])
    assert len(store.namespaces()) == 2


def test_a_lease_is_renewed_and_released(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.lease(["a" * 32], lasts_s=0.06):
        (path,) = (tmp_path / "leases").glob("*.json")
        first = path.read_text()
        deadline = time.monotonic() + 10
        while path.read_text() == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.read_text() != first
        assert pinned(tmp_path) == {"a" * 32}
    assert not list((tmp_path / "leases").iterdir())
