"""What VGGT's figures are compared with: a dense mask, two passes, and the aggregator as the published code runs it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.bench.baselines_pair import rope_per_call, softmax_attention


def view_mask(targets: Tensor, length: int) -> Tensor:
    """Views (V,) that are targets -> bool (L, L) for ``length`` tokens a view: who may see whom."""
    sees = targets[:, None] | ~targets[None, :]
    return sees.repeat_interleave(length, 0).repeat_interleave(length, 1)


def aggregate_with_mask(aggregator: Any, patches: Tensor, grid: tuple[int, int], mask: Tensor) -> Tensor:
    """The last output (B, V, P, 2C) of one pass whose global blocks have a dense mask (L, L); views in their order."""
    batch, views = patches.shape[:2]
    x = torch.cat([aggregator.special_tokens(batch, views), patches], dim=2)
    length = x.shape[2]
    within = aggregator.rope(grid, prefix=aggregator.prefix, first=1)
    over = aggregator.rope(grid, prefix=aggregator.prefix, first=1, views=views)
    framed = x
    for frame, block in zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True):
        framed = frame(x.flatten(0, 1), rotate=within).view(batch, views * length, -1)
        x = framed + block.ls1(block.attn(block.norm1(framed), rotate=over, mask=mask))
        x = (x + block.ls2(block.mlp(block.norm2(x)))).view(batch, views, length, -1)
    return torch.cat([framed.view_as(x), x], dim=-1)


def aggregate_explicitly(aggregator: Any, images: Tensor) -> list[Tensor]:
    """All outputs (B, V, P, 2C) from pictures (B, V, 3, H, W): attention written out, rotary tables in every call."""
    batch, views = images.shape[:2]
    vit = aggregator.patch_embed
    grid = vit.grid(images.shape[-2], images.shape[-1])
    patches = _vit(vit, images.flatten(0, 1), grid).unflatten(0, (batch, views))
    x = torch.cat([aggregator.special_tokens(batch, views), patches], dim=2)
    length = x.shape[2]
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack([rows, columns], dim=-1).reshape(-1, 2) + 1
    position = torch.cat([place.new_zeros(aggregator.prefix, 2), place])
    outputs = []
    for frame, block in zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True):
        framed = _block(frame, x.flatten(0, 1), position.expand(batch * views, -1, -1))
        framed = framed.view(batch, views * length, -1)
        x = _block(block, framed, position.repeat(views, 1).expand(batch, -1, -1)).view(batch, views, length, -1)
        outputs.append(torch.cat([framed.view_as(x), x], dim=-1))
    return outputs


def _vit(vit: Any, images: Tensor, grid: tuple[int, int]) -> Tensor:
    from models.encoders.vggt.blocks import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    x = vit.patch_embed["proj"]((images - mean) / std).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.positions(grid)
    x = torch.cat([x[:, :1], vit.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for block in vit.blocks:
        x = _block(block, x, None)
    return vit.norm(x)[:, 1 + vit.register_tokens.shape[1] :]


def _block(block: Any, x: Tensor, positions: Tensor | None) -> Tensor:
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if positions is not None:
        q, k = rope_per_call(q, positions), rope_per_call(k, positions)
    x = x + block.ls1(attention.proj(softmax_attention(q, k, v)))
    return x + block.ls2(block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))))
