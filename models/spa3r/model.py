"""Spa3R: latents that hold a scene, from VGGT's features of a few views, and what they predict at any camera.

The encoder reads the features of the context views beside learned queries; the queries' outputs are the latents. The
decoder reads the latents and the rays of one view and gives a feature for every patch, from which heads predict what
frozen networks see there. A probe reads depth from the same features and teaches them nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.layers import Linear, Mlp, Rope2d
from models.layers.prope import Prope
from models.spa3r.cameras import Cameras, cameras_of
from models.spa3r.transformer import FieldTransformer, Positions, initialise, rotary_positions

GEO, SEM, CLIP = TARGETS = ("geo", "sem", "clip")
"""What can be predicted: VGGT's features, those of DINOv3 (or another encoder in its place), and those of CLIP."""
PROPE, PLUCKER = CAMERAS = ("prope", "plucker")


class Field(NamedTuple):
    """What the model says of B scenes and V cameras in each."""

    latents: Tensor
    """(B, queries, width)."""
    predicted: dict[str, Tensor]
    """Target -> (B, V, n, channels)."""
    depth: Tensor | None
    """(B, V, n), in VGGT's unit; None without a probe."""


class Spa3R(nn.Module):
    """Encoder, decoder and heads; parameters are named as published.

    Args:
        channels: width of VGGT's features (twice its own width).
        width: of the tokens.
        heads: attention heads.
        encoder_layers, decoder_layers: blocks.
        queries: latents of a scene.
        registers: additional tokens of each transformer.
        mlp_ratio: hidden width of every MLP over ``width``.
        targets: what is predicted -> its channels; keys of :data:`TARGETS`.
        camera: prope (rays in the camera's frame; the pose enters attention) | plucker (rays in the world, the paper's
            ablation; attention knows the grid only).
        depth_probe: whether a probe reads depth.
        rope_base: of all rotary embeddings.
    """

    #: Frozen networks that published checkpoints hold beside.
    reference_ignored = ("aggregator.*", "camera_head.*", "point_head.*", "depth_head.*", "track_head.*", "dino.*")

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        heads: int,
        encoder_layers: int,
        decoder_layers: int,
        queries: int,
        registers: int,
        mlp_ratio: float,
        targets: Mapping[str, int],
        camera: str,
        depth_probe: bool,
        rope_base: float,
    ) -> None:
        super().__init__()
        _check(targets, camera, queries)
        self.channels, self.width, self.camera = channels, width, camera
        hidden = int(width * mlp_ratio)
        self.projection = Linear(channels, width)
        self.query_embed = nn.Embedding(queries, width)
        self.pose_tokenizer = Linear(6 if camera == PLUCKER else 3, width)
        self.encoder = FieldTransformer(width, heads, encoder_layers, registers, mlp_ratio)
        self.decoder = FieldTransformer(width, heads, decoder_layers, registers, mlp_ratio)
        self.heads = nn.ModuleDict({name: Mlp(width, hidden, out) for name, out in targets.items()})
        self.depth_prob = Mlp(width, hidden, 1) if depth_probe else None
        self.rope = Rope2d(width // heads, rope_base)
        self.prope = Prope(width // heads, rope_base)
        initialise(self)

    @property
    def queries(self) -> int:
        """Latents of a scene."""
        return self.query_embed.num_embeddings

    def forward(self, context: Tensor, pose: Tensor, grid: tuple[int, int]) -> Field:
        """Features (B, Vc, n, channels) of the context, cameras (B, V, 9) -> what is predicted at the cameras.

        ``grid`` (rows, columns) is that of all views; n is their product.
        """
        latents = self.encode(context, grid)
        return self.read(latents, self.decode(latents, pose, grid))

    def encode(self, context: Tensor, grid: tuple[int, int]) -> Tensor:
        """VGGT's last features of the context views (B, Vc, n, channels) -> latents (B, queries, width).

        The order of the views has no effect on it beside what VGGT has put into the features.
        """
        rows, columns = grid
        if context.ndim != 4 or 0 in context.shape or context.shape[2:] != (rows * columns, self.channels):
            raise ModelError(
                f"the encoder takes features (B, views, {rows}*{columns}, {self.channels}) of at least one context "
                f"view, got {tuple(context.shape)}; model.overrides.channels must be twice VGGT's width"
            )
        patches = self.projection(context.float()).flatten(1, 2)
        # The layer is called, its weight is not read: what shards weights hooks calls.
        queries = self.query_embed(torch.arange(self.queries, device=patches.device))
        queries = queries.to(patches.dtype).expand(len(patches), -1, -1)
        positions = rotary_positions(
            self.rope, grid, still=self.encoder.registers + self.queries, views=context.shape[1], like=patches
        )
        return self.encoder(torch.cat([queries, patches], dim=1), positions)[:, : self.queries]

    def decode(self, latents: Tensor, pose: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents (B, queries, width) and cameras (B, V, 9), VGGT's encoding -> tokens (B, V, n, width).

        Every view is decoded by itself, with latents of its own.
        """
        if pose.ndim != 3 or len(pose) != len(latents) or not pose.shape[1]:
            raise ModelError(f"cameras are (B, views, 9) for {len(latents)} scenes, got {tuple(pose.shape)}")
        views = pose.shape[1]
        cameras = cameras_of(pose.flatten(0, 1), grid, plucker=self.camera == PLUCKER)
        rays = self.pose_tokenizer(cameras.rays)
        shared = latents[:, None].expand(-1, views, -1, -1).flatten(0, 1).to(rays.dtype)
        tokens = self.decoder(torch.cat([shared, rays], dim=1), self._positions(cameras, grid))
        return tokens[:, self.queries :].unflatten(0, (-1, views))

    def read(self, latents: Tensor, tokens: Tensor) -> Field:
        """What the heads say of decoded tokens (B, V, n, width); the probe's gradient ends at the tokens."""
        predicted = {name: head(tokens) for name, head in self.heads.items()}
        depth = None if self.depth_prob is None else self.depth_prob(tokens.detach())[..., 0]
        return Field(latents, predicted, depth)

    def _positions(self, cameras: Cameras, grid: tuple[int, int]) -> Positions:
        if self.camera == PROPE:
            return self.prope(cameras.projection[:, None], cameras.back[:, None], grid)
        still = self.decoder.registers + self.queries
        return rotary_positions(self.rope, grid, still=still, views=1, like=cameras.rays)

    def adapt_reference(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Published training checkpoints put ``model.`` before every name."""
        return without_prefix(state)


def without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without ``model.`` before their names, where all have it."""
    if state and all(name.startswith("model.") for name in state):
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return state


def _check(targets: Mapping[str, int], camera: str, queries: int) -> None:
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets:
        raise ModelError(f"targets={dict(targets)}: at least one of {', '.join(TARGETS)} with its channels")
    if camera not in CAMERAS:
        raise ModelError(f"camera={camera!r}: allowed are {', '.join(CAMERAS)}")
    if queries < 1:
        raise ModelError(f"queries={queries}: at least one latent is needed")
