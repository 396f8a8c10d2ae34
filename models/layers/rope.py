"""Rotary position embedding over a grid of patches (Su et al. 2021; the 2-D form of CroCo, Weinzaepfel et al. 2022).

The channels of a head are cut in two: the first half turns with the row of a token, the second with its column.
Within a half of ``d`` channels, channel i and channel i + d/2 are a pair that turns by ``position * base^(-2i/d)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.errors import ModelError


class Rope2d(nn.Module):
    """Makes the rotation of a grid. Cosines and sines are computed once for a grid, a device and a dtype, and kept.

    The tables are no part of the state dict. Their positions come from the grid's shape alone, so no value is ever
    asked back from a device.

    Args:
        width: channels of a head; a multiple of 4.
        base: the slowest pair turns by about 1 / base a position.
    """

    def __init__(self, width: int, base: float = 100.0) -> None:
        super().__init__()
        if width % 4:
            raise ModelError(f"2-D rotary embedding: the width of a head must be a multiple of 4, got {width}")
        self.width, self.base = width, base
        self._tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def forward(
        self, grid: tuple[int, int], *, prefix: int = 0, first: int = 0, views: int = 1
    ) -> Callable[[Tensor], Tensor]:
        """A function that turns queries or keys (..., N, width) of tokens, row by row of ``grid`` (rows, columns).

        ``prefix`` tokens before the grid do not turn, the grid's rows and columns count from ``first``, and N is
        ``views`` such sequences one behind the other.
        """

        def rotate(x: Tensor) -> Tensor:
            cosine, sine = self.tables(grid, x.device, x.dtype, prefix=prefix, first=first)
            if views == 1:
                return _Rotate.apply(x, cosine, sine)
            return _Rotate.apply(x.unflatten(-2, (views, -1)), cosine, sine).flatten(-3, -2)

        return rotate

    def tables(
        self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype, *, prefix: int = 0, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine (prefix + N, 2, width / 4): token, axis (row, column), pair."""
        key = (*grid, prefix, first, device, dtype)
        if key not in self._tables:
            # Tables of a first call in inference mode must serve a training step as well.
            with torch.inference_mode(mode=False), torch.no_grad():
                cosine, sine = rope_tables(grid, self.width, self.base, device, prefix=prefix, first=first)
                self._tables[key] = (cosine.to(dtype), sine.to(dtype))
        return self._tables[key]

    def extra_repr(self) -> str:  # noqa: D102
        return f"width={self.width}, base={self.base}"


def rope_tables(
    grid: tuple[int, int],
    width: int,
    base: float,
    device: torch.device | str | None = None,
    *,
    prefix: int = 0,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 (prefix + N, 2, width / 4), of the tokens of ``grid`` (rows, columns) row by row.

    ``prefix`` tokens at position (0, 0) come before; rows and columns count from ``first``.
    """
    rows, columns = grid
    pairs = torch.arange(0, width // 2, 2, dtype=torch.float32, device=device)
    frequency = base ** (-pairs / (width // 2))
    row = torch.arange(first, first + rows, dtype=torch.float32, device=device).repeat_interleave(columns)
    column = torch.arange(first, first + columns, dtype=torch.float32, device=device).repeat(rows)
    position = torch.cat([row.new_zeros(prefix, 2), torch.stack([row, column], dim=-1)])
    angle = position[..., None] * frequency
    return angle.cos(), angle.sin()


def apply_rotation(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs of ``x`` (..., N, width) by the angles of the tables (N, 2, width / 4)."""
    pairs = x.unflatten(-1, (2, 2, -1))
    first, second = pairs.unbind(-2)
    # In the memory order of x: queries and keys are strided views of one projection, and attention reads such.
    out = torch.empty_like(x)
    turned = out.unflatten(-1, (2, 2, -1))
    torch.mul(first, cosine, out=turned.select(-2, 0)).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=turned.select(-2, 1)).addcmul_(first, sine)
    return out


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """:func:`apply_rotation` with gradients; the tables, of any dtype, are taken in that of ``x``."""
    return _Rotate.apply(x, cosine.to(x.dtype), sine.to(x.dtype))


class _Rotate(torch.autograd.Function):
    """The rotation as one node of the graph: nothing but the tables is kept, and backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return apply_rotation(x, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return apply_rotation(grad, cosine, -sine), None, None
