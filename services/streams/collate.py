"""Records of a micro-batch -> columns of torch tensors, by one contiguous copy a sample into reused buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from models.spec import TensorSpec
from services.contracts import PlanSample, Record, Tensor
from services.errors import DataError
from services.streams.inputs import view_axes

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
"""Logical dtype of a record -> dtype of the column."""

_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Values are copied as bits, whatever they mean; numpy has no bfloat16."""


class Slot:
    """The memory of one loaded step, kept and used again: pinned where there is a GPU, grown when it must be."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._pin = torch.cuda.is_available()

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; what :meth:`take` gave for this ``name`` before is overwritten."""
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # torch aligns every allocation to 64 bytes, enough for vector copies and for any dtype.
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)
        return buffer[:size].view(dtype).view(tuple(shape))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.numel() for buffer in self._buffers.values())


class Collate:
    """Columns of a micro-batch. A broken sample (no record) becomes zeros of the shape of its neighbours.

    ``specs`` gives, by kind, shapes (None: ragged) and dtypes of the columns known beforehand, such as an encoder's
    ``outputs()``; where it is silent, shapes are those of the last good sample of the same kind. A ragged column
    is padded with zeros to the longest and comes with ``<name>_lengths``, int64 (B, number of ragged axes). Kinds
    with a fixed number of views (view, pair, generation) have every column in every sample; of the others a sample
    may lack columns, and then has length 0 there.
    """

    def __init__(self, specs: Mapping[str, Mapping[str, TensorSpec]] | None = None) -> None:
        self._given = dict(specs or {})
        self._seen: dict[str, dict[str, TensorSpec]] = {}

    def __call__(
        self,
        kind: str,
        samples: Sequence[PlanSample],
        records: Sequence[Record | None],
        slot: Slot,
        prefix: str = "",
    ) -> dict[str, Any]:
        """Columns by name, ``weight`` float32 (B,) and ``id`` (list).

        ``prefix`` keeps the buffers of several micro-batches of a step apart. DataError when records of a batch
        disagree, or all are broken and nothing says what they would have looked like.
        """
        specs = self._columns(kind, samples, records)
        batch: dict[str, Any] = {}
        for name, spec in specs.items():
            tensors = [None if record is None else record.get(name) for record in records]
            batch |= _column(name, tensors, spec, slot, prefix)
        weight = slot.take(f"{prefix}weight", (len(samples),), torch.float32)
        for i, (sample, record) in enumerate(zip(samples, records, strict=True)):
            weight[i] = 0.0 if record is None else sample.weight
        batch["weight"] = weight
        batch["id"] = [sample.id for sample in samples]
        return batch

    def _columns(
        self, kind: str, samples: Sequence[PlanSample], records: Sequence[Record | None]
    ) -> dict[str, TensorSpec]:
        """Name -> shape and dtype of this batch's columns."""
        good = {s.id: record for s, record in zip(samples, records, strict=True) if record is not None}
        given, ragged = self._given.get(kind, {}), view_axes(kind) == (None,)
        if not good:
            known = {**given, **self._seen.get(kind, {})}
            if not known:
                raise DataError(
                    f"all {len(samples)} samples of the first micro-batch of kind {kind!r} are broken "
                    f"({', '.join(sample.id for sample in samples[:4])} ...), so nothing says what they should look "
                    "like; check the data with `loom3d data check`"
                )
            return known
        # Declared columns are there even where no sample has them: a batch of texts has no picture.
        columns: dict[str, TensorSpec] = dict(given)
        for name in dict.fromkeys((*given, *(name for record in good.values() for name in record))):
            found = {sample: record[name] for sample, record in good.items() if name in record}
            missing = [sample for sample in good if sample not in found]
            if missing and not ragged:
                has = f"{next(iter(found))} has one" if found else "its kind declares one"
                raise DataError(f"{missing[0]} has no tensor {name!r}, {has}")
            if found:
                columns[name] = _spec(name, found, given.get(name), ragged=ragged)
        self._seen[kind] = columns
        return columns


def _spec(name: str, tensors: Mapping[str, Tensor], given: TensorSpec | None, *, ragged: bool) -> TensorSpec:
    """Shape and dtype of one column, checked against what was declared beforehand.

    ``ragged``: the first axis counts views, and is ragged even where the samples of this batch agree.
    """
    first_id, first = next(iter(tensors.items()))
    shapes = {tensor.data.shape for tensor in tensors.values()}
    for sample, tensor in tensors.items():
        if tensor.dtype != first.dtype or tensor.data.ndim != first.data.ndim:
            raise DataError(
                f"{name} of {sample} is {tensor.dtype} {tensor.data.shape}, of {first_id} {first.dtype} "
                f"{first.data.shape}: a column has one dtype and one number of axes"
            )
    axes = zip(*shapes, strict=True)
    seen = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in axes)
    if given is None:
        seen = (None, *seen[1:]) if ragged and seen else seen
        return TensorSpec(shape=seen, dtype=first.dtype)
    fits = len(given.shape) == len(seen) and all(
        want is None or want == size for want, size in zip(given.shape, seen, strict=True)
    )
    if not fits or given.dtype != first.dtype:
        raise DataError(
            f"{name} of {first_id} is {first.dtype} {sorted(shapes)}, the encoder declares {given.dtype} "
            f"{given.shape} (None: any size)"
        )
    return given


def _column(
    name: str, tensors: Sequence[Tensor | None], spec: TensorSpec, slot: Slot, prefix: str
) -> dict[str, torch.Tensor]:
    """One column, and its lengths when the spec has ragged axes."""
    dtype = TORCH_DTYPES[spec.dtype]
    ragged = [axis for axis, size in enumerate(spec.shape) if size is None]
    # Where all samples are broken a ragged axis has length 1, so that a model never meets an empty tensor.
    full = tuple(
        size if size is not None else max((t.data.shape[axis] for t in tensors if t is not None), default=1)
        for axis, size in enumerate(spec.shape)
    )
    column = slot.take(prefix + name, (len(tensors), *full), dtype)
    raw_dtype = _RAW[dtype.itemsize]
    raw = column.view(torch.uint8).view(-1).numpy().view(raw_dtype).reshape(len(tensors), *full)
    for i, tensor in enumerate(tensors):
        if tensor is None:
            raw[i] = 0
            continue
        data = np.asarray(tensor.data, order="C").view(raw_dtype)
        if data.shape != full:
            raw[i] = 0
        # The ellipsis keeps a scalar's place an array that can be assigned to.
        raw[i, ...][tuple(slice(size) for size in data.shape)] = data
    columns = {name: column}
    if ragged:
        lengths = slot.take(f"{prefix}{name}_lengths", (len(tensors), len(ragged)), torch.int64)
        for i, tensor in enumerate(tensors):
            for j, axis in enumerate(ragged):
                lengths[i, j] = 0 if tensor is None else tensor.data.shape[axis]
        columns[f"{name}_lengths"] = lengths
    return columns
