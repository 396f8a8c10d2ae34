"""Codecs of stored tensors: ``none``, and ``fp8_e4m3`` with one scale a token, half the bytes of bfloat16.

Outputs that an encoder declares exact (cameras, depths, the moments of a latent) are stored as they are; the codec that
a namespace names then says so: ``fp8_e4m3 except depth pose``. numpy only, because the processes that write and read
the store need no torch. The error of a lossy codec is measured on every tensor at encoding and summed in the commit
records, so that a namespace can report it. E4M3 follows the OCP 8-bit floating point specification (finite only,
largest 448).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from services.contracts import Record, Tensor
from services.errors import CacheError

CODECS = ("none", "fp8_e4m3")
_PREFIX = "fp8_e4m3:"
_SCALE = ".scale"
_EXCEPT = " except "
_FLOATS = ("bfloat16", "float16", "float32")
_LARGEST = np.float32(448.0)


@dataclass(frozen=True, slots=True)
class CodecError:
    """Error of a lossy codec over many tokens (a token is a vector along the last axis)."""

    tokens: int = 0
    cosine_sum: float = 0.0
    cosine_max: float = 0.0
    squared_error: float = 0.0
    squared_reference: float = 0.0

    def __add__(self, other: CodecError) -> CodecError:
        return CodecError(
            self.tokens + other.tokens,
            self.cosine_sum + other.cosine_sum,
            max(self.cosine_max, other.cosine_max),
            self.squared_error + other.squared_error,
            self.squared_reference + other.squared_reference,
        )

    @property
    def cosine_mean(self) -> float:
        """Mean over tokens of 1 - cos(original, decoded)."""
        return self.cosine_sum / self.tokens if self.tokens else 0.0

    @property
    def relative_rmse(self) -> float:
        """Root mean squared error over the root mean square of the original."""
        return (self.squared_error / self.squared_reference) ** 0.5 if self.squared_reference else 0.0

    def to_json(self) -> list[float]:
        """The sums, as a commit record keeps them."""
        return [self.tokens, self.cosine_sum, self.cosine_max, self.squared_error, self.squared_reference]

    @classmethod
    def from_json(cls, value: list[float]) -> CodecError:
        """Inverse of :meth:`to_json`."""
        return cls(int(value[0]), *(float(item) for item in value[1:]))

    def report(self) -> dict[str, float]:
        """What the command line and the report print."""
        return {
            "tokens": self.tokens,
            "cosine_error_mean": self.cosine_mean,
            "cosine_error_max": self.cosine_max,
            "relative_rmse": self.relative_rmse,
        }


def check_codec(name: str) -> str:
    """``name`` if it is a codec, otherwise CacheError."""
    if name not in CODECS:
        raise CacheError(f"cache.codec={name!r} is unknown; allowed: {', '.join(CODECS)}")
    return name


def codec_label(codec: str, exact: Collection[str]) -> str:
    """How a namespace names its codec, where the tensors ``exact`` of its records are not coded."""
    return codec if codec == "none" or not exact else f"{codec}{_EXCEPT}{' '.join(sorted(exact))}"


def parse_label(label: str) -> tuple[str, tuple[str, ...]]:
    """Inverse of :func:`codec_label`."""
    codec, _, exact = label.partition(_EXCEPT)
    return codec, tuple(exact.split())


def encode(
    codec: str, record: Mapping[str, Tensor], exact: Collection[str] = ()
) -> tuple[Record, dict[str, CodecError]]:
    """The record as it is stored, and the error of each coded tensor (empty for ``none``); ``exact`` are not coded.

    Raises:
        CacheError: a tensor with NaN or infinity, or a name that the codec needs itself.
    """
    if codec == "none":
        return dict(record), {}
    stored: Record = {}
    errors: dict[str, CodecError] = {}
    for name, tensor in record.items():
        if name in exact or tensor.dtype not in _FLOATS or tensor.data.ndim == 0 or tensor.data.size == 0:
            stored[name] = tensor
            continue
        if name + _SCALE in record:
            raise CacheError(f"codec {codec} keeps its scales in {name + _SCALE!r}, which the record already has")
        values = to_float32(tensor.data, tensor.dtype)
        if not np.isfinite(values).all():
            raise CacheError(f"tensor {name!r} holds NaN or infinity, which codec {codec} cannot store")
        codes, scale = _quantise(values)
        stored[name] = Tensor(data=codes, dtype=_PREFIX + tensor.dtype)
        stored[name + _SCALE] = Tensor(data=scale, dtype="float32")
        errors[name] = _error(values, to_float32(_dequantise(codes, scale, tensor.dtype), tensor.dtype))
    return dict(sorted(stored.items())), errors


def decode(record: Mapping[str, Tensor]) -> Record:
    """The record in its logical dtypes; tensors that are not coded pass through without a copy."""
    decoded: Record = {}
    for name, tensor in record.items():
        if is_coded(tensor.dtype):
            dtype = tensor.dtype.removeprefix(_PREFIX)
            data = _dequantise(tensor.data, record[name + _SCALE].data, dtype)
            decoded[name] = Tensor(data=data, dtype=dtype)
        elif not (name.endswith(_SCALE) and _is_scale(name, record)):
            decoded[name] = tensor
    return decoded


def is_coded(dtype: str) -> bool:
    """Whether a stored dtype is that of coded values."""
    return dtype.startswith(_PREFIX)


def to_float32(data: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a stored tensor (bfloat16 as int16 bits) as float32."""
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as a stored tensor, rounded to nearest even; finite values only."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16).view(np.int16)
    return values.astype(np.float16 if dtype == "float16" else np.float32)


def _is_scale(name: str, record: Mapping[str, Tensor]) -> bool:
    base: Any = record.get(name.removesuffix(_SCALE))
    return base is not None and is_coded(base.dtype)


def _quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (same shape, uint8) and scales (without the last axis, float32) of finite float32 values."""
    largest = np.abs(values).max(axis=-1)
    scale = np.where(largest > 0, largest / _LARGEST, np.float32(1)).astype(np.float32)
    # A subnormal scale would lose its own precision, or be zero; such tokens are zero for every purpose.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    bits = np.clip(values / scale[..., None], -_LARGEST, _LARGEST).view(np.uint32)
    # The upper half of a float32, with everything below it folded into the last bit (rounding to odd), so that the
    # second rounding, to 3 bits of mantissa, comes out as if there had been no first.
    return _encode_table()[(bits >> 16) | ((bits & 0xFFFF) != 0)], scale


def _dequantise(codes: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    return from_float32(_decode_table()[codes] * scale[..., None], dtype)


def _error(values: np.ndarray, decoded: np.ndarray) -> CodecError:
    a, b = values.reshape(-1, values.shape[-1]), decoded.reshape(-1, values.shape[-1])
    dot, aa, bb = (np.einsum("ij,ij->i", x, y, dtype=np.float64) for x, y in ((a, b), (a, a), (b, b)))
    norm = np.sqrt(aa * bb)
    cosine = np.where(norm > 0, np.clip(1.0 - dot / np.where(norm > 0, norm, 1.0), 0.0, None), 0.0)
    squared = float(np.maximum(aa + bb - 2.0 * dot, 0.0).sum())
    return CodecError(len(a), float(cosine.sum()), float(cosine.max()), squared, float(aa.sum()))


@cache
def _decode_table() -> np.ndarray:
    """Value of each of the 256 codes: 1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa / 8.0 * 2.0**-6, (1 + mantissa / 8.0) * 2.0 ** (exponent - 7.0))
    value[(code & 127) == 127] = np.nan
    return np.where(code & 128, -value, value).astype(np.float32)


@cache
def _encode_table() -> np.ndarray:
    """Code for each upper half of a float32 (65536 patterns): to nearest, ties to even, saturating at 448."""
    positive = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    grid = _decode_table()[:127].astype(np.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    low, high = np.searchsorted(middle, positive, "left"), np.searchsorted(middle, positive, "right")
    codes = np.where(low % 2 == 0, low, high).astype(np.uint8)
    table = np.full(65536, 0x7F, np.uint8)  # infinities and NaN, which encode() refuses
    table[: len(codes)] = codes
    table[0x8000 : 0x8000 + len(codes)] = codes | 0x80
    return table
