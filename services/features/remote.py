"""The remote tier: any file system that pyarrow knows (a shared folder, S3, GCS), never mapped.

A shard is read whole, verified and placed in the local folder, where it is a shard like any other; when the local
budget is full of what live runs reread, single records are read by range instead.

What is trusted: nothing but a valid commit record. An upload puts the shard, asks for its size, and only then puts
the commit record; names are unique, so nothing is ever overwritten. An object's existence means nothing, because a
stream that an exception closes (or that is collected) publishes what it has so far: a truncated shard without
commit record is invisible, and the next attempt replaces it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from services.contracts import Record
from services.errors import CacheError
from services.features import forks
from services.features.codecs import decode
from services.features.commits import ROW_STRUCT, Commit, decode_commit, encode_commit, read_commit, write_durable
from services.features.index import Place
from services.features.leases import owner_tag
from services.features.segments import Segment, split_keys
from services.features.shards import fill, views
from services.features.writer import read_back

log = logging.getLogger(__name__)

_CHUNK = 8 * 2**20
#: The remote folder is listed at most this often, and after a failure nothing is tried for this long.
REFRESH_S = 10.0
RETRY_S = 10.0


class RemoteTier:
    """A remote root. CacheError when the URI is not understood."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._process = -1
        self._filesystem: Any = None
        self.base = ""
        self._connect()

    @property
    def filesystem(self) -> Any:
        """The pyarrow file system; made anew in a forked child, because its threads are not there."""
        if self._process != os.getpid():
            self._connect()
        return self._filesystem

    def namespace(self, fingerprint: str, folder: Path, prepare: Callable[[], None]) -> RemoteNamespace:
        """A fingerprint of the remote tier, beside its local folder, which ``prepare`` makes ready."""
        return RemoteNamespace(self, fingerprint, folder, prepare)

    def _connect(self) -> None:
        from pyarrow import fs  # slow to import, and most stores have no remote tier

        if "://" not in self.uri and not self.uri.startswith(("/", "~")):
            raise CacheError(f"cache.remote={self.uri!r} is neither an absolute folder nor a URI such as s3://bucket/x")
        try:
            if "://" in self.uri:
                self._filesystem, self.base = fs.FileSystem.from_uri(self.uri)
            else:
                self._filesystem, self.base = fs.LocalFileSystem(), str(Path(self.uri).expanduser())
        except (ValueError, OSError) as error:
            raise CacheError(f"cache.remote={self.uri!r} cannot be used: {error}") from error
        self._process = os.getpid()


class RemoteNamespace:
    """One fingerprint of the remote tier. Thread-safe. A remote that fails is a miss, and says so in the log."""

    def __init__(self, tier: RemoteTier, fingerprint: str, folder: Path, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self.tier, self.fingerprint, self.folder = tier, fingerprint, folder
        self.base = f"{tier.base.rstrip('/')}/{fingerprint}"
        self._lock = threading.RLock()
        self._commits: dict[str, Commit] = {}
        self._segment = Segment.of_commits([])
        self._listed = float("-inf")
        self._retry_at = float("-inf")
        self._mine: set[str] = set()
        # Found altered: shards that are not placed (their good records are read one by one), records that are gone.
        self._unplaceable: set[str] = set()
        self._bad: set[Place] = set()
        self.failures = 0
        """How often the remote could not be reached, or gave something that was not committed."""
        forks.reset_in_child(self)

    def after_fork(self) -> None:
        """See services.features.forks."""
        self._lock = threading.RLock()

    def find(self, key: bytes) -> Place | None:
        """Where a record lies in the remote tier, listing it again if that was long ago."""
        self.refresh()
        segment = self._segment
        at = segment.find(int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big"))
        while at >= 0:
            place = Place(segment.shards[segment.shard[at]], int(segment.row[at]))
            if place not in self._bad:
                return place
            at = at + 1 if segment.same_key(at) else -1
        return None

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which keys (N, 16) uint8 the remote tier holds, (N,) bool."""
        self.refresh()
        segment = self._segment
        at = segment.find_many(*split_keys(keys))
        found = at >= 0
        for i in np.flatnonzero(found) if self._bad else ():
            found[i] = self.find(keys[i].tobytes()) is not None
        return found

    def shard_bytes(self, name: str) -> int:
        """Bytes that placing a shard takes locally."""
        commit = self._commits[name]
        return commit.size + len(commit.rows) * 56

    def is_mine(self, name: str) -> bool:
        """Whether this process uploaded the shard: others' shards are not merged here."""
        return name in self._mine

    def refresh(self, *, force: bool = False) -> None:
        """List the remote folder and read the commit records that are new."""
        now = time.monotonic()
        if not force and now < max(self._listed + REFRESH_S, self._retry_at):
            return
        with self._lock:
            self._listed = now
            with self._failing("listing"):
                self._list()

    def fetch(self, name: str) -> bool:
        """Read a shard, verify all of it and place it locally. False when that did not work."""
        if name in self._unplaceable or time.monotonic() < self._retry_at:
            return False
        with self._lock:
            if (self.folder / f"{name}.idx").exists():
                return True
            with self._failing(f"reading shard {name}"):
                return self._place(name, self._commits[name])
        return False

    def read(self, place: Place, key: bytes, into: Mapping[str, np.ndarray] | None) -> tuple[Record, int] | None:
        """One record by range, verified. None when it cannot be had."""
        commit = self._commits.get(place.shard)
        if commit is None or time.monotonic() < self._retry_at:
            return None
        stored_key, offset, nbytes, number, checksum = ROW_STRUCT.unpack(commit.rows[place.row].tobytes())
        body = b""
        with self._failing(f"reading a record of shard {place.shard}"):
            with self.tier.filesystem.open_input_file(self._path(place.shard, "arrow")) as file:
                body = file.read_at(nbytes, offset)
            if stored_key != key or xxhash.xxh3_128_digest(body) != checksum:
                self._bad.add(place)
                raise CacheError(f"row {place.row} is not what was committed")
        if not body or place in self._bad:
            return None
        record = decode(views(body, commit.layouts[number]))
        return (fill(into, record) if into is not None else record), nbytes

    def push(self, names: Collection[str]) -> int:
        """Upload local shards that the remote tier does not have; returns how many. Failures are tried again with
        the next commit.
        """
        count = 0
        if time.monotonic() < self._retry_at:
            return 0
        with self._lock:
            if not self._commits:
                self.refresh(force=True)
            for name in names:
                if name in self._commits:
                    continue
                with self._failing(f"uploading shard {name}"):
                    self._upload(name)
                    count += 1
                if time.monotonic() < self._retry_at:
                    break
        return count

    def remove(self, name: str) -> None:
        """Remove a shard from the remote tier, commit record first."""
        with self._lock, self._failing(f"removing shard {name}"):
            for ending in ("idx", "arrow"):
                with contextlib.suppress(FileNotFoundError):
                    self.tier.filesystem.delete_file(self._path(name, ending))
            self._commits.pop(name, None)
            self._rebuild()

    def _list(self) -> None:
        from pyarrow import fs

        selector = fs.FileSelector(self.base, allow_not_found=True)
        infos = {info.base_name: info for info in self.tier.filesystem.get_file_info(selector)}
        names = {name[:-4] for name in infos if name.endswith(".idx")}
        changed = False
        for gone in self._commits.keys() - names:
            del self._commits[gone]
            changed = True
        for name in sorted(names - self._commits.keys()):
            with self.tier.filesystem.open_input_stream(self._path(name, "idx")) as stream:
                data = stream.read()
            shard = infos.get(f"{name}.arrow")
            try:
                commit = decode_commit(name, data)
            except CacheError as error:
                # On a shared folder it may be half written; it is read again with the next listing.
                log.info("%s/%s: %s", self.base, name, error)
                continue
            if shard is None or shard.size != commit.size or commit.fingerprint != self.fingerprint:
                log.warning("%s/%s.arrow is not the shard that was committed; it is not used", self.base, name)
                continue
            self._commits[name] = commit
            changed = True
        if changed:
            self._rebuild()

    def _rebuild(self) -> None:
        self._segment = Segment.of_commits(list(self._commits.values()))

    def _place(self, name: str, commit: Commit) -> bool:
        self._prepare()
        temporary = self.folder / "tmp" / f"{name}.{owner_tag()}.arrow.tmp"
        try:
            with (
                self.tier.filesystem.open_input_stream(self._path(name, "arrow")) as source,
                temporary.open("wb") as to,
            ):
                while chunk := source.read(_CHUNK):
                    to.write(chunk)
                to.flush()
                os.fsync(to.fileno())
            try:
                read_back(temporary, commit)
            except (CacheError, ValueError) as error:
                self._unplaceable.add(name)
                raise CacheError(f"it is not what was committed: {error}") from error
            temporary.rename(self.folder / f"{name}.arrow")
            write_durable(
                self.folder / f"{name}.idx",
                encode_commit(commit),
                self.folder / "tmp" / f"{name}.{owner_tag()}.idx.tmp",
            )
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        return True

    def _upload(self, name: str) -> None:
        commit = read_commit(self.folder / f"{name}.idx")
        filesystem = self.tier.filesystem
        if filesystem.type_name == "local":
            filesystem.create_dir(self.base, recursive=True)
        if not self._commits:
            self._put(self.folder / "identity.json", f"{self.base}/identity.json")
        self._put(self.folder / f"{name}.arrow", self._path(name, "arrow"))
        size = filesystem.get_file_info(self._path(name, "arrow")).size
        if size != commit.size:
            raise CacheError(f"it has {size} bytes there, {commit.size} here")
        self._put(self.folder / f"{name}.idx", self._path(name, "idx"))
        self._commits[name] = commit
        self._mine.add(name)
        self._rebuild()

    def _put(self, source: Path, target: str) -> None:
        """Copy a finished local file. The stream is closed only after all of it was written: see the module."""
        stream = self.tier.filesystem.open_output_stream(target)
        with source.open("rb") as file:
            while chunk := file.read(_CHUNK):
                stream.write(chunk)
        stream.close()

    def _path(self, name: str, ending: str) -> str:
        return f"{self.base}/{name}.{ending}"

    @contextlib.contextmanager
    def _failing(self, what: str):  # type: ignore[no-untyped-def]
        """Turn a failure of the remote tier into a warning and a pause."""
        try:
            yield
        except (OSError, CacheError) as error:
            self.failures += 1
            log.warning("remote tier %s: %s failed: %s", self.base, what, error)
            if not isinstance(error, CacheError):
                self._retry_at = time.monotonic() + RETRY_S
