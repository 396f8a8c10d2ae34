"""Benchmarks of the feature store: writing, reading, looking up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infra.bench import baselines
from infra.bench.harness import Bench, Context, Measured, Target, cpu_us, interleave, rate
from services.contracts import FeatureKey, Tensor
from services.features.index import Index
from services.features.namespace import Namespace
from services.features.quarantine import Quarantine
from services.features.segments import Segment, split_keys, write_generation
from services.features.store import FeatureStore

TOKENS, CHANNELS = 1024, 1024
_MB = 1e6


def _records(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits of bfloat16, (count, *shape): what a page holds must not matter, but zeros might be special."""
    return np.random.default_rng(0).integers(-(2**14), 2**14, (count, *shape), dtype=np.int16)


def _keys(count: int, seed: int = 0) -> list[FeatureKey]:
    data = np.random.default_rng(seed).bytes(16 * count)
    return [FeatureKey(data[16 * i : 16 * i + 16]) for i in range(count)]


def _filled(context: Context, records: np.ndarray, verify: str) -> tuple[Namespace, list[FeatureKey]]:
    store = FeatureStore(context.folder / "store", verify=verify)
    context.cleanup.callback(store.close)
    namespace = store.open({"bench": "cache"})
    keys = _keys(len(records))
    for key, record in zip(keys, records, strict=True):
        namespace.put(key, {"tokens": Tensor(data=record, dtype="bfloat16")})
    namespace.flush()
    namespace.compact()
    return namespace, keys


def _torch_buffer(shape: Sequence[int]) -> tuple[Any, dict[str, np.ndarray]]:
    """A reused torch buffer, and the same memory as the store fills it."""
    import torch

    torch.set_num_threads(1)
    buffer = torch.empty(tuple(shape), dtype=torch.bfloat16)
    return buffer, {"tokens": buffer.view(torch.int16).numpy()}


def prepare_write(context: Context) -> Measured:
    """2 MiB records through put and flush, against the same bytes to one file with fsync."""
    records = _records(context.size(16, 2), (TOKENS, CHANNELS))
    repeats = context.size(16, 1)
    store = FeatureStore(context.folder / "store")
    context.cleanup.callback(store.close)
    namespace = store.open({"bench": "write"})
    count = 0

    def write() -> float:
        nonlocal count
        count += 1
        for key, i in zip(_keys(repeats * len(records), seed=count), range(repeats * len(records)), strict=True):
            namespace.put(key, {"tokens": Tensor(data=records[i % len(records)], dtype="bfloat16")})
        if len(namespace.flush()) != repeats * len(records):
            raise RuntimeError("not everything was committed")
        return repeats * records.nbytes / _MB

    def plain() -> float:
        return baselines.write_plain(context.folder / "plain", [*records] * repeats) / _MB

    return Measured(value=rate(write), baseline=rate(plain))


def prepare_sequential(context: Context, verify: str) -> Measured:
    """All records in the order of the disk into one reused torch buffer, against memcpy of one core."""
    records = _records(context.size(256, 4), (TOKENS, CHANNELS))
    namespace, keys = _filled(context, records, verify)
    _, into = _torch_buffer((TOKENS, CHANNELS))
    target = np.empty((TOKENS, CHANNELS), np.int16)

    def read() -> float:
        for key in keys:
            if namespace.get(key, into) is None:
                raise RuntimeError("a record is missing")
        return records.nbytes / _MB

    return Measured(value=rate(read), baseline=rate(lambda: baselines.memcpy(records, target) / _MB))


def prepare_get_2mib(context: Context) -> Measured:
    """Random gets by key, against safetensors by name from a mapped shard.

    safetensors checks nothing, so the value is that of ``cache.verify=off``; the default, which checks every byte,
    stands in ``extra``.
    """
    records = _records(context.size(128, 4), (TOKENS, CHANNELS))
    verified, keys = _filled(context, records, "always")
    namespace = FeatureStore(context.folder / "store", verify="off").open({"bench": "cache"})
    order = np.random.default_rng(1).permutation(len(keys))
    buffer, into = _torch_buffer((TOKENS, CHANNELS))
    shard, names = _safetensors(context, records, order)

    def get(source: Namespace) -> float:
        for i in order:
            if source.get(keys[i], into) is None:
                raise RuntimeError("a record is missing")
        return len(order)

    baseline = rate(lambda: baselines.get_safetensors(shard, names, buffer))

    def extra() -> dict[str, Any]:
        ours, theirs = interleave(rate(lambda: get(verified)), baseline)
        figure = statistics.median(ours)
        return {"verified": round(figure, 1), "verified_ratio": round(figure / statistics.median(theirs), 4)}

    return Measured(value=rate(lambda: get(namespace)), baseline=baseline, extra=extra)


def prepare_get_12kb(context: Context) -> Measured:
    """CPU time of a get of 12 KB, verified, against safetensors by name."""
    shape = (8, 768)
    records = _records(context.size(20_000, 50), shape)
    namespace, keys = _filled(context, records, "always")
    order = np.random.default_rng(1).permutation(len(keys))
    buffer, into = _torch_buffer(shape)
    shard, names = _safetensors(context, records, order)
    shuffled = [keys[i] for i in order]

    def get() -> int:
        for key in shuffled:
            if namespace.get(key, into) is None:
                raise RuntimeError("a record is missing")
        return len(shuffled)

    return Measured(value=cpu_us(get), baseline=cpu_us(lambda: baselines.get_safetensors(shard, names, buffer)))


def prepare_lookup(context: Context, count: int) -> Measured:
    """Median time from a key to its place with ``count`` keys in the index, against sqlite with 1e6 keys."""
    count = context.size(count, 2000)
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * count), np.uint8).reshape(count, 16)
    index = _index_of(context.folder / "namespace", keys)
    rng = np.random.default_rng(1)
    singles = [key.tobytes() for key in keys[rng.integers(0, count, context.size(20_000, 200))]]
    many = keys[rng.integers(0, count, context.size(1_000_000, 1000))]
    stored = keys[: context.size(1_000_000, 2000)]
    connection = baselines.make_sqlite(context.folder / "sqlite", stored)
    context.cleanup.callback(connection.close)
    in_sqlite = [key.tobytes() for key in stored[rng.integers(0, len(stored), len(singles))]]

    def lookup() -> float:
        took = []
        for key in singles:
            start = time.perf_counter_ns()
            place = index.find(key)
            took.append(time.perf_counter_ns() - start)
            if place is None:
                raise RuntimeError("a key is missing")
        return float(np.median(took)) / 1000

    def extra() -> dict[str, Any]:
        start = time.perf_counter()
        found = index.contains(many)
        seconds = time.perf_counter() - start
        if not found.all():
            raise RuntimeError("a key is missing")
        return {"keys": count, "batched_keys_per_s": round(len(many) / seconds), "bytes_per_key": 24}

    return Measured(value=lookup, baseline=lambda: baselines.lookup_sqlite(connection, in_sqlite), extra=extra)


def _index_of(folder: Path, keys: np.ndarray) -> Index:
    """An index that maps one generation, written as a compaction does, over shards that exist by name only."""
    per_shard = 20_000
    (folder / "index").mkdir(parents=True)
    high, low = split_keys(keys)
    order = np.argsort(high)
    rows = np.arange(len(keys), dtype=np.uint32)[order]
    shards = [f"{i:032x}" for i in range(len(keys) // per_shard + 1)]
    for name in shards:
        (folder / f"{name}.arrow").touch()
        (folder / f"{name}.idx").touch()
    segment = Segment(high[order], low[order], rows // per_shard, rows % per_shard, shards)
    write_generation(folder / "index" / "000000000001-bench.gen", segment, folder / "bench.tmp")
    return Index(folder, "bench", Quarantine(folder))


def _safetensors(context: Context, records: np.ndarray, order: np.ndarray) -> tuple[Any, list[str]]:
    """A mapped shard of the same records, and the names in the order of the gets."""
    import torch
    from safetensors.torch import save_file

    path = context.folder / "baseline.safetensors"
    tensors = {f"record-{i}": torch.from_numpy(record).view(torch.bfloat16) for i, record in enumerate(records)}
    save_file(tensors, str(path))
    return baselines.read_safetensors(path), [f"record-{i}" for i in order]


TABLE = [
    Bench(name="cache_write", unit="MB/s", target=Target(on="ratio", op=">=", limit=0.5), prepare=prepare_write),
    Bench(
        name="cache_read_seq",
        unit="MB/s",
        target=Target(on="ratio", op=">=", limit=0.6),
        prepare=lambda context: prepare_sequential(context, "off"),
    ),
    Bench(
        name="cache_read_seq_verified",
        unit="MB/s",
        target=Target(on="ratio", op=">=", limit=0.45),
        prepare=lambda context: prepare_sequential(context, "always"),
    ),
    Bench(
        name="cache_get_2mib",
        unit="records/s",
        target=Target(on="ratio", op=">=", limit=0.9),
        prepare=prepare_get_2mib,
    ),
    Bench(
        name="cache_get_12kb",
        unit="CPU us",
        target=Target(on="value", op="<=", limit=20),
        prepare=prepare_get_12kb,
    ),
    Bench(
        name="key_lookup_1e6",
        unit="us",
        target=Target(on="value", op="<=", limit=10),
        prepare=lambda context: prepare_lookup(context, 10**6),
    ),
    Bench(
        name="key_lookup_1e7",
        unit="us",
        target=Target(on="value", op="<=", limit=10),
        prepare=lambda context: prepare_lookup(context, 10**7),
    ),
]
