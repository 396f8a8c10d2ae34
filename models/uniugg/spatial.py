"""UniUGG's spatial decoder: visual projector, MASt3R's dual decoder, a set of heads with colours for each view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.checkpoints import LoadReport, load_reference
from models.encoders.mast3r import published
from models.encoders.mast3r.decoder import DualDecoder
from models.encoders.mast3r.head import PairHead
from models.errors import ModelError
from models.layers.block import Mlp
from models.spec import ModelSpec

BLOCKS = ("DecoderBlock", "PairHead")
"""Class names of what activation checkpointing wraps: the heads' maps are most of the memory."""


class SpatialDecoder(nn.Module):
    """Patch tokens of two views -> points in the first camera's frame, confidences, descriptors and colours of both.

    Nothing depends on the size of the grid: positions are rotary, the heads are convolutions.

    Args:
        in_width: channels of the ViT's tokens.
        width, depth, heads: of the two stacks of the decoder.
        patch: pixels of a patch's side.
        descriptor: channels D of a descriptor.
        dpt_levels, dpt_width: see :class:`models.layers.dpt.DPTTrunk`.
        rgb_hidden: channels before the last layer of the colour tail; 0 for no colours.
    """

    def __init__(
        self,
        *,
        in_width: int,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        descriptor: int,
        dpt_levels: Sequence[int],
        dpt_width: int,
        rgb_hidden: int,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "in_width": in_width, "width": width, "depth": depth, "heads": heads, "patch": patch,
            "descriptor": descriptor, "dpt_levels": list(dpt_levels), "dpt_width": dpt_width, "rgb_hidden": rgb_hidden,
        }  # fmt: skip
        self.in_width = in_width
        self.projector = Mlp(in_width, in_width)
        self.decoder = DualDecoder(in_width=in_width, width=width, depth=depth, heads=heads)
        self.head1, self.head2 = (
            PairHead(
                in_width=in_width, width=width, depth=depth, patch=patch, descriptor=descriptor,
                dpt_levels=dpt_levels, dpt_width=dpt_width, rgb_hidden=rgb_hidden,
            )
            for _ in range(2)
        )  # fmt: skip
        # As CroCo and DUSt3R begin; the convolutions begin as torch has them.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens1: Tensor, tokens2: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tokens (B, h, w, in_width) of both views -> maps of each, float32, H = h * patch, W = w * patch.

        ``pts3d`` (B, H, W, 3) metres in view 1's frame, ``conf`` (B, H, W), ``desc`` (B, H, W, D) of unit length,
        ``desc_conf`` (B, H, W), ``rgb`` (B, H, W, 3) in [0, 1]. ModelError for tokens of another width.
        """
        for tokens in (tokens1, tokens2):
            if tokens.ndim != 4 or tokens.shape[-1] != self.in_width:
                raise ModelError(
                    f"the spatial decoder takes tokens (B, h, w, {self.in_width}), got {tuple(tokens.shape)}: it was "
                    "built, or trained, for another encoder"
                )
        grid1, grid2 = ((tokens.shape[1], tokens.shape[2]) for tokens in (tokens1, tokens2))
        dtype = self.projector.fc1.weight.dtype
        projected1, projected2 = (self.projector(tokens.flatten(1, 2).to(dtype)) for tokens in (tokens1, tokens2))
        features1, features2 = self.decoder(projected1, projected2, grid1, grid2)
        return self.head1(features1, grid1), self.head2(features2, grid2)

    #: MASt3R's own encoder, whose place UniUGG's ViT takes, and what no forward pass reads.
    reference_ignored = (*published.UNUSED, *published.ENCODER)

    def reference_names(self) -> dict[str, str]:
        """Our tensor name -> MASt3R's, with the names of UniUGG's own additions (``fc1``, ``fc2``, ``rgb_head``)."""
        names = published.decoder_names(self.decoder, self.head1, self.head2)
        return names | {f"projector.{name}": name for name in self.projector.state_dict()}

    def adapt_reference(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict without aliases, and with both stacks."""
        return published.adapt(state_dict)


def load_mast3r(decoder: SpatialDecoder, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Decoder and heads from MASt3R's checkpoint; projector and colour tails, which it lacks, stay as they are."""
    return load_reference(decoder, state_dict, skip=("fc1.*", "fc2.*", "*.rgb_head.*"))


#: Architecture by size; ``in_width`` and ``patch`` are those of the ViT of that size. Large is MASt3R's base decoder.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "in_width": 96, "width": 96, "depth": 4, "heads": 3, "patch": 16, "descriptor": 16,
        "dpt_levels": (24, 48, 64, 96), "dpt_width": 32, "rgb_hidden": 16,
    },
    "small": {
        "in_width": 768, "width": 384, "depth": 8, "heads": 6, "patch": 16, "descriptor": 24,
        "dpt_levels": (48, 96, 192, 384), "dpt_width": 128, "rgb_hidden": 32,
    },
    "large": {
        "in_width": 1024, "width": 768, "depth": 12, "heads": 12, "patch": 16, "descriptor": 24,
        "dpt_levels": (96, 192, 384, 768), "dpt_width": 256, "rgb_hidden": 32,
    },
}  # fmt: skip


def _size(size: str) -> ModelSpec:
    return ModelSpec(
        name=f"uniugg-spatial-decoder-{size}", build=SpatialDecoder, defaults=SIZES[size],
        doc="Projector, dual decoder and heads. A part; recipes uniugg_encoder and uniugg_vae train it.",
    )  # fmt: skip


SPATIAL_TINY, SPATIAL_SMALL, SPATIAL_LARGE = (_size(size) for size in SIZES)
