"""UniUGG's first training (P1): a ViT learns geometry from pairs of views while it keeps its teacher's semantics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.spec import Batch, ModelSpec, RoleSpec, StepOutput
from models.uniugg import encoder as encoder_sizes
from models.uniugg import spatial as spatial_sizes
from models.uniugg.encoder import StudentViT, normalise, viewport_numbers
from models.uniugg.losses import (
    SemanticObjective,
    SpatialObjective,
    View,
    semantic_counts,
    semantic_sums,
    spatial_counts,
    spatial_sums,
)
from models.uniugg.spatial import BLOCKS, SpatialDecoder

PAIR, VIEW, ITEM = KINDS = ("pair", "view", "item")


class Pretrained(NamedTuple):
    """What the model says about the images of a batch."""

    tokens: Tensor
    """(B, V, h, w, C)."""
    summary: Tensor
    """(B, V, k, C)."""
    views: tuple[View, View] | None
    """Maps of both views of the pairs, in both orders where asked for; None for single images."""
    idle: Tensor
    """Zero; ties what single images do not use to the graph."""


class EncoderPretraining(nn.Module):
    """The student ViT and the spatial decoder that its tokens are read out with.

    Args:
        width, vit_depth, vit_heads, max_image, class_tokens, registers, summaries: see :class:`StudentViT`.
        patch: pixels of a patch's side.
        decoder_width, depth, heads, descriptor, dpt_levels, dpt_width, rgb_hidden: see :class:`SpatialDecoder`.
    """

    def __init__(
        self,
        *,
        width: int,
        vit_depth: int,
        vit_heads: int,
        patch: int,
        max_image: int,
        class_tokens: int,
        registers: int,
        summaries: int,
        decoder_width: int,
        depth: int,
        heads: int,
        descriptor: int,
        dpt_levels: Sequence[int],
        dpt_width: int,
        rgb_hidden: int,
    ) -> None:
        super().__init__()
        self.encoder = StudentViT(
            width=width, depth=vit_depth, heads=vit_heads, patch=patch, max_image=max_image,
            class_tokens=class_tokens, registers=registers, summaries=summaries,
        )  # fmt: skip
        self.spatial_decoder = SpatialDecoder(
            in_width=width, width=decoder_width, depth=depth, heads=heads, patch=patch, descriptor=descriptor,
            dpt_levels=dpt_levels, dpt_width=dpt_width, rgb_hidden=rgb_hidden,
        )  # fmt: skip

    def forward(
        self, image: Tensor, *, pairs: bool, symmetrise: bool = False, draw: Tensor | None = None
    ) -> Pretrained:
        """Bytes (B, V, H, W, 3) -> tokens of every image and, for ``pairs`` (V = 2), the maps of both views.

        The encoder sees every image once; ``symmetrise`` decodes each pair in both orders, the swapped ones behind.
        ``draw`` (B,) gives the encoder a random viewport of its position table for each image.
        """
        viewport = None if draw is None else viewport_numbers(draw, image.shape[1])
        seen = self.encoder(normalise(image.flatten(0, 1)), viewport)
        tokens = seen.tokens.unflatten(0, image.shape[:2])
        summary = seen.summary.unflatten(0, image.shape[:2])
        if not pairs:
            # Every trained parameter takes part in every micro-batch: here on one token, with weight zero.
            least = seen.tokens.new_zeros(1, 1, 1, seen.tokens.shape[-1])
            maps = [tensor.sum() for view in self.spatial_decoder(least, least) for tensor in view.values()]
            return Pretrained(tokens, summary, None, torch.stack(maps).sum() * 0)
        first, second = tokens.unbind(1)
        if symmetrise:
            first, second = torch.cat([first, second]), torch.cat([second, first])
        return Pretrained(tokens, summary, self.spatial_decoder(first, second), tokens.new_zeros(()))


def step(
    module: nn.Module,
    batch: Batch,
    received: Mapping[str, Tensor],
    *,
    spatial: SpatialObjective,
    semantic: SemanticObjective,
    cpe_augment: bool,
) -> StepOutput:
    """Forward and loss sums of one micro-batch of pairs, or of single images (semantic terms only)."""
    assert not received, "P1 has no edges"
    pairs = _kind(batch) == PAIR
    image = _with_views(batch, batch["image"])
    draw = batch["draw"] if cpe_augment else None
    out = module(image, pairs=pairs, symmetrise=spatial.symmetrise, draw=draw)
    teacher = (_with_views(batch, batch["teacher_tokens"])[:, :, -1], _with_views(batch, batch["teacher_summary"]))
    sums = semantic_sums((out.tokens, out.summary), teacher, _image_weights(batch), batch["draw"], semantic)
    sums["semantic_tokens"] = sums["semantic_tokens"] + out.idle.float()
    if out.views is not None:
        view1, view2 = out.views
        sums |= spatial_sums(view1, view2, batch, spatial)
    return StepOutput(sums=sums)


def counts(
    batch: Batch,
    *,
    spatial: SpatialObjective,
    semantic: SemanticObjective,
    cpe_augment: bool,  # noqa: ARG001  step and counts are bound to the same settings
) -> dict[str, float]:
    """Elements of every term of a batch; single images have none of the spatial ones."""
    tokens = batch["teacher_tokens"].shape[-3] * batch["teacher_tokens"].shape[-2]
    found = semantic_counts(_image_weights(batch), tokens, semantic)
    if _kind(batch) == PAIR:
        return found | spatial_counts(batch, spatial)
    return found | dict.fromkeys(("confidence", "matching", "rgb"), 0.0)


def _kind(batch: Batch) -> str:
    if batch["kind"] not in KINDS:
        raise ModelError(f"P1 takes micro-batches of {', '.join(KINDS)}, got {batch['kind']!r}; check recipe.quotas")
    return str(batch["kind"])


def _with_views(batch: Batch, column: Tensor) -> Tensor:
    """The column of single views with an axis of one view behind the samples."""
    return column[:, None] if batch["kind"] == VIEW else column


def _image_weights(batch: Batch) -> Tensor:
    """(B, V): the weight of the sample, and 0 for what only fills up a ragged number of pictures."""
    image, weight = _with_views(batch, batch["image"]), batch["weight"]
    views = image.shape[1]
    lengths = batch.get("image_lengths")
    if lengths is None:
        return weight[:, None].expand(-1, views)
    return weight[:, None] * (torch.arange(views, device=weight.device) < lengths[:, None].to(weight.device))


TRAINER = RoleSpec(
    name="trainer",
    step=step,  # type: ignore[arg-type]  # takes its settings, which a recipe binds
    counts=counts,  # type: ignore[arg-type]
    kinds=KINDS,
    checkpointed=("RadioLayer", *BLOCKS),
)


def _size(size: str) -> ModelSpec:
    vit, decoder = dict(encoder_sizes.SIZES[size]), dict(spatial_sizes.SIZES[size])
    defaults: dict[str, Any] = {"vit_depth": vit.pop("depth"), "vit_heads": vit.pop("heads"), **vit}
    decoder["decoder_width"] = decoder.pop("width")
    del decoder["in_width"]
    return ModelSpec(
        name=f"uniugg-encoder-{size}",
        build=EncoderPretraining,
        defaults=defaults | decoder,
        roles=(TRAINER,),
        doc="UniUGG's first training: a ViT and the spatial decoder, from pairs of views and a teacher.",
    )


ENCODER_TINY, ENCODER_SMALL, ENCODER_LARGE = (_size(size) for size in encoder_sizes.SIZES)
