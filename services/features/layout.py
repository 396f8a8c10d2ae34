"""How a record lies in a shard: one Arrow record batch of one row, so that its body is one run of bytes.

The columns are ``key`` (16 bytes) and, for every tensor, a struct of its values and its shape: the storage of
Arrow's canonical extension type ``arrow.variable_shape_tensor``. Any Arrow reader can open a shard; ours never
parses Arrow for a get: the position of every tensor inside the body depends on names, dtypes and shapes alone, is
taken once for each distinct layout, and is kept in the commit record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from services.contracts import Record, Tensor
from services.errors import CacheError

#: Logical dtype -> numpy dtype of its bits. numpy has no bfloat16 and no float8.
STORAGE: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<i2"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "float64": np.dtype("<f8"),
    "bool": np.dtype("|u1"),
    **{name: np.dtype(name).newbyteorder("<") for name in ("int8", "int16", "int32", "int64")},
    **{name: np.dtype(name).newbyteorder("<") for name in ("uint8", "uint16", "uint32", "uint64")},
}

#: Arrow's tensor type counts values in 32 bits.
_MOST_VALUES = 2**31 - 1

Signature = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype as stored and shape of every tensor of a record, sorted by name."""


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds a logical (or coded, ``fp8_e4m3:<logical>``) dtype. CacheError for an unknown one."""
    if ":" in dtype:
        return np.dtype(np.uint8)
    try:
        return STORAGE[dtype]
    except KeyError:
        raise CacheError(f"dtype {dtype!r} cannot be stored; allowed: {', '.join(sorted(STORAGE))}") from None


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a record: where it starts within the record's body, and what it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    count: int
    nbytes: int
    storage: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """Position of every tensor in the body of a record batch; equal signatures have equal layouts."""

    fields: tuple[Field, ...]
    nbytes: int
    """Bytes of the body: key, shapes, tensors and Arrow's padding. The checksum covers all of it."""

    def to_json(self) -> list[Any]:
        """The form in a commit record."""
        return [self.nbytes, [[f.name, f.dtype, list(f.shape), f.offset] for f in self.fields]]

    @classmethod
    def from_json(cls, value: list[Any]) -> Layout:
        """Inverse of :meth:`to_json`. CacheError when a tensor lies outside the body."""
        nbytes, items = value
        fields = []
        for name, dtype, shape, offset in items:
            storage = storage_dtype(dtype)
            count = int(np.prod(shape, dtype=np.int64))
            size = count * storage.itemsize
            if offset < 16 or offset + size > nbytes:
                raise CacheError(f"tensor {name!r} of {size} bytes at {offset} lies outside a body of {nbytes} bytes")
            fields.append(Field(name, dtype, tuple(shape), offset, count, size, storage))
        return cls(tuple(fields), nbytes)


def check_record(record: Mapping[str, Tensor]) -> Record:
    """The record with contiguous little-endian arrays. CacheError when an array does not fit its logical dtype."""
    if not record:
        raise CacheError("a record without tensors cannot be stored")
    checked: Record = {}
    for name in sorted(record):
        tensor = record[name]
        expected = storage_dtype(tensor.dtype)
        data = tensor.data
        if data.dtype == np.bool_ and tensor.dtype == "bool":
            data = data.view(np.uint8)
        if data.dtype != expected:
            raise CacheError(
                f"tensor {name!r} says dtype {tensor.dtype} but holds {data.dtype}; it must hold {expected}"
                + (" (the bits of bfloat16)" if tensor.dtype == "bfloat16" else "")
            )
        if data.size > _MOST_VALUES:
            raise CacheError(f"tensor {name!r} has {data.size} values; a stored tensor has at most {_MOST_VALUES}")
        if not data.flags.c_contiguous:
            data = np.ascontiguousarray(data)
        if data is not tensor.data:
            tensor = Tensor(data=data, dtype=tensor.dtype)
        checked[name] = tensor
    return checked


def signature(record: Mapping[str, Tensor]) -> Signature:
    """Names, dtypes and shapes of a checked record."""
    return tuple((name, tensor.dtype, tensor.data.shape) for name, tensor in record.items())


def arrow_schema(of: Signature, metadata: Mapping[str, str]) -> pa.Schema:
    """Arrow schema of shards whose records have these names, dtypes and numbers of axes."""
    fields = [pa.field("key", pa.binary(16), nullable=False)]
    for name, dtype, shape in of:
        storage = pa.from_numpy_dtype(storage_dtype(dtype))
        fields.append(
            pa.field(
                name,
                _tensor_type(storage, len(shape)),
                nullable=False,
                metadata={
                    "ARROW:extension:name": "arrow.variable_shape_tensor",
                    "ARROW:extension:metadata": "{}",
                    "loom3d:dtype": dtype,
                },
            )
        )
    return pa.schema(fields, metadata=dict(metadata))


def record_batch(key: bytes, record: Mapping[str, Tensor], schema: pa.Schema) -> pa.RecordBatch:
    """One record as a record batch of one row; the tensors are not copied."""
    columns = [pa.Array.from_buffers(schema.field(0).type, 1, [None, pa.py_buffer(key)])]
    for i, tensor in enumerate(record.values(), start=1):
        data = tensor.data
        kind = schema.field(i).type
        values_type, shape_type = kind.field(0).type, kind.field(1).type
        values = pa.Array.from_buffers(values_type.value_type, data.size, [None, pa.py_buffer(data.reshape(-1))])
        offsets = pa.py_buffer(np.array([0, data.size], np.int32))
        items = pa.Array.from_buffers(values_type, 1, [None, offsets], children=[values])
        sizes = pa.Array.from_buffers(pa.int32(), data.ndim, [None, pa.py_buffer(np.array(data.shape, np.int32))])
        shape = pa.Array.from_buffers(shape_type, 1, [None], children=[sizes])
        columns.append(pa.Array.from_buffers(kind, 1, [None], children=[items, shape]))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def measure(batch: pa.RecordBatch, of: Signature) -> Layout:
    """Where Arrow puts each tensor of such a batch: serialises it once and looks at the buffers' addresses."""
    message = pa.ipc.read_message(batch.serialize())
    body = message.body
    parsed = pa.ipc.read_record_batch(message, batch.schema)
    fields = []
    for i, (name, dtype, shape) in enumerate(of, start=1):
        storage = storage_dtype(dtype)
        values = parsed.column(i).field(0).values.buffers()[1]
        count = int(np.prod(shape, dtype=np.int64))
        # An empty tensor has no buffer; any place inside the body will do.
        offset = values.address - body.address if count else 16
        fields.append(Field(name, dtype, shape, offset, count, count * storage.itemsize, storage))
    key_at = parsed.column(0).buffers()[1].address - body.address
    if key_at != 0:
        raise CacheError(f"this pyarrow {pa.__version__} puts the key at byte {key_at} of a record, expected 0")
    return Layout(tuple(fields), body.size)


def tensor_from_row(batch: pa.RecordBatch, name: str, row: int = 0) -> np.ndarray:
    """A tensor as a plain Arrow reader gets it (export, tests): values and shape of one row, without a copy."""
    column = batch.column(name)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    shape = column.field(1)[row].as_py()
    return column.field(0)[row].values.to_numpy().reshape(shape)


def _tensor_type(storage: pa.DataType, axes: int) -> pa.DataType:
    return pa.struct([pa.field("data", pa.list_(storage)), pa.field("shape", pa.list_(pa.int32(), axes))])
