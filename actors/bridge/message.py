"""What crosses an edge: a header that both sides check, and the tensors of some samples as contiguous bytes.

A dense tensor is sent where it lies, and so is a ragged one that has no padding; other ragged ones are packed without
it, sample after sample.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from configs import ConfigError
from models.spec import EdgeSpec, EdgeTensor
from services.errors import BridgeError

DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""What an edge's tensor may be."""


@dataclass(frozen=True)
class Route:
    """Samples [begin, end) of a global micro-batch: rank ``source`` of one role has them, rank ``target`` gets them."""

    source: int
    target: int
    begin: int
    end: int


@functools.lru_cache(maxsize=256)
def routes(batch: int, sources: int, targets: int) -> tuple[Route, ...]:
    """How a global micro-batch of ``batch`` samples is sliced again between groups of unequal size.

    Rank r of w holds the samples [r * batch / w, (r + 1) * batch / w). Returned in the order of the samples.
    ConfigError unless both sizes divide the batch.
    """
    for ranks in (sources, targets):
        if ranks < 1 or batch % ranks:
            raise ConfigError(
                f"a micro-batch of {batch} samples cannot be spread over {ranks} ranks; choose cluster.roles.*.workers "
                "that divide trainer.micro_batch"
            )
    per_source, per_target = batch // sources, batch // targets
    cuts = sorted({*range(0, batch + 1, per_source), *range(0, batch + 1, per_target)})
    return tuple(Route(begin // per_source, begin // per_target, begin, end) for begin, end in itertools.pairwise(cuts))


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor of a message."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of one sample; a ragged axis has the size it is padded to."""
    lengths: tuple[tuple[int, ...], ...] = ()
    """Per sample, the sizes of the ragged axes."""
    gradient: bool = True

    @property
    def size(self) -> int:
        """Bytes of one sample without ragged axes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


_TENSOR = tuple(field.name for field in fields(TensorHeader))


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a message is about. Both sides know all of it but the shapes, and compare."""

    generation: int
    step: int
    micro: int
    edge: str
    """"<source> -> <target>", and "back" behind it where gradients return."""
    samples: int
    first: str
    """Id of the first sample, for error messages."""
    digest: str
    """Of the ids of all samples."""
    zero: tuple[int, ...] = ()
    """Places of the samples whose weight is zero."""
    tensors: tuple[TensorHeader, ...] = ()

    def encode(self) -> bytes:
        """As bytes: a line of facts, then the description of the tensors."""
        facts = [getattr(self, name) for name in _FACTS]
        return _dumps(facts).encode() + b"\n" + _encode_tensors(self.tensors)

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """The inverse of :meth:`encode`. BridgeError for bytes that are none."""
        try:
            facts, _, tensors = data.partition(b"\n")
            fields = dict(zip(_FACTS, json.loads(facts), strict=True))
            return cls(**{**fields, "zero": tuple(fields["zero"])}, tensors=_decode_tensors(tensors))
        except (ValueError, TypeError) as error:
            raise BridgeError(
                f"a message of {len(data)} bytes is no header of an edge ({error}): {data[:80]!r}"
            ) from error

    def check(self, expected: Header, *, sender: str, receiver: str) -> None:
        """BridgeError, naming both sides, unless this header (of ``sender``) fits what ``receiver`` expects.

        Shapes are the sender's to say, except where the receiver knows them (it gives tensors with shapes).
        """
        seen = [
            f"{name}: {sender} sent {getattr(self, name)!r}, {receiver} expects {getattr(expected, name)!r}"
            for name in _FACTS
            if name != "first" and getattr(self, name) != getattr(expected, name)
        ]
        mine = [(t.name, t.dtype, t.gradient) for t in expected.tensors]
        theirs = [(t.name, t.dtype, t.gradient) for t in self.tensors]
        if mine != theirs:
            seen.append(f"tensors (name, dtype, gradient): {sender} sent {theirs}, {receiver} expects {mine}")
        if seen:
            raise BridgeError(
                f"the two ends of an edge disagree. {'; '.join(seen)}. First sample: {self.first!r} and "
                f"{expected.first!r}. Both roles must run the same plan from the same step and generation"
            )


_FACTS = tuple(field.name for field in fields(Header) if field.name != "tensors")
_dumps = json.JSONEncoder(separators=(",", ":")).encode


@functools.lru_cache(maxsize=64)
def _encode_tensors(tensors: tuple[TensorHeader, ...]) -> bytes:
    """The description of a message's tensors; mostly that of the message before."""
    return _dumps([[getattr(tensor, name) for name in _TENSOR] for tensor in tensors]).encode()


@functools.lru_cache(maxsize=64)
def _decode_tensors(data: bytes) -> tuple[TensorHeader, ...]:
    """The inverse of :func:`_encode_tensors`."""
    found = [dict(zip(_TENSOR, described, strict=True)) for described in json.loads(data)]
    return tuple(
        TensorHeader(**{**t, "shape": tuple(t["shape"]), "lengths": tuple(map(tuple, t["lengths"]))}) for t in found
    )


def digest(ids: Sequence[str]) -> str:
    """Names a list of sample ids."""
    return hashlib.blake2b("\0".join(ids).encode(), digest_size=8).hexdigest()


@dataclass(kw_only=True)
class Packed:
    """Tensors of some samples as they travel."""

    tensors: list[TensorHeader] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)
    """One vector of bytes a tensor."""


def pack(edge: EdgeSpec, tensors: Mapping[str, Tensor], begin: int, end: int, *, sender: str) -> Packed:
    """The samples [begin, end) of an edge's tensors (B, ...), as bytes on the tensors' device.

    A ragged tensor comes with ``<name>_lengths`` (B, ragged axes). BridgeError where a tensor does not fit the edge's
    declaration; ``sender`` is named in it.
    """
    packed = Packed()
    for declared in edge.tensors:
        tensor = _take(edge, declared, tensors, sender)[begin:end]
        lengths = _lengths(edge, declared, tensors, sender)
        if lengths is not None:
            lengths = lengths[begin:end]
        packed.tensors.append(
            TensorHeader(
                name=declared.name,
                dtype=declared.spec.dtype,
                shape=_padded(declared, tensor, lengths),
                lengths=() if lengths is None else tuple(tuple(row) for row in lengths),
                gradient=declared.gradient,
            )
        )
        packed.parts.append(to_bytes(tensor, _axes(declared), lengths))
    return packed


def to_bytes(tensor: Tensor, axes: Sequence[int], lengths: Sequence[Sequence[int]] | None) -> Tensor:
    """A tensor (n, ...) as uint8 (bytes,): its own memory where it is contiguous and has no padding, else a copy."""
    if lengths is None or _is_dense(tensor.shape[1:], axes, lengths):
        flat = tensor.detach().reshape(-1)
    else:
        pieces = [tensor[i].detach()[_region(tensor.ndim - 1, axes, row)].reshape(-1) for i, row in enumerate(lengths)]
        flat = torch.cat(pieces) if pieces else tensor.detach().new_empty(0)
    return flat.contiguous().view(torch.uint8)


def from_bytes(part: Tensor, header: TensorHeader, axes: Sequence[int], samples: int) -> Tensor:
    """The tensor (samples, *shape) of a part; a view of it where there is no padding, padded with zeros otherwise.

    BridgeError for a part of another size.
    """
    if part.numel() != nbytes(header, axes, samples):
        raise BridgeError(
            f"{header.name!r} came with {part.numel()} bytes, its header says {nbytes(header, axes, samples)}"
        )
    values = part.view(DTYPES[header.dtype])
    if not axes or _is_dense(header.shape, axes, header.lengths):
        return values.view(samples, *header.shape)
    whole = values.new_zeros((samples, *header.shape))
    offset = 0
    for i, row in enumerate(header.lengths):
        region = whole[i][_region(len(header.shape), axes, row)]
        region.copy_(values[offset : offset + region.numel()].view(region.shape))
        offset += region.numel()
    return whole


def nbytes(header: TensorHeader, axes: Sequence[int], samples: int) -> int:
    """Bytes of a tensor's part."""
    if not axes or (len(header.lengths) == samples and _is_dense(header.shape, axes, header.lengths)):
        return samples * header.size
    shapes = [
        [row[axes.index(axis)] if axis in axes else size for axis, size in enumerate(header.shape)]
        for row in header.lengths
    ]
    return sum(math.prod(shape) for shape in shapes) * DTYPES[header.dtype].itemsize


def check_shape(edge: EdgeSpec, header: TensorHeader, *, sender: str, receiver: str) -> None:
    """BridgeError, naming both sides, unless a tensor has the shape that the receiver's model expects."""
    declared = next(tensor for tensor in edge.tensors if tensor.name == header.name)
    want: tuple[Any, ...] = declared.spec.shape
    fits = len(want) == len(header.shape) and all(
        size is None or size == seen for size, seen in zip(want, header.shape, strict=True)
    )
    if not fits:
        raise BridgeError(
            f"edge {edge.source} -> {edge.target}: {sender} sent {header.name!r} of shape {header.shape} a sample, "
            f"{receiver} expects {want} (None: any size); both roles must be built from the same model.* settings"
        )


def merge(tensors: Sequence[Tensor]) -> Tensor:
    """Samples from several senders as one tensor; ragged axes are padded with zeros to the longest."""
    if len(tensors) == 1:
        return tensors[0]
    full = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    if all(list(tensor.shape[1:]) == full for tensor in tensors):
        return torch.cat(list(tensors))
    whole = tensors[0].new_zeros((sum(len(tensor) for tensor in tensors), *full))
    offset = 0
    for tensor in tensors:
        whole[offset : offset + len(tensor)][(slice(None), *(slice(size) for size in tensor.shape[1:]))] = tensor
        offset += len(tensor)
    return whole


def ragged_axes(declared: EdgeTensor) -> tuple[int, ...]:
    """Axes of one sample whose size differs from sample to sample."""
    return _axes(declared)


def _axes(declared: EdgeTensor) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(declared.spec.shape) if size is None)


def _is_dense(shape: Sequence[int], axes: Sequence[int], lengths: Sequence[Sequence[int]]) -> bool:
    """Whether no sample of ``shape`` has padding on its ragged axes."""
    full = [shape[axis] for axis in axes]
    return all(list(row) == full for row in lengths)


def _region(ndim: int, axes: Sequence[int], row: Sequence[int]) -> tuple[slice, ...]:
    """The part of a sample that is no padding."""
    return tuple(slice(row[axes.index(axis)]) if axis in axes else slice(None) for axis in range(ndim))


def _padded(declared: EdgeTensor, tensor: Tensor, lengths: Sequence[Sequence[int]] | None) -> tuple[int, ...]:
    """Shape of one sample: ragged axes as long as the longest of these samples."""
    if lengths is None:
        return tuple(tensor.shape[1:])
    axes = _axes(declared)
    longest = [max((row[k] for row in lengths), default=0) for k in range(len(axes))]
    return tuple(longest[axes.index(a)] if a in axes else size for a, size in enumerate(tensor.shape[1:]))


def _take(edge: EdgeSpec, declared: EdgeTensor, tensors: Mapping[str, Tensor], sender: str) -> Tensor:
    """The tensor in the edge's dtype, its shape checked."""
    if declared.name not in tensors:
        raise BridgeError(
            f"edge {edge.source} -> {edge.target}: {sender} gives no tensor {declared.name!r}, only {sorted(tensors)}"
        )
    tensor = tensors[declared.name]
    want: tuple[Any, ...] = declared.spec.shape
    fits = tensor.ndim == len(want) + 1 and all(
        size is None or size == seen for size, seen in zip(want, tensor.shape[1:], strict=True)
    )
    if not fits:
        raise BridgeError(
            f"edge {edge.source} -> {edge.target}: {sender} gives {declared.name!r} of shape {tuple(tensor.shape)}, "
            f"the edge declares (samples, {', '.join(map(str, want))}) (None: any size)"
        )
    return tensor.to(DTYPES[declared.spec.dtype])


def _lengths(
    edge: EdgeSpec, declared: EdgeTensor, tensors: Mapping[str, Tensor], sender: str
) -> list[list[int]] | None:
    """Sizes of the ragged axes per sample; None for a dense tensor."""
    axes = _axes(declared)
    if not axes:
        return None
    name = f"{declared.name}_lengths"
    tensor = tensors[declared.name]
    given = tensors.get(name)
    if given is None or tuple(given.shape) != (len(tensor), len(axes)):
        raise BridgeError(
            f"edge {edge.source} -> {edge.target}: {declared.name!r} is ragged, so {sender} must give {name!r} of "
            f"shape ({len(tensor)}, {len(axes)}); seen {None if given is None else tuple(given.shape)}"
        )
    rows: list[list[int]] = given.tolist()
    full = [tensor.shape[1 + axis] for axis in axes]
    for i, row in enumerate(rows):
        if row != full and any(not 0 <= size <= tensor.shape[1 + axis] for size, axis in zip(row, axes, strict=True)):
            raise BridgeError(
                f"edge {edge.source} -> {edge.target}: {sender} gives {name}[{i}]={row}, but the axes {axes} of "
                f"{declared.name!r} have the sizes {[tensor.shape[1 + a] for a in axes]}"
            )
    return rows
