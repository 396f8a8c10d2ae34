"""The store as its users see it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from configs.schema import CacheConfig, RunConfig, StorageConfig
from services.contracts import CacheStats, Tensor
from services.errors import CacheError
from services.features.keys import key_array
from services.features.store import FeatureStore
from tests.support.stores import IDENTITY, filled, key_of, record_of, same


def test_put_flush_get_contains(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    namespace = store.open(IDENTITY)
    key = key_of("a")
    assert namespace.get(key) is None
    assert namespace.put(key, record_of(key))
    assert namespace.get(key) is None, "not visible before it is committed"
    assert namespace.flush() == [key]
    assert namespace.flush() == []
    record = namespace.get(key)
    assert record is not None
    assert same(record, record_of(key))
    assert not record["tokens"].data.flags.writeable
    assert namespace.contains([key, key_of("b")]).tolist() == [True, False]
    assert namespace.contains(key_array([key])).tolist() == [True]
    assert namespace.keys().tobytes() == key.digest
    stats = namespace.stats
    assert (stats.hits, stats.misses, stats.corrupt, stats.refused) == (1, 2, 0, 0)
    assert stats.bytes_read > 0
    assert stats.bytes_written > 0
    assert namespace.size_bytes >= stats.bytes_written


def test_records_of_many_shapes_and_dtypes(tmp_path: Path) -> None:
    namespace = FeatureStore(tmp_path).open(IDENTITY)
    rng = np.random.default_rng(0)
    records = {}
    for i in range(30):
        records[key_of(i)] = {
            "tokens": Tensor(data=rng.integers(0, 99, (2, i, 3, 8)).astype(np.int16), dtype="bfloat16"),
            "offsets": Tensor(data=rng.integers(0, 9, (i + 1, 2)), dtype="int64"),
            "mask": Tensor(data=rng.random(i % 3) > 0.5, dtype="bool"),
            "scale": Tensor(data=np.array(i / 3), dtype="float64"),
            "half": Tensor(data=rng.random((1, i % 2)).astype(np.float16), dtype="float16"),
        }
    for key, record in records.items():
        namespace.put(key, record)
    namespace.put(key_of("other columns"), record_of(key_of("other columns")))
    assert len(namespace.flush()) == 31
    assert namespace.disk_stats().shards == 2
    for key, record in records.items():
        buffers = {
            name: np.empty(t.data.shape, np.uint8 if t.dtype == "bool" else t.data.dtype) for name, t in record.items()
        }
        for found in (namespace.get(key), namespace.get(key, buffers)):
            assert found is not None
            assert same(found, record)
        assert all(np.array_equal(buffers[name], record[name].data) for name in record)


def test_get_many_into_one_batch(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(10))
    asked = [keys[7], key_of("missing"), keys[2], keys[7]]
    into = {"tokens": np.zeros((4, 6, 16), np.int16), "summary": np.zeros((4, 2, 16), np.float32)}
    records = namespace.get_many(asked, into)
    assert [record is not None for record in records] == [True, False, True, True]
    for i in (0, 2, 3):
        assert np.array_equal(into["tokens"][i], record_of(asked[i])["tokens"].data)
        assert np.shares_memory(records[i]["tokens"].data, into["tokens"])  # type: ignore[index]
    assert not into["tokens"][1].any()
    assert namespace.get_many([]) == []


def test_sealing_by_age_and_by_size(tmp_path: Path) -> None:
    namespace = FeatureStore(tmp_path, seal_s=0.05, shard_bytes=2**20).open(IDENTITY)
    key = key_of("by age")
    namespace.put(key, record_of(key))
    deadline = time.monotonic() + 20
    while namespace.get(key) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert namespace.get(key) is not None
    assert namespace.flush() == [key]

    namespace = FeatureStore(tmp_path, seal_s=1000, shard_bytes=2000).open(IDENTITY)
    for i in range(50):
        namespace.put(key_of(i), record_of(key_of(i)))
    assert len(namespace.flush()) == 50
    assert namespace.disk_stats().shards > 10


def test_a_committed_key_is_not_written_again(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(5))
    before = namespace.stats.bytes_written
    for key in [*keys, key_of("new"), key_of("new")]:
        assert namespace.put(key, record_of(key))
    assert set(namespace.flush()) == {*keys, key_of("new")}
    assert namespace.disk_stats().records == 6
    assert namespace.stats.bytes_written < 2 * before


def test_many_threads(tmp_path: Path) -> None:
    namespace = FeatureStore(tmp_path, shard_bytes=30_000).open(IDENTITY)
    wrong: list[str] = []

    def work(number: int) -> None:
        for i in range(60):
            key = key_of(f"{number}-{i}")
            namespace.put(key, record_of(key))
            other = key_of(f"{(number + 1) % 4}-{i // 2}")
            record = namespace.get(other)
            if record is not None and not same(record, record_of(other)):
                wrong.append(other.hex())
        namespace.flush()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert namespace.contains([key_of(f"{n}-{i}") for n in range(4) for i in range(60)]).all()
    stats = namespace.stats
    assert stats.hits + stats.misses == 240


def test_pickles_as_its_settings(tmp_path: Path) -> None:
    store, namespace, keys = filled(tmp_path, range(3), verify="first_touch", shard_bytes=12345)
    copy = pickle.loads(pickle.dumps(namespace))
    assert copy.fingerprint == namespace.fingerprint
    assert copy.contains(keys).all()
    again = pickle.loads(pickle.dumps(store))
    assert (again.root, again.verify, again.shard_bytes) == (store.root, "first_touch", 12345)


def test_identity_says_what_a_fingerprint_stands_for(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    one, two = store.open({"layers": [1, 2]}), store.open({"layers": [1, 3]})
    assert one.fingerprint != two.fingerprint
    assert store.open({"layers": [1, 2]}) is one
    text = json.loads((tmp_path / one.fingerprint / "identity.json").read_text())
    assert text == {"identity": {"layers": [1, 2]}, "codec": "none", "layout": 1}


def test_verify_all_counts_every_record(tmp_path: Path) -> None:
    store, namespace, _ = filled(tmp_path, range(20))
    assert (store.verify_all().records, store.verify_all().bad_records) == (20, 0)
    (path,) = namespace.folder.glob("*.arrow")
    row = namespace.commits()[0].rows[3]
    with path.open("r+b") as file:
        file.seek(int(row["offset"]) + 64)
        file.write(b"\xff\x01\xff")
    report = FeatureStore(tmp_path).verify_all()
    assert (report.shards, report.records, report.bad_records, report.bad_shards) == (1, 20, 1, 0)
    assert len(FeatureStore(tmp_path).open(IDENTITY).keys()) == 19
    assert FeatureStore(tmp_path).verify_all().bad_records == 0, "known already"


def test_the_error_of_a_codec_is_reported(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, codec="fp8_e4m3")
    namespace = store.open(IDENTITY)
    assert namespace.fingerprint != FeatureStore(tmp_path).open(IDENTITY).fingerprint
    values = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    key, other = key_of("a"), key_of("b")
    record = {"x": Tensor(data=values, dtype="float32"), "n": Tensor(data=np.arange(3), dtype="int64")}
    namespace.put(key, record)
    namespace.flush()
    namespace.put(other, record)
    namespace.flush()
    found = namespace.get(key)
    assert found is not None
    assert found.keys() == {"x", "n"}
    assert found["x"].dtype == "float32"
    assert found["n"].data.tolist() == [0, 1, 2]
    buffers = {"x": np.zeros((50, 64), np.float32), "n": np.zeros(3, np.int64)}
    namespace.get(key, buffers)
    assert np.array_equal(buffers["x"], found["x"].data)
    for _ in range(2):
        ((name, error),) = namespace.disk_stats().codec_error.items()
        assert name == "x"
        assert error.tokens == 100
        assert 0 < error.cosine_mean < 1e-3
        direct = np.sqrt(((found["x"].data - values) ** 2).sum() / (values**2).sum())
        assert error.relative_rmse == pytest.approx(direct, rel=1e-3)
        namespace.compact()
    assert namespace.disk_stats().shards == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"verify": "sometimes"}, r"cache.verify='sometimes' is unknown; allowed: always, first_touch, off"),
        ({"codec": "int4"}, r"cache.codec='int4' is unknown; allowed: none, fp8_e4m3"),
        ({"budget_bytes": -1}, r"cache.budget_bytes=-1 must be at least 0"),
        ({"shard_bytes": 0}, r"cache.shard_bytes=0"),
        ({"seal_s": 0.0}, r"cache.seal_s=0.0 above 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, settings: dict, match: str) -> None:
    with pytest.raises(CacheError, match=match):
        FeatureStore(tmp_path, **settings)


def test_another_layout_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text('{"layout": 99}')
    with pytest.raises(CacheError, match="layout version 99, this program reads and writes 1"):
        FeatureStore(tmp_path)
    (tmp_path / "layout.json").write_text("nonsense")
    with pytest.raises(CacheError, match="not the mark of a feature store"):
        FeatureStore(tmp_path)


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for root in (file, file / "below"):
        with pytest.raises(CacheError, match="folder is needed"):
            FeatureStore(root)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({}, "without tensors"),
        ({"x": Tensor(data=np.zeros(3, np.float32), dtype="bfloat16")}, "says dtype bfloat16 but holds float32"),
        ({"x": Tensor(data=np.zeros(3, np.complex64), dtype="complex64")}, "dtype 'complex64' cannot be stored"),
    ],
)
def test_records_that_cannot_be_stored(tmp_path: Path, record: dict, match: str) -> None:
    namespace = FeatureStore(tmp_path).open(IDENTITY)
    with pytest.raises(CacheError, match=match):
        namespace.put(key_of("a"), record)


@pytest.mark.parametrize(
    ("into", "match"),
    [
        ({"tokens": np.zeros((6, 16), np.int16)}, "no buffer for tensor 'summary'"),
        ({"tokens": np.zeros((6, 16), np.int16), "summary": np.zeros((2, 16))}, "has dtype float64 and 32 values"),
        ({"tokens": np.zeros((6, 17), np.int16), "summary": np.zeros((2, 16), np.float32)}, "needed are int16, 96"),
    ],
)
def test_buffers_that_do_not_fit(tmp_path: Path, into: dict, match: str) -> None:
    _, namespace, keys = filled(tmp_path, range(1))
    with pytest.raises(CacheError, match=match):
        namespace.get(keys[0], into)


def test_settings_come_from_the_config(tmp_path: Path) -> None:
    config = RunConfig(storage=StorageConfig(root=str(tmp_path)), cache=CacheConfig(seal_s=7.0, verify="off"))
    store = FeatureStore.from_config(config)
    assert (store.root, store.seal_s, store.verify) == (tmp_path / "cache", 7.0, "off")
    elsewhere = RunConfig(storage=StorageConfig(root=str(tmp_path)), cache=CacheConfig(root=str(tmp_path / "x")))
    assert FeatureStore.from_config(elsewhere).root == tmp_path / "x"


def test_close_commits_and_a_closed_namespace_refuses(tmp_path: Path) -> None:
    with FeatureStore(tmp_path) as store:
        namespace = store.open(IDENTITY)
        namespace.put(key_of(1), record_of(key_of(1)))
    assert FeatureStore(tmp_path).open(IDENTITY).contains([key_of(1)]).all()
    with pytest.raises(CacheError, match="put after close"):
        namespace.put(key_of(2), record_of(key_of(2)))
    assert namespace.stats == CacheStats(bytes_written=namespace.stats.bytes_written)


def test_the_store_needs_neither_torch_nor_ray() -> None:
    script = (
        "import sys, services.features.store, services.errors\n"
        "print(sorted({'torch', 'ray', 'transformers', 'hydra'} & sys.modules.keys()))\n"
        "assert services.errors.ModelError in services.errors.USER_ERRORS\n"
    )
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
    assert done.returncode == 0, done.stderr
