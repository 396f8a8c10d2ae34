"""The open shards of one namespace in one process, and the thread that seals them by size or by age.

Sealing waits for the disk; it happens behind the caller's back, so that the next records are written meanwhile. A
record counts as acknowledged when its shard is committed, and only :meth:`Sealing.flush` says so.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from services.contracts import FeatureKey, Tensor
from services.errors import CacheError
from services.features import forks
from services.features.codecs import CodecError
from services.features.commits import Commit
from services.features.layout import signature
from services.features.writer import ShardWriter, kinds

log = logging.getLogger(__name__)

#: Shards that may wait for the disk before ``put`` waits too.
_WAITING = 2


class Sealing:
    """Thread-safe; a forked child starts with no open shard (they stay the parent's).

    Args:
        folder: the namespace.
        prepare: makes the folder ready; called before a shard is opened.
        on_commit: called in the sealing thread after each commit.
        on_failure: called in the sealing thread when a shard could not be committed.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        *,
        shard_bytes: int,
        seal_s: float,
        prepare: Callable[[], None],
        on_commit: Callable[[Commit], None],
        on_failure: Callable[[CacheError], None],
    ) -> None:
        self._folder, self._fingerprint = folder, fingerprint
        self._shard_bytes, self._seal_s = shard_bytes, seal_s
        self._prepare, self._on_commit, self._on_failure = prepare, on_commit, on_failure
        self._reset()
        forks.reset_in_child(self)

    def _reset(self) -> None:
        self._condition = threading.Condition()
        self._open: dict[tuple[tuple[str, str, int], ...], ShardWriter] = {}
        self._queue: deque[ShardWriter] = deque()
        self._sealed_now: list[ShardWriter] = []
        self._pending: set[bytes] = set()
        self._acknowledged: list[bytes] = []
        self._failures: list[CacheError] = []
        self._closing = False
        self._thread: threading.Thread | None = None

    def after_fork(self) -> None:
        """See services.features.forks: the parent's shards and its thread are not ours."""
        self._reset()

    def pending(self, key: bytes) -> bool:
        """Whether the key was put and is not committed yet."""
        return key in self._pending

    def open_shards(self) -> dict[str, int]:
        """Names of shards that are not committed, and the bytes they will take, about."""
        with self._condition:
            writers = [*self._open.values(), *self._queue, *self._sealed_now]
        return {writer.name: writer.size_on_disk for writer in writers}

    def acknowledge(self, key: bytes) -> None:
        """Report a key with the next flush that needed no writing, because it is committed already."""
        with self._condition:
            self._acknowledged.append(key)

    def put(self, key: bytes, record: Mapping[str, Tensor], errors: Mapping[str, CodecError]) -> int:
        """Write a record to the open shard; returns its bytes. CacheError when the disk or the folder refuses."""
        kind = kinds(signature(record))
        with self._condition:
            if self._closing:
                raise CacheError(f"{self._folder}: put after close")
            self._condition.wait_for(lambda: len(self._queue) < _WAITING)
            writer = self._open.get(kind)
            try:
                if writer is None:
                    self._prepare()
                    writer = self._open[kind] = ShardWriter(self._folder, self._fingerprint, signature(record))
                size = writer.append(key, record, errors)
            except OSError as error:
                self._give_up(kind)
                raise disk_error(self._folder, error) from error
            self._pending.add(key)
            if writer.nbytes >= self._shard_bytes:
                self._queue.append(self._open.pop(kind))
            self._wake()
            return size

    def flush(self) -> list[FeatureKey]:
        """Seal everything, wait, and return the keys that were committed since the last flush.

        Raises:
            CacheError: shards could not be committed since the last flush; what was committed is returned by the
                next call.
        """
        with self._condition:
            self._queue.extend(self._open.values())
            self._open.clear()
            self._wake()
            self._condition.wait_for(lambda: not self._queue and not self._sealed_now)
            if self._failures:
                error, self._failures = self._failures[0], []
                raise error
            keys, self._acknowledged = self._acknowledged, []
        return [FeatureKey(key) for key in keys]

    def close(self) -> None:
        """Seal what is open and stop the thread. CacheError as :meth:`flush`."""
        try:
            self.flush()
        finally:
            with self._condition:
                self._closing = True
                thread, self._thread = self._thread, None
                self._condition.notify_all()
            if thread is not None:
                thread.join()

    def _give_up(self, kind: tuple[tuple[str, str, int], ...]) -> None:
        """After a failed write: records of this shard are lost, none was acknowledged."""
        writer = self._open.pop(kind, None)
        if writer is not None:
            self._pending.difference_update(writer.keys)
            writer.abandon()

    def _wake(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            # A daemon, so that a process that forgets close() ends; what is open then was never acknowledged.
            self._thread = threading.Thread(target=self._run, name="loom3d-seal", daemon=True)
            self._thread.start()
        self._condition.notify_all()

    def _run(self) -> None:
        try:
            while (writer := self._next()) is not None:
                self._seal_one(writer)
        finally:
            with self._condition:
                if self._thread is threading.current_thread():
                    # Ended by an error that nobody foresaw: what waits gets another thread.
                    self._thread = None
                    if self._queue:
                        self._wake()

    def _seal_one(self, writer: ShardWriter) -> None:
        # Whatever happens in between, flush() must not wait for ever.
        failure: CacheError | None = CacheError(f"{self._folder}: sealing a shard ended unexpectedly")
        try:
            failure = self._seal(writer)
        finally:
            with self._condition:
                self._sealed_now.remove(writer)
                self._pending.difference_update(writer.keys)
                if failure is None:
                    self._acknowledged += writer.keys
                else:
                    self._failures.append(failure)
                self._condition.notify_all()
            if failure is not None:
                self._on_failure(failure)

    def _seal(self, writer: ShardWriter) -> CacheError | None:
        try:
            commit = writer.seal()
        except OSError as error:
            return disk_error(self._folder, error)
        except CacheError as error:
            return error
        # The commit stands, whatever housekeeping meets.
        try:
            self._on_commit(commit)
        except (OSError, CacheError) as error:
            log.warning("%s: housekeeping after a commit failed: %s", self._folder, error)
        return None

    def _next(self) -> ShardWriter | None:
        """The next shard to seal; waits for one, or for one that grows too old. None when closing."""
        with self._condition:
            while True:
                now = time.monotonic()
                for kind, writer in list(self._open.items()):
                    if now - writer.started >= self._seal_s:
                        self._queue.append(self._open.pop(kind))
                if self._queue:
                    self._sealed_now.append(self._queue.popleft())
                    return self._sealed_now[-1]
                if self._closing:
                    return None
                oldest = min((writer.started for writer in self._open.values()), default=None)
                self._condition.wait(None if oldest is None else max(0.0, oldest + self._seal_s - now))


def disk_error(folder: Path, error: OSError) -> CacheError:
    """What a failed write means to the user."""
    reason = {
        errno.ENOSPC: "the disk is full; free space, set cache.budget_bytes, or run `loom3d features gc`",
        errno.EDQUOT: "the quota is used up; free space or set cache.budget_bytes",
        errno.EROFS: "the file system is read-only; point cache.root at a folder that can be written",
        errno.EACCES: "this user may not write there; point cache.root at a folder that can be written",
        errno.EPERM: "this user may not write there; point cache.root at a folder that can be written",
        errno.EIO: "the disk reports an input/output error",
    }.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
    return CacheError(f"{folder}: a feature shard cannot be written: {reason}")
