"""Content digests: what names a picture, wherever it lies and whenever it was written.

An image file is named by the sha256 of its bytes, a member of an archive by that of its own bytes, a frame of a video
by the file's digest, the frame's index and the decoder's version (another decoder may give other pixels).
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from services.contracts import ImageRef
from services.data.images import read_bytes
from services.data.videos import decoder_version
from services.errors import DataError


@dataclass(frozen=True, slots=True)
class Stamp:
    """What guards a file's digest: if none of the three numbers changed, the content is taken to be the same."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> Stamp | None:
        """The stamp of a file as it is now; None when there is none."""
        try:
            stat = os.stat(path)  # noqa: PTH116 - called for millions of files; Path costs more than the call
        except OSError:
            return None
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True, slots=True)
class FileDigest:
    """sha256 (32 bytes) of a file and the stamp it had when it was read."""

    stamp: Stamp
    digest: bytes


def digest_file(path: str | Path) -> FileDigest:
    """Read and hash a file, or the names in a folder.

    DataError when it is missing, unreadable, or changed while it was read.
    """
    before = Stamp.of(path)
    if before is None:
        raise DataError(f"{path}: there is no such file")
    try:
        if Path(path).is_dir():
            names = sorted(os.listdir(path))  # noqa: PTH208 - names are wanted, not paths
            digest = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).digest()
        else:
            with Path(path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if Stamp.of(path) != before:
        raise DataError(f"{path}: changed while it was read; index again when nothing writes to it")
    return FileDigest(before, digest)


class Digester:
    """Hashes each file once, however many threads ask for it (a video is asked for by each of its frames)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, Future[FileDigest]] = {}

    def file(self, path: str) -> FileDigest:
        """Digest and stamp of the whole file."""
        with self._lock:
            future = self._files.get(path)
            mine = future is None
            if future is None:
                future = self._files[path] = Future()
        if mine:
            try:
                future.set_result(digest_file(path))
            except DataError as error:
                future.set_exception(error)
        return future.result()

    def image(self, ref: ImageRef) -> bytes:
        """Content digest (32 bytes) of one picture."""
        if ref.frame is not None:
            whole = self.file(ref.path).digest
            return hashlib.sha256(b"%s frame %d %s" % (whole, ref.frame, decoder_version().encode())).digest()
        if ref.member is not None:
            return hashlib.sha256(read_bytes(ref)).digest()
        return self.file(ref.path).digest


def content_digest(ref: ImageRef) -> str:
    """Content digest of one picture in hexadecimal, the same as in a manifest's entries."""
    return Digester().image(ref).hex()
