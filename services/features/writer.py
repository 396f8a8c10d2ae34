"""Writing a shard: records go straight to a temporary file, and sealing makes them visible all at once.

The order of the steps is the whole protocol: close and sync the file; read it back and compare every checksum
with that of the bytes that were handed in; rename it; write the commit record the same way. One writer has one
file, names are unique, so any number of writers need no lock and no shared file.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from services.contracts import Tensor
from services.errors import CacheError
from services.features.codecs import CodecError
from services.features.commits import ROW, Commit, encode_commit, sync_folder, write_durable
from services.features.keys import LAYOUT_VERSION
from services.features.layout import Layout, Signature, arrow_schema, measure, record_batch, signature
from services.features.leases import owner_tag

_SMALL = 64 * 1024
_ZEROS = bytes(64)


class ShardWriter:
    """An open shard of one namespace. Not thread-safe: its owner holds a lock.

    ``folder`` is the namespace; the temporary file lies in ``folder/tmp`` under a name that says whose it is, so
    that a sweep can tell the remains of a dead process from the work of a living one.
    """

    def __init__(self, folder: Path, fingerprint: str, first: Signature) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.name = uuid.uuid4().hex
        self.kinds = kinds(first)
        self.started = time.monotonic()
        self.keys: list[bytes] = []
        self._errors: dict[str, CodecError] = {}
        self._rows: list[tuple[bytes, int, int, int, int, bytes]] = []
        self._layouts: dict[Signature, tuple[int, Layout]] = {}
        self._temporary = folder / "tmp" / f"{self.name}.{owner_tag()}.arrow.tmp"
        metadata = {"loom3d:fingerprint": fingerprint, "loom3d:layout": str(LAYOUT_VERSION)}
        self._schema = arrow_schema(first, metadata)
        self._file = _File(self._temporary)
        try:
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), self._schema)
        except OSError:
            self.abandon()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._file.position

    @property
    def size_on_disk(self) -> int:
        """Bytes that the finished shard and its commit record will take, about."""
        return self._file.position + 96 * len(self._rows) + 2048

    def append(self, key: bytes, record: Mapping[str, Tensor], errors: Mapping[str, CodecError]) -> int:
        """Write one checked, coded record; returns its bytes. OSError when the disk refuses: then abandon."""
        of = signature(record)
        batch = record_batch(key, record, self._schema)
        if of not in self._layouts:
            self._layouts[of] = (len(self._layouts), measure(batch, of))
        number, layout = self._layouts[of]
        checksum = _checksum(key, record, batch, layout)
        before = self._file.position
        self._writer.write_batch(batch)
        # A message is its metadata, then the body, which ends it.
        offset = self._file.position - layout.nbytes
        self._rows.append((key, offset, layout.nbytes, number, 0, checksum))
        self.keys.append(key)
        self.add_errors(errors)
        return self._file.position - before

    def add_errors(self, errors: Mapping[str, CodecError]) -> None:
        """Add the error of coded tensors to what the commit record will say."""
        for name, error in errors.items():
            self._errors[name] = self._errors.get(name, CodecError()) + error

    def seal(self) -> Commit:
        """Make the shard durable, check it, and commit it.

        Raises:
            OSError: the disk refused; nothing became visible.
            CacheError: what was read back is not what was written; nothing became visible.
        """
        try:
            self._writer.close()
            self._file.sync()
            commit = Commit(
                self.name,
                self.fingerprint,
                self._file.position,
                self._row_array(),
                tuple(layout for _, layout in self._layouts.values()),
                self._errors,
            )
            read_back(self._temporary, commit)
            self._file.close()
            self._temporary.rename(self.folder / f"{self.name}.arrow")
        except (OSError, CacheError):
            self.abandon()
            raise
        except pa.ArrowException as error:
            self.abandon()
            raise CacheError(f"{self._temporary}: pyarrow cannot finish the shard: {error}") from error
        temporary = self.folder / "tmp" / f"{self.name}.{owner_tag()}.idx.tmp"
        try:
            sync_folder(self.folder)
            write_durable(self.folder / f"{self.name}.idx", encode_commit(commit), temporary)
        except OSError:
            with contextlib.suppress(OSError):
                (self.folder / f"{self.name}.arrow").unlink()
            raise
        return commit

    def abandon(self) -> None:
        """Close and remove the temporary file; nothing of it was ever visible."""
        self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def _row_array(self) -> np.ndarray:
        rows = np.zeros(len(self._rows), ROW)
        for column, values in zip(ROW.names or (), zip(*self._rows, strict=True), strict=True):
            if column in ("key", "checksum"):
                rows[column] = np.frombuffer(b"".join(values), np.uint8).reshape(-1, 16)
            else:
                rows[column] = values
        return rows


class _File(io.RawIOBase):
    """The descriptor under pyarrow's writer: joins small writes, passes big ones on, and is synced on itself.

    pyarrow's own file would hold a buffer in C++ that a forked child flushes into the parent's file when it exits.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._pending = bytearray()
        self._process = os.getpid()
        self.position = 0

    def write(self, data: Any) -> int:
        size = len(data)
        if size < _SMALL:
            self._pending += data
            if len(self._pending) >= _SMALL:
                self._drain()
        else:
            self._drain()
            self._write_all(memoryview(data))
        self.position += size
        return size

    def sync(self) -> None:
        """Everything on the disk, or OSError."""
        self._drain()
        os.fsync(self._descriptor)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        """Nothing: :meth:`sync` is what counts, and a forked child must not write."""

    def close(self) -> None:
        if not self.closed and self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
        super().close()

    def _drain(self) -> None:
        if self._pending:
            self._write_all(memoryview(self._pending))
            self._pending = bytearray()

    def _write_all(self, view: memoryview) -> None:
        if os.getpid() != self._process:
            raise CacheError("a shard that another process opened cannot be written")
        view = view.cast("B")
        while view:
            view = view[os.write(self._descriptor, view) :]


def kinds(of: Signature) -> tuple[tuple[str, str, int], ...]:
    """What records of one shard have in common: names, dtypes and numbers of axes (shapes may differ)."""
    return tuple((name, dtype, len(shape)) for name, dtype, shape in of)


def _checksum(key: bytes, record: Mapping[str, Tensor], batch: pa.RecordBatch, layout: Layout) -> bytes:
    """xxh3_128 of the body as it will be written, from the bytes that were handed in."""
    hasher = xxhash.xxh3_128(key)
    at = 16
    for i, tensor in enumerate(record.values(), start=1):
        column = batch.column(i)
        # Arrow's order within a tensor: offsets, values, shape; each padded to 8 bytes.
        parts = (
            column.field(0).buffers()[1],
            tensor.data.reshape(-1).view(np.uint8).data,
            column.field(1).values.buffers()[1],
        )
        for part in parts:
            size = memoryview(part).nbytes if part is not None else 0
            if size:
                hasher.update(part)
                padding = -size % 8
                hasher.update(_ZEROS[:padding])
                at += size + padding
    if at != layout.nbytes:
        raise CacheError(f"this pyarrow {pa.__version__} lays a record out in {layout.nbytes} bytes, expected {at}")
    return hasher.digest()


def read_back(path: Path, commit: Commit) -> None:
    """Compare every record of a finished file with its checksum, and the footer with the number of records.

    Raises:
        CacheError: says which record is not as it should be.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        if len(mapped) != commit.size:
            raise CacheError(f"{path} has {len(mapped)} bytes after writing {commit.size}")
        with memoryview(mapped) as view:
            for row in commit.rows:
                offset = int(row["offset"])
                with view[offset : offset + int(row["nbytes"])] as body:
                    if xxhash.xxh3_128_digest(body) != row["checksum"].tobytes():
                        raise CacheError(f"{path}: the record at byte {offset} was not written as handed in")
    with pa.memory_map(str(path)) as source:
        found = pa.ipc.open_file(source).num_record_batches
    if found != len(commit.rows):
        raise CacheError(f"{path} lists {found} records after writing {len(commit.rows)}")
