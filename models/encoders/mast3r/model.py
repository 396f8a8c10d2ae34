"""MASt3R whole: CroCo's ViT on each view, the dual decoder, and a set of heads for each view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.encoders.mast3r import published
from models.encoders.mast3r.activations import Activations
from models.encoders.mast3r.decoder import DualDecoder
from models.encoders.mast3r.head import PairHead
from models.errors import ModelError
from models.layers.block import Block
from models.layers.rope import Rope2d
from models.spec import ModelSpec


class CrocoEncoder(nn.Module):
    """The ViT of CroCo v2 (Weinzaepfel et al. 2023): patches, pre-norm blocks with 2-D rotary positions, final norm."""

    def __init__(
        self, *, width: int, depth: int, heads: int, patch: int, mlp_ratio: float = 4.0, rope_base: float = 100.0
    ) -> None:
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.rope = Rope2d(width // heads, rope_base)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised images (B, 3, H, W) -> tokens (B, N, width) row by row, and their grid (rows, columns)."""
        if images.shape[-2] % self.patch or images.shape[-1] % self.patch:
            raise ModelError(
                f"image of {images.shape[-2]}x{images.shape[-1]} pixels: both sides must be multiples of the patch, "
                f"{self.patch}"
            )
        x = self.patch_embed(images)
        grid = (x.shape[-2], x.shape[-1])
        x, rotate = x.flatten(2).transpose(1, 2), self.rope(grid)
        for block in self.blocks:
            x = block(x, rotate=rotate)
        return self.norm(x), grid


class Mast3r(nn.Module):
    """Two images to points in the first camera's frame, confidences and descriptors of both.

    Args:
        encoder_width, encoder_depth, encoder_heads: CroCo's ViT.
        width, depth, heads: the decoder's stacks.
        patch: pixels of a patch's side.
        descriptor: channels of a descriptor.
        dpt_levels, dpt_width: see :class:`models.layers.dpt.DPTTrunk`.
        rgb_hidden: channels before the last layer of the colour tail; 0 for none.
        own_confidence, modes: see :class:`PairHead`.
    """

    def __init__(
        self,
        *,
        encoder_width: int,
        encoder_depth: int,
        encoder_heads: int,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        descriptor: int,
        dpt_levels: Sequence[int],
        dpt_width: int,
        rgb_hidden: int,
        mlp_ratio: float = 4.0,
        rope_base: float = 100.0,
        own_confidence: bool = True,
        modes: Activations | None = None,
    ) -> None:
        super().__init__()
        self.encoder = CrocoEncoder(
            width=encoder_width, depth=encoder_depth, heads=encoder_heads, patch=patch, mlp_ratio=mlp_ratio,
            rope_base=rope_base,
        )  # fmt: skip
        self.decoder = DualDecoder(
            in_width=encoder_width, width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio, rope_base=rope_base
        )
        self.head1, self.head2 = (
            PairHead(
                in_width=encoder_width, width=width, depth=depth, patch=patch, descriptor=descriptor,
                dpt_levels=dpt_levels, dpt_width=dpt_width, rgb_hidden=rgb_hidden, own_confidence=own_confidence,
                modes=modes,
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, image1: Tensor, image2: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Normalised images (B, 3, H, W) -> the maps of each view, see :meth:`PairHead.forward`."""
        if image1.shape == image2.shape:
            tokens, grid1 = self.encoder(torch.cat([image1, image2]))
            (tokens1, tokens2), grid2 = tokens.chunk(2), grid1
        else:
            (tokens1, grid1), (tokens2, grid2) = self.encoder(image1), self.encoder(image2)
        features1, features2 = self.decoder(tokens1, tokens2, grid1, grid2)
        return self.head1(features1, grid1), self.head2(features2, grid2)

    reference_ignored = published.UNUSED

    def reference_names(self) -> dict[str, str]:
        """Our tensor name -> MASt3R's."""
        parts = {"patch_embed": "patch_embed.proj", "blocks": "enc_blocks", "norm": "enc_norm"}
        names = published.decoder_names(self.decoder, self.head1, self.head2)
        for name in self.encoder.state_dict():
            part, _, rest = name.partition(".")
            names[f"encoder.{name}"] = f"{parts[part]}.{rest}"
        return names

    def adapt_reference(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict without aliases, and with both stacks."""
        return published.adapt(state_dict)


def _size(name: str, **defaults: object) -> ModelSpec:
    return ModelSpec(
        name=name, build=Mast3r, defaults={"rgb_hidden": 0, **defaults},
        doc="MASt3R: pointmaps, confidences and descriptors of two views. A part; no recipe trains it by itself.",
    )  # fmt: skip


MAST3R_TINY = _size(
    "mast3r-tiny", encoder_width=64, encoder_depth=2, encoder_heads=2, width=48, depth=4, heads=3, patch=8,
    descriptor=16, dpt_levels=(16, 32, 48, 64), dpt_width=32,
)  # fmt: skip
MAST3R_SMALL = _size(
    "mast3r-small", encoder_width=384, encoder_depth=12, encoder_heads=6, width=384, depth=8, heads=6, patch=16,
    descriptor=24, dpt_levels=(48, 96, 192, 384), dpt_width=128,
)  # fmt: skip
# MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric.
MAST3R_LARGE = _size(
    "mast3r-large", encoder_width=1024, encoder_depth=24, encoder_heads=16, width=768, depth=12, heads=12, patch=16,
    descriptor=24, dpt_levels=(96, 192, 384, 768), dpt_width=256,
)  # fmt: skip
