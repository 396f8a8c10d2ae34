"""Reading a committed shard: the file is mapped once, and a get is pointer arithmetic, a checksum and a copy.

What is verified is what the caller gets: with ``into`` the bytes are hashed after they were copied into the
caller's buffer, so that nothing that happens to the file between the two can go unnoticed. Without ``into`` the
caller gets read-only views of the map.

A mapped file that shrinks kills the process that touches the lost pages (SIGBUS). Nothing in this project ever
shrinks a shard; against other hands the size is compared with the commit record when the shard is opened and again
(one fstat) before every access.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from services.contracts import Record, Tensor
from services.errors import CacheError
from services.features.codecs import decode, is_coded
from services.features.commits import ROW_STRUCT, read_commit
from services.features.layout import Layout

Buffer = mmap.mmap | bytes | memoryview
VERIFY = ("always", "first_touch", "off")
#: Bytes copied, then hashed while they are still in the cache of the core. Copies without a hash gain by it too: a
#: large one would bypass the cache, from which the reader of the buffer wants its bytes.
_CHUNK = 512 * 1024


class BadRecordError(CacheError):
    """A record's bytes are not those that were committed. Becomes a miss; never leaves the store."""


class BadShardError(BadRecordError):
    """No record of the shard can be trusted: truncated, or its commit record is torn."""


class WrongKeyError(BadRecordError):
    """The row holds another key than the index said: the index is stale, the shard is fine."""


class ShardGoneError(CacheError):
    """The shard was removed (evicted, merged) since the index was read. Becomes a miss or another look-up."""


class Shard:
    """One committed shard, mapped read-only.

    Raises on opening:
        ShardGoneError: one of the two files is not there any more.
        BadShardError: the size is not the committed one, or the commit record is torn.
    """

    def __init__(self, folder: Path, name: str, *, verify: str = "always") -> None:
        self.name = name
        self.path = folder / f"{name}.arrow"
        try:
            commit = read_commit(folder / f"{name}.idx")
            self._map, self.size = _map(self.path)
        except FileNotFoundError as error:
            raise ShardGoneError(f"{self.path} was removed") from error
        except CacheError as error:
            raise BadShardError(str(error)) from error
        if self.size != commit.size:
            raise BadShardError(f"{self.path} has {self.size} bytes, {commit.size} were committed")
        self.commit = commit
        self.n = len(commit.rows)
        self.next_touch = 0.0
        """Monotonic time after which an access is stamped again; see services.features.eviction."""
        self._rows = memoryview(commit.rows.tobytes())
        self._layouts = commit.layouts
        self._coded = [any(is_coded(f.dtype) for f in layout.fields) for layout in commit.layouts]
        self._view = memoryview(self._map)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._always = verify == "always"
        self._seen = bytearray(self.n) if verify == "first_touch" else None

    def key(self, row: int) -> bytes:
        """The 16 bytes of the key at ``row``."""
        at = row * 56
        return bytes(self._rows[at : at + 16])

    def offset(self, row: int) -> int:
        """Where the record's body starts in the file."""
        return int(self.commit.rows["offset"][row])

    def read(self, row: int, key: bytes, into: Mapping[str, np.ndarray] | None = None) -> tuple[Record, int]:
        """The record at ``row``, which must be that of ``key``, and the bytes it took.

        With ``into`` each tensor is copied into the buffer of its name (same dtype and number of values) and the
        record holds those buffers, shaped; without, the record holds read-only views of the map.

        Raises:
            BadRecordError: the checksum does not match, the key is another one, or the file has shrunk.
            CacheError: a buffer is missing, or of another dtype or size.
        """
        if row >= self.n:
            raise WrongKeyError(f"{self.path} has {self.n} rows, the index said row {row}")
        stored_key, offset, nbytes, number, checksum = ROW_STRUCT.unpack_from(self._rows, row * 56)
        if stored_key != key:
            raise WrongKeyError(f"{self.path} row {row} holds key {stored_key.hex()}, the index said {key.hex()}")
        if self._map.size() != self.size:
            raise BadShardError(f"{self.path} changed its size from {self.size} to {self._map.size()} bytes")
        layout = self._layouts[number]
        check = self._always or (self._seen is not None and not self._seen[row])
        if self._coded[number]:
            # Decoding makes new arrays anyway: check the stored bytes, then decode.
            self._verify(offset, nbytes, checksum, row, check=check)
            record = decode(views(self._map, layout, offset))
            if into is not None:
                record = fill(into, record)
            return record, nbytes
        if into is None:
            self._verify(offset, nbytes, checksum, row, check=check)
            return views(self._map, layout, offset), nbytes
        return self._copy(layout, offset, checksum if check else None, row, into), nbytes

    def verify(self, row: int) -> bool:
        """Whether the record at ``row`` is what was committed, whatever was seen before."""
        _, offset, nbytes, _, checksum = ROW_STRUCT.unpack_from(self._rows, row * 56)
        if self._map.size() != self.size:
            return False
        return xxhash.xxh3_128_digest(self._view[offset : offset + nbytes]) == checksum

    def stored(self, row: int) -> tuple[bytes, Record]:
        """Key and record as they lie in the shard, not decoded, verified: what a merge copies."""
        key, offset, nbytes, number, checksum = ROW_STRUCT.unpack_from(self._rows, row * 56)
        if self._map.size() != self.size:
            raise BadShardError(f"{self.path} changed its size from {self.size} to {self._map.size()} bytes")
        self._verify(offset, nbytes, checksum, row, check=True)
        return key, views(self._map, self._layouts[number], offset)

    def _verify(self, offset: int, nbytes: int, checksum: bytes, row: int, *, check: bool) -> None:
        if check:
            if xxhash.xxh3_128_digest(self._view[offset : offset + nbytes]) != checksum:
                raise BadRecordError(f"{self.path} row {row} at byte {offset}: checksum does not match")
            if self._seen is not None:
                self._seen[row] = 1

    def _copy(
        self, layout: Layout, offset: int, checksum: bytes | None, row: int, into: Mapping[str, np.ndarray]
    ) -> Record:
        """Copy chunk by chunk; with ``checksum`` hash each from its destination, and what lies between from the map."""
        hasher = xxhash.xxh3_128() if checksum is not None else None
        record: Record = {}
        at = 0
        # Layouts keep their fields in the order of names, which is the order of the bytes, except empty ones.
        for f in layout.fields:
            buffer = _buffer(into, f.name, f.storage, f.count).reshape(f.shape)
            if f.nbytes:
                target = buffer.reshape(-1).view(np.uint8)
                source = self._bytes[offset + f.offset : offset + f.offset + f.nbytes]
                if hasher is not None:
                    hasher.update(self._view[offset + at : offset + f.offset])
                for a in range(0, f.nbytes, _CHUNK):
                    part = target[a : a + _CHUNK]
                    np.copyto(part, source[a : a + _CHUNK])
                    if hasher is not None:
                        hasher.update(part.data)
                at = f.offset + f.nbytes
            record[f.name] = Tensor(data=buffer, dtype=f.dtype)
        if hasher is not None:
            hasher.update(self._view[offset + at : offset + layout.nbytes])
            if hasher.digest() != checksum:
                raise BadRecordError(f"{self.path} row {row} at byte {offset}: checksum does not match")
            if self._seen is not None:
                self._seen[row] = 1
        return record


def _map(path: Path) -> tuple[mmap.mmap, int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise BadShardError(f"{path} is empty")
        return mmap.mmap(descriptor, size, prot=mmap.PROT_READ), size
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise CacheError(f"{path}: cannot be mapped, vm.max_map_count or memory is exhausted") from error
        raise
    finally:
        os.close(descriptor)


def _buffer(into: Mapping[str, np.ndarray], name: str, storage: np.dtype, count: int) -> np.ndarray:
    try:
        buffer = into[name]
    except KeyError:
        raise CacheError(f"into= has no buffer for tensor {name!r}; it has {sorted(into)}") from None
    if buffer.dtype != storage or buffer.size != count or not buffer.flags.c_contiguous:
        raise CacheError(
            f"into[{name!r}] has dtype {buffer.dtype} and {buffer.size} values, "
            f"needed are {storage}, {count}, contiguous"
        )
    return buffer


def fill(into: Mapping[str, np.ndarray], record: Mapping[str, Tensor]) -> Record:
    """Copy a record into the caller's buffers; the record that holds them. CacheError when one does not fit."""
    result: Record = {}
    for name, tensor in record.items():
        buffer = _buffer(into, name, tensor.data.dtype, tensor.data.size).reshape(tensor.data.shape)
        np.copyto(buffer, tensor.data)
        result[name] = Tensor(data=buffer, dtype=tensor.dtype)
    return result


def views(body: Buffer, layout: Layout, offset: int = 0) -> Record:
    """The tensors of a body that starts at ``offset`` of a buffer, without a copy."""
    return {
        f.name: Tensor(data=np.frombuffer(body, f.storage, f.count, offset + f.offset).reshape(f.shape), dtype=f.dtype)
        for f in layout.fields
    }
