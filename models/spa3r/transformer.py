"""The transformer of Spa3R's encoder and decoder: pre-norm blocks, queries and keys normalised, registers in front."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.layers import Linear, Mlp, Rope2d
from models.layers.attention import RMS_EPS
from models.layers.rope import turn

BLOCK = "FieldBlock"
_NORM_EPS = 1e-6
_INIT_STD, _REGISTER_STD = 0.02, 1e-6


class Positions(Protocol):
    """What positions do to one attention call; every tensor is (B, heads, N, head width)."""

    def queries(self, x: Tensor) -> Tensor:
        """Queries before they meet the keys."""

    def keys(self, x: Tensor) -> Tensor:
        """Keys before they meet the queries."""

    def values(self, x: Tensor) -> Tensor:
        """Values before they are averaged."""

    def outputs(self, x: Tensor) -> Tensor:
        """The averaged values."""


class RotaryPositions:
    """2-D rotary embedding of queries and keys; tables (N, 2, head width / 4) of all tokens."""

    def __init__(self, cosine: Tensor, sine: Tensor) -> None:
        self.cosine, self.sine = cosine, sine

    def queries(self, x: Tensor) -> Tensor:
        """Turned."""
        return turn(x, self.cosine, self.sine)

    def keys(self, x: Tensor) -> Tensor:
        """Turned."""
        return turn(x, self.cosine, self.sine)

    def values(self, x: Tensor) -> Tensor:
        """As they are."""
        return x

    def outputs(self, x: Tensor) -> Tensor:
        """As they are."""
        return x


def rotary_positions(rope: Rope2d, grid: tuple[int, int], *, still: int, views: int, like: Tensor) -> RotaryPositions:
    """``still`` tokens at (0, 0), which turns nothing, then the patches of each view at (row + 1, column + 1)."""
    cosine, sine = (table.repeat(views, 1, 1) for table in rope.tables(grid, like.device, torch.float32, first=1))
    unturned = cosine.new_zeros(still, *cosine.shape[1:])
    return RotaryPositions(torch.cat([unturned + 1, cosine]), torch.cat([unturned, sine]))


class FieldAttention(nn.Module):
    """Self-attention over tokens (B, N, width); queries and keys pass an RMS norm per head (weight only)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(f"attention: width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=RMS_EPS)
        self.k_norm = nn.RMSNorm(width // heads, eps=RMS_EPS)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # In the dtype of the norms' weights: inside autocast the projection gives less.
        q, k = (norm(x.to(norm.weight.dtype)).to(v.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        q, k = positions.queries(q), positions.keys(k)
        out = positions.outputs(F.scaled_dot_product_attention(q, k, positions.values(v)))
        return self.proj(out.transpose(1, 2).flatten(2))


class FieldBlock(nn.Module):
    """``x + attention(norm(x))`` and then ``x + mlp(norm(x))``; no layer scale."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attn = FieldAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        x = x + self.attn(self.norm1(x), positions)
        return x + self.mlp(self.norm2(x))


class FieldTransformer(nn.Module):
    """Registers in front of the tokens, blocks, a norm, and the registers cut off again."""

    def __init__(self, width: int, heads: int, depth: int, registers: int, mlp_ratio: float) -> None:
        super().__init__()
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width))
        self.blocks = nn.ModuleList(FieldBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)

    @property
    def registers(self) -> int:
        """How many tokens stand in front; ``positions`` of :meth:`forward` count them."""
        return self.register_tokens.shape[1]

    def forward(self, tokens: Tensor, positions: Positions) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        registers = self.register_tokens.to(tokens.dtype).expand(len(tokens), -1, -1)
        x = torch.cat([registers, tokens], dim=1)
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)[:, registers.shape[1] :]


def initialise(module: nn.Module) -> None:
    """Linear layers and embeddings from a normal of deviation 0.02; biases 0; registers almost 0.

    The published code cuts the normal at 2, a hundred deviations: torch's function for that can build no fake tensors.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.normal_(child.weight, std=_INIT_STD)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)
        if isinstance(child, FieldTransformer):
            nn.init.normal_(child.register_tokens, std=_REGISTER_STD)
