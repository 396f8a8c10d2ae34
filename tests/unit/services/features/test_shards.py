"""Shards and commit records on the disk: plain Arrow, positions, checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash

from services.contracts import Tensor
from services.errors import CacheError
from services.features import layout
from services.features.commits import decode_commit, encode_commit, read_commit, write_durable
from services.features.shards import BadShardError, Shard, ShardGoneError, WrongKeyError
from tests.support.stores import filled, key_of, record_of


def test_plain_arrow_reads_a_shard(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(7))
    (path,) = namespace.folder.glob("*.arrow")
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        assert reader.num_record_batches == 7
        assert reader.schema.metadata[b"loom3d:fingerprint"].decode() == namespace.fingerprint
        assert reader.schema.field("tokens").metadata[b"loom3d:dtype"] == b"bfloat16"
        table = reader.read_all()
    assert table.num_rows == 7
    found = {}
    for batch in table.to_batches():
        for row in range(batch.num_rows):
            found[batch.column("key")[row].as_py()] = {
                name: layout.tensor_from_row(batch, name, row) for name in ("tokens", "summary")
            }
    for key in keys:
        expected = record_of(key)
        assert np.array_equal(found[key.digest]["tokens"], expected["tokens"].data)
        assert np.array_equal(found[key.digest]["summary"], expected["summary"].data)


def test_bfloat16_bits_are_those_of_torch(tmp_path: Path) -> None:
    _, namespace, _ = filled(tmp_path, ())
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    namespace.put(key_of("t"), {"x": Tensor(data=values.view(torch.int16).numpy(), dtype="bfloat16")})
    namespace.flush()
    record = namespace.get(key_of("t"))
    assert record is not None
    assert torch.equal(torch.from_numpy(record["x"].data.copy()).view(torch.bfloat16), values)


def test_rows_point_at_the_bytes_that_were_hashed(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(5))
    (path,) = namespace.folder.glob("*.arrow")
    commit = read_commit(path.with_suffix(".idx"))
    data = path.read_bytes()
    assert commit.size == len(data)
    assert {row.tobytes() for row in commit.keys} == {key.digest for key in keys}
    for row in commit.rows:
        body = data[int(row["offset"]) : int(row["offset"] + row["nbytes"])]
        assert body[:16] == row["key"].tobytes()
        assert xxhash.xxh3_128_digest(body) == row["checksum"].tobytes()
        assert int(row["offset"]) % 8 == 0
        field = {f.name: f for f in commit.layouts[row["layout"]].fields}["summary"]
        values = np.frombuffer(body, np.float32, field.count, field.offset)
        assert values.tobytes() in body


def test_a_commit_record_survives_its_bytes(tmp_path: Path) -> None:
    _, namespace, _ = filled(tmp_path, range(5))
    (path,) = namespace.folder.glob("*.idx")
    data = path.read_bytes()
    commit = decode_commit(path.stem, data)
    assert encode_commit(commit) == data
    for at in range(0, len(data), 3):
        torn = bytearray(data)
        torn[at] ^= 1
        with pytest.raises(CacheError, match="torn or altered"):
            decode_commit(path.stem, bytes(torn))
        with pytest.raises(CacheError, match="torn or altered"):
            decode_commit(path.stem, data[:at])


def test_a_commit_record_of_another_layout_or_out_of_bounds_is_refused(tmp_path: Path) -> None:
    _, namespace, _ = filled(tmp_path, range(2))
    (path,) = namespace.folder.glob("*.idx")
    data = path.read_bytes()[:-16]
    newer = data.replace(b'"layout_version":1', b'"layout_version":7')
    with pytest.raises(CacheError, match="layout version 7, this program reads 1"):
        decode_commit("x", newer + xxhash.xxh3_128_digest(newer))
    commit = read_commit(path)
    rows = commit.rows.copy()
    rows["offset"][1] = commit.size
    row_bytes = len(rows.tobytes())
    beyond = data[:-row_bytes] + rows.tobytes()
    with pytest.raises(CacheError, match="points outside the shard"):
        decode_commit("x", beyond + xxhash.xxh3_128_digest(beyond))


def test_opening_says_what_is_wrong(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(3))
    (path,) = namespace.folder.glob("*.arrow")
    shard = Shard(namespace.folder, path.stem)
    row = next(i for i in range(3) if shard.key(i) == keys[0].digest)
    assert shard.read(row, keys[0].digest)[1] > 0
    with pytest.raises(WrongKeyError, match=key_of("x").hex()):
        shard.read(row, key_of("x").digest)
    with pytest.raises(WrongKeyError, match="has 3 rows"):
        shard.read(3, keys[0].digest)
    with pytest.raises(ShardGoneError):
        Shard(namespace.folder, "nosuch")
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(BadShardError, match="were committed"):
        Shard(namespace.folder, path.stem)
    with pytest.raises(BadShardError, match="changed its size"):
        shard.read(row, keys[0].digest)
    path.write_bytes(b"")
    with pytest.raises(BadShardError, match="is empty"):
        Shard(namespace.folder, path.stem)


def test_write_durable_leaves_nothing_behind_on_failure(tmp_path: Path) -> None:
    write_durable(tmp_path / "a", b"one", tmp_path / "a.tmp")
    assert (tmp_path / "a").read_bytes() == b"one"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_durable(tmp_path / "folder", b"two", tmp_path / "b.tmp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


def test_non_contiguous_arrays_are_stored_right(tmp_path: Path) -> None:
    _, namespace, _ = filled(tmp_path, ())
    data = np.arange(24, dtype=np.int32).reshape(4, 6)[::2, ::3]
    namespace.put(key_of("v"), {"x": Tensor(data=data, dtype="int32")})
    namespace.flush()
    record = namespace.get(key_of("v"))
    assert record is not None
    assert record["x"].data.tolist() == data.tolist()
