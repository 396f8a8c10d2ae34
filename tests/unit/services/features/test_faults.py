"""What the store does when processes die, bytes flip, disks fill and clocks jump."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from services.contracts import FeatureKey, Record, Tensor
from services.errors import CacheError
from services.features import eviction, leases, writer
from services.features.commits import read_commit
from services.features.namespace import Namespace
from services.features.shards import Shard
from services.features.store import FeatureStore
from tests.support.stores import IDENTITY, filled, key_of, record_of, same


def _digests(namespace: Namespace) -> set[bytes]:
    keys = namespace.keys()
    return {key.tobytes() for key in keys}


def _put_and_flush(namespace: Namespace, record: Record, *names: str) -> None:
    for name in names:
        namespace.put(key_of(name), record)
        namespace.flush()


def check_kill_rounds(root: Path, rounds: int, limit_s: float) -> None:
    command = [sys.executable, "-m", "tests.support.stores", str(root), str(rounds)]
    subprocess.run(command, check=True, timeout=limit_s, cwd=Path(__file__).parents[4])
    store = FeatureStore(root)
    namespace = store.open(IDENTITY)
    visible = _digests(namespace)
    acknowledged = set()
    for path in root.glob("acks-*"):
        data = path.read_bytes()
        acknowledged |= {data[i : i + 16] for i in range(0, len(data) - 15, 16)}
    assert len(acknowledged) > rounds, "the writers were killed before they did anything"
    assert acknowledged <= visible
    for digest in visible:
        key = FeatureKey(digest)
        record = namespace.get(key)
        assert record is not None
        assert same(record, record_of(key, tokens=len(record["tokens"].data)))
    assert namespace.stats.corrupt == 0
    assert store.verify_all().bad_records == 0
    # The dead left temporary files; they are known to be dead, so nobody waits a day.
    left = list(namespace.folder.glob("tmp/*.tmp"))
    assert left
    assert store.sweep() >= len(left)
    assert not list(namespace.folder.glob("tmp/*.tmp"))
    # Small shards of all the rounds merge, and nothing is lost on the way.
    shards = namespace.disk_stats().shards
    namespace.compact()
    assert namespace.disk_stats().shards < shards
    assert _digests(namespace) == visible
    fresh = FeatureStore(root).open(IDENTITY)
    assert all(fresh.get(FeatureKey(digest)) is not None for digest in visible)


def test_kill_of_three_concurrent_writers(tmp_path: Path) -> None:
    check_kill_rounds(tmp_path, 20, 120)


@pytest.mark.slow
def test_kill_of_three_concurrent_writers_many_times(tmp_path: Path) -> None:
    check_kill_rounds(tmp_path, 220, 900)


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("into", [False, True])
def test_a_byte_that_flips_after_a_good_read_becomes_a_miss(tmp_path: Path, into: bool) -> None:
    _, namespace, keys = filled(tmp_path, range(5))
    key = keys[2]
    buffers = {"tokens": np.zeros((6, 16), np.int16), "summary": np.zeros((2, 16), np.float32)} if into else None
    first = namespace.get(key, buffers)
    assert first is not None
    assert same(first, record_of(key))
    shard = next(namespace.folder.glob("*.arrow"))
    commit = read_commit(shard.with_suffix(".idx"))
    row = [bytes(k) for k in commit.keys].index(key.digest)
    _flip(shard, int(commit.rows["offset"][row]) + 40)

    assert namespace.get(key, buffers) is None
    assert namespace.stats.corrupt == 1
    assert not namespace.contains([key]).any()
    line = json.loads((namespace.folder / "quarantine.jsonl").read_text())
    assert (line["shard"], line["row"], line["key"]) == (shard.stem, row, key.hex())
    assert "checksum" in line["reason"]
    # Others are untouched, another process knows, and a new copy takes its place.
    assert namespace.contains(keys).sum() == 4
    other = FeatureStore(tmp_path).open(IDENTITY)
    assert not other.contains([key]).any()
    assert namespace.put(key, record_of(key))
    assert namespace.flush() == [key]
    again = namespace.get(key)
    assert again is not None
    assert same(again, record_of(key))
    assert other.get(key) is not None
    # A merge leaves the bad one out.
    namespace.compact()
    assert namespace.disk_stats().records >= 5
    assert namespace.contains(keys).all()


def test_every_flipped_byte_of_a_record_is_found(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(1))
    shard = next(namespace.folder.glob("*.arrow"))
    row = read_commit(shard.with_suffix(".idx")).rows[0]
    for at in range(int(row["offset"]), int(row["offset"] + row["nbytes"]), 7):
        _flip(shard, at)
        assert not Shard(namespace.folder, shard.stem).verify(0), at
        _flip(shard, at)
    assert namespace.get(keys[0]) is not None


def test_verify_off_and_first_touch_say_what_they_do(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(3))
    shard = next(namespace.folder.glob("*.arrow"))
    once = FeatureStore(tmp_path, verify="first_touch").open(IDENTITY)
    assert once.get(keys[0]) is not None
    for row in read_commit(shard.with_suffix(".idx")).rows:
        _flip(shard, int(row["offset"]) + 30)
    assert once.get(keys[0]) is not None
    assert once.get(keys[1]) is None
    assert FeatureStore(tmp_path, verify="off").open(IDENTITY).get(keys[2]) is not None
    assert FeatureStore(tmp_path).open(IDENTITY).get(keys[2]) is None


@pytest.mark.parametrize("opened", [False, True])
def test_a_truncated_shard_is_a_miss_not_a_signal(tmp_path: Path, opened: bool) -> None:
    _, namespace, keys = filled(tmp_path, range(40))
    if opened:
        assert namespace.get(keys[0]) is not None
    path = next(namespace.folder.glob("*.arrow"))
    os.truncate(path, 4096)
    assert namespace.get_many(keys) == [None] * 40
    assert namespace.stats.corrupt == 1
    assert not namespace.contains(keys).any()
    fresh = FeatureStore(tmp_path).open(IDENTITY)
    assert fresh.get(keys[-1]) is None


def test_a_torn_commit_record_hides_its_shard_only(tmp_path: Path) -> None:
    store, namespace, keys = filled(tmp_path, range(10))
    store.close()
    (path,) = namespace.folder.glob("*.idx")
    os.truncate(path, path.stat().st_size - 5)
    _, other, more = filled(tmp_path, range(10, 20))
    assert not other.contains(keys).any()
    assert other.contains(more).all()
    assert other.disk_stats().quarantined == 1


def test_a_stale_or_corrupt_index_is_rebuilt_from_commit_records(tmp_path: Path) -> None:
    store, namespace, keys = filled(tmp_path, range(50))
    namespace.compact()
    (generation,) = (namespace.folder / "index").glob("*.gen")
    good = generation.read_bytes()
    _flip(generation, len(good) // 2)
    other = FeatureStore(tmp_path).open(IDENTITY)
    assert other.contains(keys).all()
    assert all(other.get(key) is not None for key in keys)
    other.compact()
    assert FeatureStore(tmp_path).open(IDENTITY).contains(keys).all()
    os.truncate(next((namespace.folder / "index").glob("*.gen")), 10)
    assert FeatureStore(tmp_path).open(IDENTITY).contains(keys).all()
    store.close()


def test_an_index_that_points_at_other_rows_is_not_believed(tmp_path: Path) -> None:
    from services.features.segments import Segment, read_generation, write_generation

    store, namespace, keys = filled(tmp_path, range(50))
    namespace.compact()
    store.close()
    (path,) = (namespace.folder / "index").glob("*.gen")
    right = read_generation(path)
    wrong = Segment(right.high, right.low, right.shard, np.roll(right.row, 1), right.shards)
    path.unlink()
    write_generation(path, wrong, tmp_path / "x.tmp")
    other = FeatureStore(tmp_path).open(IDENTITY)
    for key in keys:
        record = other.get(key)
        assert record is not None
        assert same(record, record_of(key))
    assert other.stats.corrupt == 0


def test_a_full_disk_is_a_clear_error_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small tmpfs; the injected fault is tested apart")
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        store, namespace, keys = filled(mount, range(20))
        big = {"tokens": Tensor(data=np.ones((300, 512), np.int16), dtype="bfloat16")}
        with pytest.raises(CacheError, match=r"disk is full.*features gc"):
            _put_and_flush(namespace, big, *(f"big {i}" for i in range(10)))
        assert [same(namespace.get(key), record_of(key)) for key in keys] == [True] * 20
        assert not list(namespace.folder.glob("tmp/*"))
        # With space again it goes on.
        for path in namespace.folder.glob("*.idx"):
            commit = read_commit(path)
            if commit.layouts[0].nbytes > 100_000:
                eviction.remove_shard(namespace.folder, path.stem)
        assert namespace.put(key_of("later"), record_of(key_of("later")))
        assert namespace.flush()[-1:] == [key_of("later")]
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_injected_enospc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    _, namespace, keys = filled(tmp_path, range(3))
    real = getattr(os, call)

    def refuse(descriptor: int, *args: object) -> int:
        if "arrow.tmp" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, *args)

    key = key_of("new")
    with monkeypatch.context() as patch:
        patch.setattr(writer.os, call, refuse)
        with pytest.raises(CacheError, match="disk is full"):
            _put_and_flush(namespace, record_of(key, tokens=20_000), "new")
    assert namespace.get(key) is None
    assert not list(namespace.folder.glob("tmp/*"))
    assert namespace.put(key, record_of(key))
    assert namespace.flush() == [key]
    assert namespace.contains(keys).all()


def test_a_write_that_arrives_altered_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, namespace, _ = filled(tmp_path, range(3))
    real = os.write

    def alter(descriptor: int, data: object) -> int:
        changed = bytearray(data)  # type: ignore[call-overload]
        if len(changed) > 100_000:
            changed[50_000] ^= 1
        return real(descriptor, changed)

    key = key_of("new")
    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "write", alter)
        namespace.put(key, record_of(key, tokens=20_000))
        with pytest.raises(CacheError, match="not written as handed in"):
            namespace.flush()
    assert namespace.get(key) is None


def test_a_read_only_folder_can_be_read(tmp_path: Path) -> None:
    store, namespace, _ = filled(tmp_path, range(4))
    store.close()
    script = (
        "import os, sys\n"
        "from services.errors import CacheError\n"
        "from services.features.store import FeatureStore\n"
        "from tests.support.stores import *\n"
        # The interpreter itself may lie where only root can read: everything is imported before.
        "record_of(key_of(0))\n"
        "if os.geteuid() == 0:\n    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)\n"
        "namespace = FeatureStore(sys.argv[1]).open(IDENTITY)\n"
        "assert all(same(namespace.get(key_of(i)), record_of(key_of(i))) for i in range(4))\n"
        "try:\n    namespace.put(key_of(9), record_of(key_of(9)))\n"
        "except CacheError as error:\n    print(error)\n"
    )
    for folder in [tmp_path, *tmp_path.parents]:
        if folder == Path("/tmp"):
            break
        folder.chmod(0o555)
    for folder in namespace.folder.iterdir():
        if folder.is_dir():
            folder.chmod(0o555)
    namespace.folder.chmod(0o555)
    try:
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[4], timeout=60)
    finally:
        for folder in [tmp_path, *tmp_path.parents]:
            if folder == Path("/tmp"):
                break
            folder.chmod(0o755)
        namespace.folder.chmod(0o755)
        for folder in namespace.folder.iterdir():
            if folder.is_dir():
                folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "may not write" in done.stdout
    assert "cache.root" in done.stdout


def test_two_runs_on_one_cache_see_each_other(tmp_path: Path) -> None:
    _, one, first = filled(tmp_path, range(30))
    _, two, second = filled(tmp_path, range(20, 60))
    assert one.contains(second).all()
    assert two.contains(first).all()
    assert all(same(one.get(key), record_of(key)) for key in second)
    one.compact()
    assert all(two.get(key) is not None for key in [*first, *second])
    two.compact()
    assert one.contains([*first, *second]).all()
    assert len(one.keys()) == 60


def test_compaction_and_merging_under_readers(tmp_path: Path) -> None:
    store, namespace, keys = filled(tmp_path, range(40))
    missing: list[str] = []
    stop = threading.Event()

    def read() -> None:
        mine = pickle.loads(pickle.dumps(store)).open(IDENTITY)
        while not stop.is_set():
            for key in keys:
                record = mine.get(key)
                if record is None or not same(record, record_of(key)):
                    missing.append(key.hex())

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(12):
        extra = key_of(f"extra {i}")
        namespace.put(extra, record_of(extra))
        namespace.flush()
        namespace.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert not missing


def test_a_lease_from_the_future_does_not_pin_for_ever(tmp_path: Path) -> None:
    store, namespace, _ = filled(tmp_path, range(3))
    store.close()
    folder = tmp_path / "leases"
    folder.mkdir()
    line = {"fingerprints": [namespace.fingerprint], "lasts_s": 60.0}
    now = time.time()
    elsewhere = {**line, "owner": "00000000-1-1"}
    for renewed, pins in [(now, True), (now + 59, True), (now - 59, True), (now + 1e6, False), (now - 1e6, False)]:
        (folder / "x.json").write_text(json.dumps({**elsewhere, "renewed": renewed}))
        assert (namespace.fingerprint in leases.pinned(tmp_path)) is pins, renewed - now
    # The holder died on this machine: at once, whatever the clock says.
    dead = f"{leases.machine()}-{os.getpid()}-1"
    (folder / "x.json").write_text(json.dumps({**line, "owner": dead, "renewed": now}))
    assert not leases.pinned(tmp_path)
    assert not (folder / "x.json").exists()
    # The holder lives on this machine: even when the clock jumped by years.
    with store.lease([namespace.fingerprint]) as lease:
        assert leases.pinned(tmp_path, now + 1e8) == lease.fingerprints
        assert leases.pinned(tmp_path, now - 1e8) == lease.fingerprints
    assert not leases.pinned(tmp_path)


def test_a_use_stamped_in_the_future_ages_from_now_on(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(3))
    namespace.get(keys[0])
    (stamp,) = (namespace.folder / "access").iterdir()
    now = time.time()
    os.utime(stamp, (now + 1e7, now + 1e7))
    (shard,) = eviction.shard_files(tmp_path)
    assert shard.used <= now + 1
    assert stamp.stat().st_mtime <= now + 1


def test_a_forked_child_reads_and_writes_for_itself(tmp_path: Path) -> None:
    _, namespace, keys = filled(tmp_path, range(3))
    namespace.put(key_of("parent"), record_of(key_of("parent")))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            namespace.put(key_of("child"), record_of(key_of("child")))
            good = namespace.flush() == [key_of("child")] and namespace.get(keys[0]) is not None
            code = 0 if good else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert namespace.flush() == [key_of("parent")]
    assert namespace.contains([key_of("parent"), key_of("child")]).all()


def test_a_sweep_leaves_the_living_alone(tmp_path: Path) -> None:
    store, namespace, _ = filled(tmp_path, range(3))
    namespace.put(key_of("open"), record_of(key_of("open")))
    foreign = namespace.folder / "tmp" / "a.00000000-1-1.arrow.tmp"
    foreign.touch()
    lone = namespace.folder / "lone.arrow"
    lone.touch()
    assert store.sweep() == 0
    old = time.time() - 2 * eviction.ORPHAN_S
    os.utime(foreign, (old, old))
    os.utime(lone, (old, old))
    assert store.sweep() == 2
    assert namespace.flush() == [key_of("open")]


def test_an_unforeseen_error_while_sealing_neither_hangs_nor_stops_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, namespace, keys = filled(tmp_path, range(3))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def broken(self: object) -> None:
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "seal", broken)
        with pytest.raises(CacheError, match="ended unexpectedly"):
            _put_and_flush(namespace, record_of(key_of("a")), "a")
    assert namespace.get(key_of("a")) is None
    _put_and_flush(namespace, record_of(key_of("b")), "b")
    assert namespace.contains([*keys, key_of("b")]).all()


def test_looking_at_a_folder_writes_nothing(tmp_path: Path) -> None:
    store, namespace, _ = filled(tmp_path, range(3))
    store.close()
    (namespace.folder / "identity.json").unlink()
    before = sorted(path.name for path in namespace.folder.rglob("*"))
    (info,) = FeatureStore(tmp_path).namespaces()
    assert (info.identity, info.stats.records) == ({}, 3)
    assert FeatureStore(tmp_path).verify_all().records == 3
    assert sorted(path.name for path in namespace.folder.rglob("*")) == before
