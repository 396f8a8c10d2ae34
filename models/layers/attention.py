"""Multi-head attention through torch's scaled dot-product kernels: to the tokens themselves, or to others."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.layers.linear import Linear

Rotate = Callable[[Tensor], Tensor]
"""Turns queries and keys (B, heads, N, head width) by their positions, e.g. rotary embeddings."""


RMS_EPS = torch.finfo(torch.float32).eps
"""What torch's RMSNorm adds in float32 where nothing is said; fixed, so that other dtypes add the same."""


def head_norm(kind: bool | str, width: int) -> nn.Module:
    """The norm of queries or keys of one head: ``layernorm`` (or True), ``rmsnorm`` (no bias), or False for none."""
    if not kind:
        return nn.Identity()
    if kind is True or kind == "layernorm":
        return nn.LayerNorm(width)
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=RMS_EPS)
    raise ModelError(f"attention: qk_norm={kind!r}; allowed are layernorm, rmsnorm, true and false")


class Attention(nn.Module):
    """Self-attention of ``heads`` heads over tokens (B, N, width).

    ``qk_norm`` normalises queries and keys per head before they meet, which keeps the logits bounded; see
    :func:`head_norm`.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True, qk_norm: bool | str = False) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(f"attention: width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = head_norm(qk_norm, width // heads)
        self.k_norm = head_norm(qk_norm, width // heads)
        self.proj = Linear(width, width)

    def forward(
        self, x: Tensor, *, rotate: Rotate | None = None, mask: Tensor | None = None, context: int = 0
    ) -> Tensor:
        """(B, N, width) -> (B, N, width). ``mask`` broadcasts to (B, heads, N, N); True (or 0.0) lets through.

        With ``context`` the first so many tokens read each other only, and the others read all: the same as a mask,
        as two calls without one.
        """
        assert mask is None or not context, "a mask or a context, not both"
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if context:
            return self.proj(context_first_attention(q, k, v, context).flatten(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


def context_first_attention(q: Tensor, k: Tensor, v: Tensor, context: int) -> Tensor:
    """Queries, keys and values (B, heads, N, width) -> (B, N, heads, width); see :meth:`Attention.forward`."""
    among = F.scaled_dot_product_attention(q[:, :, :context], k[:, :, :context], v[:, :, :context])
    beyond = F.scaled_dot_product_attention(q[:, :, context:], k, v)
    return torch.cat([among.transpose(1, 2), beyond.transpose(1, 2)], dim=1)


class CrossAttention(nn.Module):
    """Attention of ``heads`` heads from tokens (B, N, width) to other tokens (B, M, width)."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(f"attention: width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.projq = Linear(width, width, bias=qkv_bias)
        self.projk = Linear(width, width, bias=qkv_bias)
        self.projv = Linear(width, width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(
        self, x: Tensor, y: Tensor, *, rotate_x: Rotate | None = None, rotate_y: Rotate | None = None
    ) -> Tensor:
        """Queries from ``x``, keys and values from ``y``; the rotations are those of their positions."""
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, tokens in ((self.projq, x), (self.projk, y), (self.projv, y))
        )
        if rotate_x is not None:
            q = rotate_x(q)
        if rotate_y is not None:
            k = rotate_y(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
