"""The linear layer, with the faster of the two CPU libraries for float32.

PyTorch multiplies float32 matrices on the CPU through MKL, which does not use AVX-512 on AMD's processors: there the
other library that PyTorch carries, oneDNN, is twice as fast (measured on an EPYC: 105 against 240 GFLOP/s a core).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LEAST_WORK = 2**22
"""Multiplications below which the call itself costs more than it saves."""

_PLAIN = (Tensor, nn.Parameter)


class Linear(nn.Linear):
    """``nn.Linear``, computed by oneDNN where that is faster; everywhere else it is ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if _by_onednn(x, self.weight):
            return _OneDnnLinear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is one that oneDNN is faster at: float32 on an AMD processor, and large enough."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _LEAST_WORK
        # Fakes and distributed tensors count and shard by torch's own operators.
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _mkl_is_slow()
    )


@functools.cache
def _mkl_is_slow() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    processors = Path("/proc/cpuinfo")
    return processors.exists() and "AuthenticAMD" in processors.read_text()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` by oneDNN; strided views are taken as they are."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """The linear layer's three products, all by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = _product(rows, weight.T).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = _product(rows.T, x.reshape(-1, x.shape[-1]).T) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
