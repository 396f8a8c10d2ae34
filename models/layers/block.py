"""The pre-norm transformer block (Vaswani et al. 2017, with the norm first), with optional layer scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import Attention, Rotate
from models.layers.linear import Linear


class Mlp(nn.Module):
    """Two linear layers with GELU between them, token by token."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., out)."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x * self.gamma


class Block(nn.Module):
    """``x + scale(attention(norm(x)))`` and then ``x + scale(mlp(norm(x)))``, tokens (B, N, width)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qkv_bias=qkv_bias, qk_norm=qk_norm)
        self.scale1 = LayerScale(width, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.scale2 = LayerScale(width, layer_scale) if layer_scale is not None else nn.Identity()

    def forward(self, x: Tensor, *, rotate: Rotate | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        x = x + self.scale1(self.attn(self.norm1(x), rotate=rotate, mask=mask))
        return x + self.scale2(self.mlp(self.norm2(x)))
