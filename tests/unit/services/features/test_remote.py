"""The remote tier on a folder (a shared file system) and on S3 as moto serves it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.errors import CacheError
from services.features import remote
from services.features.remote import RemoteTier
from services.features.store import FeatureStore
from tests.support.stores import IDENTITY, filled, key_of, record_of, same


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of an S3 server on loopback with a bucket."""
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    import boto3

    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="features")
    yield f"127.0.0.1:{port}"
    server.stop()
    patch.undo()


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "shared file system")
    address = request.getfixturevalue("s3")
    return f"s3://features/{tmp_path.name}?endpoint_override={address}&scheme=http&region=us-east-1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "REFRESH_S", 0.0)
    monkeypatch.setattr(remote, "RETRY_S", 0.0)


def _objects(uri: str) -> dict[str, int]:
    from pyarrow import fs

    tier = RemoteTier(uri)
    infos = tier.filesystem.get_file_info(fs.FileSelector(tier.base, recursive=True, allow_not_found=True))
    return {info.path: info.size for info in infos if info.is_file}


def test_one_node_writes_and_another_reads(tmp_path: Path, uri: str) -> None:
    first, _, keys = filled(tmp_path / "a", range(20), remote=uri)
    first.close()
    assert len(_objects(uri)) == 3

    namespace = FeatureStore(tmp_path / "b", remote=uri).open(IDENTITY)
    assert namespace.contains(keys).all()
    assert not namespace.contains([key_of("never")]).any()
    assert namespace.get(key_of("never")) is None
    assert not list(namespace.folder.glob("*.arrow"))
    assert all(same(namespace.get(key), record_of(key)) for key in keys)
    # Placed whole, after the first get: a shard like any other.
    assert len(list(namespace.folder.glob("*.idx"))) == 1
    assert all(FeatureStore(tmp_path / "b").open(IDENTITY).get(key) is not None for key in keys)


def test_what_is_committed_later_is_found(tmp_path: Path, uri: str) -> None:
    namespace = FeatureStore(tmp_path / "b", remote=uri).open(IDENTITY)
    assert namespace.get(key_of(0)) is None
    _, _, keys = filled(tmp_path / "a", range(3), remote=uri)
    assert all(record is not None for record in namespace.get_many(keys))


def test_an_exception_in_the_middle_of_an_upload(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "_CHUNK", 1024)
    real = remote.RemoteNamespace._put
    calls: list[str] = []

    def fail(self: Any, source: Path, target: str) -> None:
        if source.suffix != ".arrow":
            return real(self, source, target)
        calls.append(target)
        # As a lost connection does it: some bytes went through, then the context manager closes the stream.
        with self.tier.filesystem.open_output_stream(target) as stream:
            stream.write(source.read_bytes()[:2048])
            raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteNamespace, "_put", fail)
        store, namespace, keys = filled(tmp_path / "a", range(20), remote=uri)
    assert calls
    assert "connection reset" in caplog.text
    # The truncated object is there, and nobody believes in it.
    assert [size for path, size in _objects(uri).items() if path.endswith(".arrow")] == [2048]
    other = FeatureStore(tmp_path / "b", remote=uri).open(IDENTITY)
    assert not other.contains(keys).any()
    assert other.get(keys[0]) is None
    # Here it was acknowledged all the same, and the next commit brings it up.
    assert namespace.contains(keys).all()
    namespace.put(key_of("next"), record_of(key_of("next")))
    namespace.flush()
    assert all(same(other.get(key), record_of(key)) for key in [*keys, key_of("next")])
    store.close()


@pytest.mark.parametrize("ending", ["arrow", "idx"])
def test_an_altered_object_is_a_miss(tmp_path: Path, uri: str, ending: str) -> None:
    _, namespace, keys = filled(tmp_path / "a", range(10), remote=uri)
    (commit,) = namespace.commits()
    tier = RemoteTier(uri)
    (path,) = (path for path in _objects(uri) if path.endswith(ending))
    with tier.filesystem.open_input_file(path) as file:
        data = bytearray(file.read())
    data[int(commit.rows["offset"][4]) + 50 if ending == "arrow" else 100] ^= 4
    with tier.filesystem.open_output_stream(path) as stream:
        stream.write(bytes(data))
    other = FeatureStore(tmp_path / "b", remote=uri).open(IDENTITY)
    records = [other.get(key) for key in keys]
    good = [same(record, record_of(key)) for key, record in zip(keys, records, strict=True) if record is not None]
    assert all(good)
    # One bad byte costs its record; the others are read one by one. A bad commit record hides the shard.
    assert len(good) == (9 if ending == "arrow" else 0)
    assert not list(other.folder.glob("*.idx"))
    assert not list(other.folder.glob("tmp/*"))


def test_a_budget_full_of_pinned_features_reads_single_records(tmp_path: Path, uri: str) -> None:
    _, _, keys = filled(tmp_path / "a", range(30), remote=uri)
    store = FeatureStore(tmp_path / "b", remote=uri, budget_bytes=4000)
    namespace = store.open(IDENTITY)
    buffers = {"tokens": np.zeros((6, 16), np.int16), "summary": np.zeros((2, 16), np.float32)}
    for key in keys:
        record = namespace.get(key, buffers)
        assert record is not None
        assert same(record, record_of(key))
        assert np.array_equal(buffers["tokens"], record_of(key)["tokens"].data)
    assert not list(namespace.folder.glob("*.arrow"))
    assert namespace.size_bytes < 4000


def test_placed_shards_are_used_least_recently_first(tmp_path: Path) -> None:
    uri = str(tmp_path / "shared")
    writer, _, _ = filled(tmp_path / "a", (), remote=uri)
    groups = []
    for group in range(4):
        _, namespace, keys = filled(tmp_path / "a", [f"{group}-{i}" for i in range(20)], remote=uri)
        groups.append(keys)
    size = max(path.stat().st_size for path in namespace.folder.glob("*.arrow"))
    store = FeatureStore(tmp_path / "b", remote=uri)
    reader = store.open(IDENTITY)
    for keys in groups[:3]:
        assert reader.get(keys[0]) is not None
        time.sleep(0.02)
    assert len(list(reader.folder.glob("*.arrow"))) == 3
    report = FeatureStore(tmp_path / "b").gc(budget=int(2.9 * size))
    assert report.shards >= 1
    left = FeatureStore(tmp_path / "b").open(IDENTITY)
    assert not left.contains(groups[0]).any()
    assert left.contains(groups[2]).all()
    # What went is fetched again.
    assert all(same(reader.get(key), record_of(key)) for key in groups[0])
    writer.close()


def test_merged_shards_replace_small_ones_remotely(tmp_path: Path, uri: str) -> None:
    store = FeatureStore(tmp_path / "a", remote=uri)
    namespace = store.open(IDENTITY)
    keys = [key_of(i) for i in range(6)]
    for key in keys:
        namespace.put(key, record_of(key))
        namespace.flush()
    assert sum(path.endswith(".idx") for path in _objects(uri)) == 6
    other = FeatureStore(tmp_path / "b", remote=uri).open(IDENTITY)
    assert other.contains(keys).all()
    namespace.compact()
    assert sum(path.endswith(".idx") for path in _objects(uri)) == 1
    assert all(same(other.get(key), record_of(key)) for key in keys)


def test_a_remote_that_cannot_be_reached_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    _, namespace, keys = filled(tmp_path / "a", range(3), remote=str(blocked))
    assert namespace.contains(keys).all()
    assert namespace.get(key_of("other")) is None
    assert namespace.remote is not None
    assert namespace.remote.failures > 0
    assert "remote tier" in caplog.text


@pytest.mark.parametrize(
    ("uri", "match"), [("relative/folder", "neither an absolute folder"), ("nosuch://bucket/x", "cannot be used")]
)
def test_a_remote_that_is_no_remote(tmp_path: Path, uri: str, match: str) -> None:
    with pytest.raises(CacheError, match=match):
        FeatureStore(tmp_path, remote=uri)
