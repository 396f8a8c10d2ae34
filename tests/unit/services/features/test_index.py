"""Look-ups against a plain dictionary, generations, compaction."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.errors import CacheError
from services.features import index as index_module
from services.features.segments import Segment, read_generation, split_keys, write_generation
from services.features.store import FeatureStore
from tests.support.stores import IDENTITY, filled, key_of, record_of


def _segment(keys: np.ndarray, shards: int = 3) -> Segment:
    high, low = split_keys(keys)
    order = np.lexsort((low, high))
    number = np.arange(len(keys), dtype=np.uint32)[order]
    names = [f"{i:032x}" for i in range(shards)]
    return Segment(high[order], low[order], number % shards, number // shards, names)


def _find(segment: Segment, key: bytes) -> int:
    return segment.find(int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big"))


@pytest.mark.parametrize("n", [0, 1, 2, 100, 50_000])
def test_every_key_is_found_and_no_other(n: int) -> None:
    rng = np.random.default_rng(n)
    keys = rng.integers(0, 256, (n, 16), dtype=np.uint8)
    others = rng.integers(0, 256, (500, 16), dtype=np.uint8)
    segment = _segment(keys)
    sample = keys[: min(n, 2000)]
    for i, key in enumerate(sample):
        at = _find(segment, key.tobytes())
        assert (int(segment.shard[at]), int(segment.row[at])) == (i % 3, i // 3)
    assert all(_find(segment, key.tobytes()) == -1 for key in others)
    at = segment.find_many(*split_keys(np.concatenate([keys, others])))
    assert (at[:n] >= 0).all()
    assert np.array_equal(segment.high[at[:n]], split_keys(keys)[0])
    assert (at[n:] == -1).all()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40))
def test_crowded_and_duplicate_keys(pairs: list[tuple[int, int]]) -> None:
    keys = np.array([list((a << 60).to_bytes(8, "big") + b.to_bytes(8, "big")) for a, b in pairs], np.uint8).reshape(
        -1, 16
    )
    segment = _segment(keys)
    present = {key.tobytes() for key in keys}
    asked = [((a << 60).to_bytes(8, "big") + b.to_bytes(8, "big")) for a in range(7) for b in range(5)]
    many = segment.find_many(*split_keys(np.frombuffer(b"".join(asked), np.uint8).reshape(-1, 16)))
    for key, at in zip(asked, many, strict=True):
        assert (at >= 0) == (key in present)
        assert _find(segment, key) == at
    assert {key.tobytes() for key in segment.keys()} == present  # noqa: SIM118  not a dictionary
    assert len(segment.keys()) == len(present)


def test_merging_leaves_out_what_is_gone() -> None:
    rng = np.random.default_rng(0)
    a, b = (_segment(rng.integers(0, 256, (300, 16), dtype=np.uint8)) for _ in range(2))
    a.alive[1] = False
    merged = Segment.merged([a, b])
    assert merged.n == 500
    assert len(merged.shards) == 5
    assert (np.diff(merged.high.astype(object)) >= 0).all()
    for source in (a, b):
        for i in range(source.n):
            at = merged.find(int(source.high[i]), int(source.low[i]))
            if not source.alive[source.shard[i]]:
                assert at == -1
            else:
                assert merged.shards[merged.shard[at]] == source.shards[source.shard[i]]
                assert merged.row[at] == source.row[i]


def test_a_generation_file_is_checked_wholly(tmp_path: Path) -> None:
    segment = _segment(np.random.default_rng(0).integers(0, 256, (100, 16), dtype=np.uint8))
    path = tmp_path / "a.gen"
    write_generation(path, segment, tmp_path / "a.tmp")
    again = read_generation(path)
    for name in ("high", "low", "shard", "row"):
        assert np.array_equal(getattr(again, name), getattr(segment, name))
    assert again.shards == segment.shards
    data = path.read_bytes()
    assert len(data) < 100 * 24 + 400
    for at in range(0, len(data), 37):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CacheError, match=r"torn or altered"):
            read_generation(path)
    path.write_bytes(data[:20])
    with pytest.raises(CacheError, match="is torn"):
        read_generation(path)


def test_compaction_covers_all_and_leaves_one_generation(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(20))
    for round_ in range(3):
        more = [key_of(f"{round_}-{i}") for i in range(20)]
        for key in more:
            namespace.put(key, record_of(key))
        namespace.flush()
        namespace.compact()
        keys += more
        assert len(list((namespace.folder / "index").iterdir())) == 1
        fresh = FeatureStore(tmp_path).open(IDENTITY)
        assert fresh.index.tail() == (0, 0)
        assert fresh.contains(keys).all()
    assert namespace.index.compact() is None, "nothing new"


def test_a_writer_compacts_by_itself_when_the_tail_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "TAIL_SHARDS", 5)
    namespace = FeatureStore(tmp_path).open(IDENTITY)
    keys = [key_of(i) for i in range(12)]
    for key in keys:
        namespace.put(key, record_of(key))
        namespace.flush()
    assert list((namespace.folder / "index").glob("*.gen"))
    assert namespace.disk_stats().shards < 12, "small shards were merged"
    assert namespace.contains(keys).all()
    assert FeatureStore(tmp_path).open(IDENTITY).contains(keys).all()


def test_duplicates_survive_the_loss_of_one_copy(tmp_path: Path) -> None:
    from services.features.eviction import remove_shard

    key = key_of("twice")
    one = FeatureStore(tmp_path).open(IDENTITY)
    two = FeatureStore(tmp_path).open(IDENTITY)
    for namespace in (one, two):
        namespace.put(key, record_of(key))
    one.flush()
    two.flush()
    names = one.index.shards() if one.index.refresh(force=True) else []
    assert len(names) == 2
    one.index.compact()
    for name in names[:1]:
        remove_shard(one.folder, name)
    for namespace in (one, two, FeatureStore(tmp_path).open(IDENTITY)):
        assert namespace.contains([key]).all()
        assert namespace.get(key) is not None


def test_a_commit_is_seen_within_the_grain_of_time_stamps(tmp_path: Path) -> None:
    reader = FeatureStore(tmp_path).open(IDENTITY)
    writer = FeatureStore(tmp_path).open(IDENTITY)
    for i in range(40):
        key = key_of(i)
        assert reader.get(key) is None
        writer.put(key, record_of(key))
        writer.flush()
        assert reader.contains([key]).all(), i
    # Quiet folders are not read again and again.
    time.sleep(2 * index_module._GRAIN_S)
    reader.index.refresh()
    assert not reader.index.refresh()
