"""What the pair models' figures are compared with: attention and matching written out, as the first codes had them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_positions(batch: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, 2) rows and columns of the tokens of a grid, taken row by row."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([rows, columns], dim=-1).reshape(1, -1, 2).expand(batch, -1, -1)


def rope_per_call(x: Tensor, positions: Tensor, base: float = 100.0) -> Tensor:
    """2-D rotary embedding of (B, heads, N, d) whose cosines and sines are computed anew, as CroCo's PyTorch code does.

    Tables reach up to the largest position (which is asked from the device), and each token looks its own up.
    """

    def rotated(part: Tensor, position: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        cosine, sine = (F.embedding(position, table)[:, None] for table in (cosine, sine))
        first, second = part.chunk(2, dim=-1)
        return part * cosine + torch.cat([-second, first], dim=-1) * sine

    half = x.shape[-1] // 2
    frequency = 1.0 / (base ** (torch.arange(0, half, 2).float() / half))
    angles = torch.outer(torch.arange(int(positions.max()) + 1).float(), frequency)
    angles = torch.cat([angles, angles], dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    rows, columns = x.chunk(2, dim=-1)
    return torch.cat(
        [rotated(rows, positions[..., 0], cosine, sine), rotated(columns, positions[..., 1], cosine, sine)], dim=-1
    )


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, N, d) three times -> (B, N, heads * d), with the matrix of attention held whole."""
    weights = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def decode_explicitly(
    state: Mapping[str, Tensor], tokens: tuple[Tensor, Tensor], grid: tuple[int, int], heads: int
) -> list[Tensor]:
    """The dual decoder from its tensors by name: torch's functions, explicit softmax, rotary tables in every call.

    Returns the last features of both views, behind the norm.
    """
    positions = grid_positions(len(tokens[0]), grid)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks1."))

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        return softmax_attention(rope_per_call(q, positions), rope_per_call(k, positions), v)

    def block(at: str, x: Tensor, y: Tensor) -> Tensor:
        x = x + linear(f"{at}.attn.proj", attend(*linear(f"{at}.attn.qkv", norm(f"{at}.norm1", x)).chunk(3, -1)))
        own, other = norm(f"{at}.norm2", x), norm(f"{at}.norm_y", y)
        inputs = (("projq", own), ("projk", other), ("projv", other))
        mixed = attend(*(linear(f"{at}.cross_attn.{name}", tokens) for name, tokens in inputs))
        x = x + linear(f"{at}.cross_attn.proj", mixed)
        return x + linear(f"{at}.mlp.fc2", F.gelu(linear(f"{at}.mlp.fc1", norm(f"{at}.norm3", x))))

    x1, x2 = (linear("embed", x) for x in tokens)
    for layer in range(depth):
        x1, x2 = block(f"blocks1.{layer}", x1, x2), block(f"blocks2.{layer}", x2, x1)
    return [norm("norm", x) for x in (x1, x2)]


def match_densely(first: Tensor, second: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Mean InfoNCE of the valid matches with all similarities held: descriptors (B, M, D) twice, (B, M) bool.

    Probabilities are clipped at 1e-8 and taken by exponentials and their sums, as MASt3R's code does.
    """
    similar = (first @ second.transpose(-2, -1) / temperature).exp()
    match = similar.diagonal(dim1=-2, dim2=-1)
    rows = (match / similar.sum(dim=-1)).clip(1e-8).log()
    columns = (match / similar.sum(dim=-2)).clip(1e-8).log()
    return -(rows + columns)[valid].mean()
