"""The decoder of DUSt3R and MASt3R: two stacks of blocks, one a view, each reading the other as it goes."""

from __future__ import annotations

from torch import Tensor, nn

from models.errors import ModelError
from models.layers.attention import Attention, CrossAttention, Rotate
from models.layers.block import Mlp
from models.layers.linear import Linear
from models.layers.rope import Rope2d

Grid = tuple[int, int]


class DecoderBlock(nn.Module):
    """Self-attention, attention to the other view, MLP: each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int, *, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.norm_y = nn.LayerNorm(width, eps=eps)
        self.cross_attn = CrossAttention(width, heads)
        self.norm3 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, y: Tensor, rotate_x: Rotate, rotate_y: Rotate) -> Tensor:
        """Tokens ``x`` (B, N, width) of one view, having read ``y`` (B, M, width) of the other."""
        x = x + self.attn(self.norm1(x), rotate=rotate_x)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), rotate_x=rotate_x, rotate_y=rotate_y)
        return x + self.mlp(self.norm3(x))


class DualDecoder(nn.Module):
    """Two stacks with weights of their own behind a shared embedding, before a shared norm.

    Both blocks of a layer read what the layer before gave, so that neither view comes first.

    Args:
        in_width: channels of the tokens that come in.
        width: channels inside.
        depth: blocks of each stack.
        heads: attention heads; width / heads must be a multiple of 4, for the rotary embedding.
        rope_base: base of the rotary embedding.
    """

    def __init__(
        self, *, in_width: int, width: int, depth: int, heads: int, mlp_ratio: float = 4.0, rope_base: float = 100.0
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ModelError(f"dual decoder: depth must be at least 1, got {depth}")
        self.embed = Linear(in_width, width)
        self.blocks1 = nn.ModuleList(DecoderBlock(width, heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.blocks2 = nn.ModuleList(DecoderBlock(width, heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.rope = Rope2d(width // heads, rope_base)

    def forward(self, tokens1: Tensor, tokens2: Tensor, grid1: Grid, grid2: Grid) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens (B, N, in_width) of both views, row by row of their grids (rows, columns) -> features of each view.

        A list holds depth + 1 tensors: what came in (in_width channels), then the output of every block (width
        channels), the last one behind the norm.
        """
        rotate1, rotate2 = self.rope(grid1), self.rope(grid2)
        x1, x2 = self.embed(tokens1), self.embed(tokens2)
        features1, features2 = [tokens1], [tokens2]
        for block1, block2 in zip(self.blocks1, self.blocks2, strict=True):
            x1, x2 = block1(x1, x2, rotate1, rotate2), block2(x2, x1, rotate2, rotate1)
            features1.append(x1)
            features2.append(x2)
        features1[-1], features2[-1] = self.norm(x1), self.norm(x2)
        return features1, features2
