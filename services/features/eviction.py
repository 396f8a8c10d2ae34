"""How much the store may hold, and what goes first.

Over budget, shards of fingerprints that nobody pins go: fingerprint by fingerprint, the one whose last use is
oldest first, and within it the least recently used shards. If that is not enough, admission stops: a live run
rereads all of its features every epoch, and dropping the least recently used of them to make room for others would
leave it with no hits at all, where a full store that stands still answers the same share every epoch.

Ages come from time stamps of files. A stamp in the future (the clock was set back) is set to now, so that it ages
from then on instead of shielding its shard for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.contracts import Tensor
from services.features import forks
from services.features.leases import owner_alive, pinned
from services.features.shards import Shard

log = logging.getLogger(__name__)

#: An access is stamped at most this often for each shard and process.
STAMP_S = 600.0
#: What a dead writer of another machine may have left is swept after this time.
ORPHAN_S = 24 * 3600.0
#: How long a measured size of the store is trusted; others write too.
_USAGE_S = 1.0


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard on the disk."""

    fingerprint: str
    name: str
    nbytes: int
    used: float
    """Unix time of the last use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GcReport:
    """What a collection removed."""

    fingerprints: tuple[str, ...] = ()
    shards: int = 0
    nbytes: int = 0
    orphans: int = 0
    kept_bytes: int = 0


class Budget:
    """Admission and eviction for one store. Thread-safe; processes share nothing but the folder."""

    def __init__(self, root: Path, budget_bytes: int, open_shards: Callable[[], dict[str, int]]) -> None:
        self.root, self.budget_bytes = root, budget_bytes
        # Names and sizes of the shards that this process writes: partly in memory, so the disk does not tell.
        self._open_shards = open_shards
        self._lock = threading.Lock()
        self._used = 0
        self._measured = float("-inf")
        self._full_until = float("-inf")
        forks.reset_in_child(self)

    def after_fork(self) -> None:
        """See services.features.forks."""
        self._lock = threading.Lock()

    def measure_again(self) -> None:
        """The disk is to be asked at the next admission: a shard was committed, whose size was an estimate."""
        self._measured = float("-inf")

    def admit(self, nbytes: int, fingerprint: str) -> bool:
        """Whether ``nbytes`` more may be written for ``fingerprint``; evicts what nobody needs to make room.

        The fingerprint that is being written counts as pinned.
        """
        if self.budget_bytes <= 0:
            return True
        with self._lock:
            now = time.monotonic()
            if now < self._full_until and self._used + nbytes > self.budget_bytes:
                return False
            if now - self._measured > _USAGE_S or self._used + nbytes > self.budget_bytes:
                # By name, so that a shard that is renamed meanwhile is counted once.
                writing = self._open_shards()
                on_disk = sum(folder_bytes(folder, leave_out=writing) for folder in namespace_folders(self.root))
                self._used, self._measured = on_disk + sum(writing.values()), now
            if self._used + nbytes > self.budget_bytes:
                self._used -= evict(self.root, self._used + nbytes - self.budget_bytes, keep={fingerprint})
            if self._used + nbytes > self.budget_bytes:
                self._full_until = time.monotonic() + _USAGE_S
                return False
            self._used += nbytes
            return True


def record_bytes(record: Mapping[str, Tensor]) -> int:
    """Bytes that a record takes on the disk, a little too many: Arrow's and our book-keeping is part of it."""
    return 256 + sum(320 + tensor.data.nbytes for tensor in record.values())


def evict(root: Path, nbytes: int, keep: Collection[str] = ()) -> int:
    """Remove unpinned shards until ``nbytes`` are free, in the order of this module; returns what was freed."""
    safe = pinned(root) | set(keep)
    shards = [shard for shard in shard_files(root) if shard.fingerprint not in safe]
    last_use: dict[str, float] = {}
    for shard in shards:
        last_use[shard.fingerprint] = max(shard.used, last_use.get(shard.fingerprint, 0.0))
    shards.sort(key=lambda shard: (last_use[shard.fingerprint], shard.fingerprint, shard.used))
    freed = 0
    for shard in shards:
        if freed >= nbytes:
            break
        remove_shard(root / shard.fingerprint, shard.name)
        freed += shard.nbytes
    return freed


def remove_shard(folder: Path, name: str) -> None:
    """Remove a shard: first what makes it visible. Who has it mapped keeps it; nobody ever shortens a file."""
    for path in (folder / f"{name}.idx", folder / f"{name}.arrow", folder / "access" / name):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def remove_namespace(folder: Path) -> int:
    """Remove a whole fingerprint, commit records first; returns its bytes."""
    freed = folder_bytes(folder)
    for path in folder.glob("*.idx"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    return freed


def sweep(root: Path, now: float | None = None) -> int:
    """Remove what writers left that died: temporary files, and shards without commit record. Returns how many.

    What belongs to a living process of this machine stays; what cannot be told stays for ``ORPHAN_S``.
    """
    now = time.time() if now is None else now
    count = 0
    for folder in namespace_folders(root):
        for path in _orphans(folder):
            alive = owner_alive(path.name.split(".")[1]) if path.name.endswith(".tmp") else None
            if alive is True:
                continue
            if alive is None and _age(path, now) < ORPHAN_S:
                continue
            with contextlib.suppress(OSError):
                path.unlink()
                count += 1
    return count


def note_access(folder: Path, shard: Shard) -> None:
    """Stamp the use of a shard, and say when the next stamp is due (a reader asks before it calls)."""
    shard.next_touch = time.monotonic() + STAMP_S
    # The stamp is a hint for eviction: a store that cannot be written works without.
    with contextlib.suppress(OSError):
        (folder / "access" / shard.name).touch()


def shard_files(root: Path, now: float | None = None) -> list[ShardFile]:
    """All committed shards of a store with their bytes and last use."""
    now = time.time() if now is None else now
    result = []
    for folder in namespace_folders(root):
        for path in folder.glob("*.idx"):
            name = path.name.removesuffix(".idx")
            try:
                own, nbytes = path.stat(), (folder / f"{name}.arrow").stat().st_size
            except FileNotFoundError:
                continue
            stamp = folder / "access" / name
            used = now - _age(stamp, now) if stamp.exists() else min(own.st_mtime, now)
            result.append(ShardFile(folder.name, name, own.st_size + nbytes, used))
    return result


def namespace_folders(root: Path) -> Iterator[Path]:
    """Folders of the fingerprints below ``root``."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(root.iterdir()):
            if path.is_dir() and len(path.name) == 32:
                yield path


def store_bytes(root: Path) -> int:
    """Bytes of all shards, commit records, indices and files being written."""
    return sum(folder_bytes(folder) for folder in namespace_folders(root))


def folder_bytes(folder: Path, leave_out: Collection[str] = ()) -> int:
    """Bytes of all files below a folder, except those of some shards; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name[:32] in leave_out:
                continue
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118  one call a file
    return total


def _orphans(folder: Path) -> Iterator[Path]:
    yield from folder.glob("tmp/*.tmp")
    commits = {path.stem for path in folder.glob("*.idx")}
    yield from (path for path in folder.glob("*.arrow") if path.stem not in commits)


def _age(path: Path, now: float) -> float:
    """Seconds since the file's stamp; a stamp in the future is set to ``now``."""
    try:
        age = now - path.stat().st_mtime
        if age < 0:
            os.utime(path, (now, now))
    except OSError:
        return 0.0
    return max(age, 0.0)
