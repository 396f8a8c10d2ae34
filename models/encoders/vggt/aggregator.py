"""VGGT's aggregator: attention within each view and over all views, in turns, and Spa3R's asymmetric form of it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from models.encoders.vggt.blocks import DinoViT, Grid, ScaledBlock
from models.errors import ModelError
from models.layers.rope import Rope2d


class Aggregator(nn.Module):
    """A ViT on each view, then ``depth`` layers of a frame block (one view) and a global block (all views).

    Every view has a camera token and ``registers`` register tokens before its patches; those of view 0 are learned
    apart from those of the others, which makes its camera the frame of the world.

    Args:
        width, heads: of all blocks.
        depth: layers; each has a frame block and a global block.
        vit_depth: blocks of the ViT.
        patch, image_size, registers, mlp_ratio: see :class:`DinoViT`.
        rope_base: base of the rotary embedding.
        qk_norm: ``layernorm`` or ``rmsnorm``, the norm of queries and keys in the *global* blocks: RMSNorm is what the
            weights that Spa3R released were made with.
        layer_scale: start of the layer scale of the frame and global blocks.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        depth: int,
        vit_depth: int,
        patch: int,
        image_size: int,
        registers: int = 4,
        mlp_ratio: float = 4.0,
        rope_base: float = 100.0,
        qk_norm: str = "layernorm",
        layer_scale: float = 0.01,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ModelError(f"VGGT: depth must be at least 1, got {depth}")
        if qk_norm not in ("layernorm", "rmsnorm"):
            raise ModelError(f"VGGT: qk_norm={qk_norm!r}; allowed are layernorm and rmsnorm")
        self.width, self.prefix = width, 1 + registers
        self.patch_embed = DinoViT(
            width=width, depth=vit_depth, heads=heads, patch=patch, image_size=image_size, registers=registers,
            mlp_ratio=mlp_ratio,
        )  # fmt: skip
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(
                ScaledBlock(width, heads, mlp_ratio=mlp_ratio, qk_norm=norm, layer_scale=layer_scale)
                for _ in range(depth)
            )
            for norm in ("layernorm", qk_norm)
        )
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, width))
        self.register_token = nn.Parameter(torch.empty(1, 2, registers, width))
        for token in (self.camera_token, self.register_token):
            nn.init.trunc_normal_(token, std=0.02)
        self.rope = Rope2d(width // heads, rope_base)

    def patch_tokens(self, images: Tensor) -> Tensor:
        """The stage of single pictures: (N, 3, H, W) in [0, 1] -> (N, h * w, width), the same in any set of views."""
        return self.patch_embed(images)

    def forward(
        self,
        patch_tokens: Tensor,
        grid: Grid,
        targets: Tensor | None = None,
        keep: Collection[int] = (),
    ) -> dict[int, Tensor]:
        """Patch tokens (B, V, h * w, width) -> for each layer of ``keep`` its output (B, V, prefix + h * w, 2 * width).

        An output is the frame block's beside the global block's, not normalised, views in the order given. Layers
        after the last one of ``keep`` are not computed.

        Args:
            patch_tokens: of :meth:`patch_tokens`, view 0 first.
            grid: rows h and columns w of the patches.
            targets: bool (B, V), True for the views that the others must not see: context views see context views, as
                if the targets were not there, and target views see all. None: all see all.
            keep: layers from 0.

        Raises:
            ModelError: a layer that does not exist; tokens that are no such grid; view 0 as a target, which is the
                world's frame; samples with different numbers of targets.
        """
        layers = self._layers(keep)
        batch, views, patches, _ = patch_tokens.shape
        if patches != grid[0] * grid[1]:
            raise ModelError(f"VGGT: {patches} patch tokens a view are no grid of {grid[0]}x{grid[1]}")
        order, contexts = context_first(targets, batch, views)
        x = torch.cat(
            [self.special_tokens(batch, views), _take(patch_tokens.to(self.camera_token.dtype), order)], dim=2
        )
        length = x.shape[2]
        within = self.rope(grid, prefix=self.prefix, first=1)
        over = self.rope(grid, prefix=self.prefix, first=1, views=views)
        kept = {}
        for index in range(max(layers, default=-1) + 1):
            framed = self.frame_blocks[index](x.flatten(0, 1), rotate=within).view(batch, views * length, -1)
            x = self.global_blocks[index](framed, rotate=over, context=contexts * length)
            x = x.view(batch, views, length, -1)
            if index in layers:
                kept[index] = torch.cat([framed.view_as(x), x], dim=-1)
        back = None if order is None else order.argsort(dim=1)
        return {index: _take(output, back) for index, output in kept.items()}

    def _layers(self, keep: Collection[int]) -> set[int]:
        depth = len(self.frame_blocks)
        if wrong := sorted(layer for layer in keep if not 0 <= layer < depth):
            raise ModelError(f"VGGT: there are no layers {wrong} to keep: layers count from 0 to {depth - 1}")
        return set(keep)

    def special_tokens(self, batch: int, views: int) -> Tensor:
        """Camera and register tokens (B, V, prefix, width); view 0 has its own, and stays first in any order."""
        tokens = torch.cat([self.camera_token, self.register_token], dim=2)
        return torch.cat([tokens[:, :1], tokens[:, 1:].expand(-1, views - 1, -1, -1)], dim=1).expand(batch, -1, -1, -1)


def context_first(targets: Tensor | None, batch: int, views: int) -> tuple[Tensor | None, int]:
    """Order of the views (B, V) that puts the context first and keeps the order among equals, and their number.

    (None, 0) where no view is a target. ModelError as in :meth:`Aggregator.forward`.
    """
    if targets is None:
        return None, 0
    if targets.dtype != torch.bool or tuple(targets.shape) != (batch, views):
        raise ModelError(f"VGGT: targets must be bool ({batch}, {views}), got {targets.dtype} {tuple(targets.shape)}")
    first, *others = (counts := targets.sum(1).tolist())
    if any(other != first for other in others):
        raise ModelError(f"VGGT: samples of one batch must have equally many target views, got {counts}")
    if targets[:, 0].any():
        raise ModelError("VGGT: view 0 is a target; it must be context, since its camera is the frame of the world")
    if not first:
        return None, 0
    return targets.to(torch.uint8).argsort(dim=1, stable=True), views - first


def _take(x: Tensor, order: Tensor | None) -> Tensor:
    """Views (B, V, ...) in another order (B, V)."""
    if order is None:
        return x
    order = order.to(x.device)
    return x[torch.arange(len(x), device=x.device)[:, None], order]
