"""UniUGG's second training (P2): the Spatial-VAE learns to hold a view's tokens in a small latent, end to end with the
spatial decoder that reads them (arXiv 2508.11952, section 3.2).

The ViT is frozen and its tokens come as data. The decoder is fed with reconstructions of both views, or, for a share
of the pairs, of exactly one: when a view is imagined later, the reference is an original and the target is not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import draws, registry
from models.errors import ModelError
from models.spec import Batch, ModelSpec, RoleSpec, StepOutput
from models.uniugg.losses import SpatialObjective, View, spatial_counts, spatial_sums
from models.uniugg.spatial import BLOCKS, SpatialDecoder
from models.uniugg.vae import SpatialVae

PAIR = "pair"


@dataclass(frozen=True, kw_only=True)
class LatentObjective:
    """Settings of the second training's losses."""

    spatial: SpatialObjective
    mixed_share: float
    """Share of the pairs of which exactly one view is a reconstruction."""


class Reconstructed(NamedTuple):
    """What the model made of a batch of pairs."""

    residual: Tensor
    """(B, 2, h, w, C): reconstruction minus original, in deviations of each channel."""
    mean: Tensor
    """(B, 2, latent channels, 2h, 2w), like ``logvar`` of the posterior."""
    logvar: Tensor
    views: tuple[View, View]
    """Maps of both views, in both orders where asked for."""


class LatentModel(nn.Module):
    """The VAE and the spatial decoder, which is trained along or only passes gradients on to the VAE."""

    def __init__(self, vae: SpatialVae, spatial_decoder: SpatialDecoder, *, finetune_spatial_decoder: bool) -> None:
        super().__init__()
        if vae.channels != spatial_decoder.in_width:
            raise ModelError(
                f"the VAE gives tokens of {vae.channels} channels, the spatial decoder takes "
                f"{spatial_decoder.in_width}; both must be those of encoders.vit"
            )
        self.vae, self.spatial_decoder = vae, spatial_decoder
        spatial_decoder.requires_grad_(finetune_spatial_decoder)

    def forward(self, tokens: Tensor, draw: Tensor, *, mixed_share: float, symmetrise: bool) -> Reconstructed:
        """Tokens (B, 2, h, w, C) of pairs and the keys (B,) of their draws -> reconstruction and maps."""
        posterior_shape = (2, self.vae.latent_channels, 2 * tokens.shape[2], 2 * tokens.shape[3])
        noise = draws.normal(draw, posterior_shape, "posterior").flatten(0, 1)
        rebuilt, posterior = self.vae(tokens.flatten(0, 1), noise)
        rebuilt = rebuilt.unflatten(0, (-1, 2))
        originals = kept_originals(draw, mixed_share)[..., None, None, None]
        first, second = torch.where(originals, tokens.float(), rebuilt).unbind(1)
        if symmetrise:
            first, second = torch.cat([first, second]), torch.cat([second, first])
        return Reconstructed(
            residual=(rebuilt - tokens.float()) / self.vae.token_std,
            mean=posterior.mean.unflatten(0, (-1, 2)),
            logvar=posterior.logvar.unflatten(0, (-1, 2)),
            views=self.spatial_decoder(first, second),
        )


def kept_originals(draw: Tensor, mixed_share: float) -> Tensor:
    """(B, 2) bool: the view keeps its original tokens. Of a mixed pair exactly one does, of the others none."""
    chance, side = draws.uniform(draw, (2,), "mixed").unbind(1)
    first = side < 0.5
    return (chance < mixed_share)[:, None] & torch.stack([first, ~first], dim=1)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Of a normal distribution from the standard one, element by element, float32."""
    mean, logvar = mean.float(), logvar.float()
    return -0.5 * (1 + logvar - mean.square() - logvar.exp())


def step(
    module: nn.Module, batch: Batch, received: Mapping[str, Tensor], *, objective: LatentObjective | None = None
) -> StepOutput:
    """Forward and loss sums of one micro-batch of pairs."""
    assert not received, "P2 has no edges"
    assert objective is not None, "bind the objective first"
    out = module(
        pair_tokens(batch),
        batch["draw"],
        mixed_share=objective.mixed_share,
        symmetrise=objective.spatial.symmetrise,
    )
    # The mean over channels here, the count over pixels: their ratio is the mean over elements for any number of them.
    kl = kl_divergence(out.mean, out.logvar).mean(2)
    sums = {"reconstruction": _weighted(out.residual.square(), batch), "kl": _weighted(kl, batch)}
    view1, view2 = out.views
    return StepOutput(sums=sums | spatial_sums(view1, view2, batch, objective.spatial))


def counts(batch: Batch, *, objective: LatentObjective | None = None) -> dict[str, float]:
    """Weighted elements of tokens, pixels of latents, and what the spatial terms count."""
    assert objective is not None, "bind the objective first"
    tokens, weight = pair_tokens(batch), float(batch["weight"].double().sum())
    latent = 2 * 4 * tokens.shape[2] * tokens.shape[3]
    return {
        "reconstruction": weight * tokens[0].numel(),
        "kl": weight * latent,
        **spatial_counts(batch, objective.spatial),
    }


def pair_tokens(batch: Batch) -> Tensor:
    """Tokens (B, 2, h, w, C) of the only layer. ModelError for another kind of batch or more layers."""
    tokens: Tensor = batch["tokens"]
    if batch["kind"] != PAIR or tokens.ndim != 6 or tokens.shape[1:3] != (2, 1):
        raise ModelError(
            f"P2 takes pairs with tokens (B, 2, 1, h, w, C), got {batch['kind']!r} with {tuple(tokens.shape)}; check "
            "recipe.quotas and encoders.vit.layers"
        )
    return tokens[:, :, 0]


def _weighted(terms: Tensor, batch: Batch) -> Tensor:
    total, weight = terms.flatten(1).sum(1), batch["weight"]
    return torch.where(weight > 0, total * weight, torch.zeros_like(total)).sum()


TRAINER = RoleSpec(name="trainer", step=step, counts=counts, kinds=(PAIR,), checkpointed=("Block", *BLOCKS))

#: Size -> size of the spatial decoder that belongs to it.
_DECODER = {"base": "large", "small": "small", "tiny": "tiny"}


def build_latent(
    size: str, *, vae: Mapping[str, Any], spatial_decoder: Mapping[str, Any], finetune_spatial_decoder: bool
) -> LatentModel:
    """The model of a size; ``vae`` and ``spatial_decoder`` override settings of these parts (those of a saved part)."""
    made_vae = registry.build(f"spatial-vae-{size}", **vae)
    made_decoder = registry.build(f"uniugg-spatial-decoder-{_DECODER[size]}", **spatial_decoder)
    assert isinstance(made_vae, SpatialVae)
    assert isinstance(made_decoder, SpatialDecoder)
    return LatentModel(made_vae, made_decoder, finetune_spatial_decoder=finetune_spatial_decoder)


def _size(size: str) -> ModelSpec:
    return ModelSpec(
        name=f"uniugg-latent-{size}",
        build=functools.partial(build_latent, size),
        defaults={"vae": {}, "spatial_decoder": {}, "finetune_spatial_decoder": True},
        roles=(TRAINER,),
        doc="UniUGG's second training: the Spatial-VAE with the spatial decoder.",
    )


LATENT_BASE, LATENT_SMALL, LATENT_TINY = (_size(size) for size in _DECODER)
