"""Commit records: a shard exists for readers if, and only if, a whole ``<shard>.idx`` stands beside it.

Layout of the file, little-endian: magic (8 bytes), length of the header (8), header (JSON: fingerprint, layout
version, number of rows, size of the shard, layouts of the records, error of the codec), padding to 64 bytes, one
row of 56 bytes a record, xxh3_128 of everything before it (16). It is written to a temporary name, synced, and
renamed, after the shard itself: a kill at any instant leaves either both or nothing that a reader would look at.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from services.errors import CacheError
from services.features.codecs import CodecError
from services.features.keys import LAYOUT_VERSION
from services.features.layout import Layout

MAGIC = b"LOOM3DIX"
ROW = np.dtype(
    [
        ("key", "u1", 16),
        ("offset", "<u8"),
        ("nbytes", "<u8"),
        ("layout", "<u4"),
        ("reserved", "<u4"),
        ("checksum", "u1", 16),
    ]
)
ROW_STRUCT = struct.Struct("<16sQQI4x16s")
"""One row: key, offset of the record's body in the shard, its bytes, number of its layout, xxh3_128 of the body."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A valid commit record."""

    shard: str
    """Unique name of the shard, without ending."""
    fingerprint: str
    size: int
    """Bytes of the shard file; a shard of another size is not the one that was committed."""
    rows: np.ndarray
    """(n,) of ``ROW``."""
    layouts: tuple[Layout, ...]
    codec_error: dict[str, CodecError]

    @property
    def keys(self) -> np.ndarray:
        """(n, 16) uint8."""
        return self.rows["key"]


def encode_commit(commit: Commit) -> bytes:
    """The bytes of a commit record."""
    header = json.dumps(
        {
            "layout_version": LAYOUT_VERSION,
            "fingerprint": commit.fingerprint,
            "n": len(commit.rows),
            "size": commit.size,
            "layouts": [layout.to_json() for layout in commit.layouts],
            "codec_error": {name: error.to_json() for name, error in commit.codec_error.items()},
        },
        separators=(",", ":"),
    ).encode()
    start = _rows_at(len(header))
    body = MAGIC + len(header).to_bytes(8, "little") + header
    body += bytes(start - len(body)) + commit.rows.tobytes()
    return body + xxhash.xxh3_128_digest(body)


def decode_commit(shard: str, data: bytes) -> Commit:
    """A commit record from its bytes. CacheError when they are torn, altered or of another layout version."""
    if len(data) < 32 or data[:8] != MAGIC or xxhash.xxh3_128_digest(memoryview(data)[:-16]) != data[-16:]:
        raise CacheError(f"commit record of shard {shard} is torn or altered ({len(data)} bytes)")
    length = int.from_bytes(data[8:16], "little")
    header: dict[str, Any] = json.loads(data[16 : 16 + length])
    if header["layout_version"] != LAYOUT_VERSION:
        raise CacheError(
            f"commit record of shard {shard} has layout version {header['layout_version']}, "
            f"this program reads {LAYOUT_VERSION}"
        )
    rows = np.frombuffer(data, ROW, header["n"], _rows_at(length))
    layouts = tuple(Layout.from_json(item) for item in header["layouts"])
    _check_rows(shard, rows, layouts, header["size"])
    errors = {name: CodecError.from_json(item) for name, item in header["codec_error"].items()}
    return Commit(shard, header["fingerprint"], header["size"], rows, layouts, errors)


def read_commit(path: Path) -> Commit:
    """The commit record in a file. CacheError when it is torn or altered, OSError when it cannot be read."""
    return decode_commit(path.name.removesuffix(".idx"), path.read_bytes())


def write_durable(path: Path, data: bytes, temporary: Path) -> None:
    """Put ``data`` at ``path`` so that it is there whole or not at all, also after a power loss.

    Written to ``temporary`` (same file system), synced, renamed, and the folder synced. OSError passes through,
    the temporary file is removed.
    """
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rows_at(header_length: int) -> int:
    return (16 + header_length + 63) // 64 * 64


def _check_rows(shard: str, rows: np.ndarray, layouts: tuple[Layout, ...], size: int) -> None:
    """A program that wrote nonsense under a right checksum must not make a reader touch memory beyond the map."""
    if not len(rows):
        return
    sizes = np.array([layout.nbytes for layout in layouts], np.uint64)
    if (
        rows["layout"].max() >= len(layouts)
        or (rows["offset"] + rows["nbytes"]).max() > size
        or (rows["nbytes"] != sizes[rows["layout"]]).any()
    ):
        raise CacheError(f"commit record of shard {shard} points outside the shard of {size} bytes")
