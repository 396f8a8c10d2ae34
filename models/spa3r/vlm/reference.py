"""A published Spa3-VLM checkpoint holds everything, the frozen geometry encoder too: here its parts are put together.

A run never needs this: the geometry encoder stands in the feature service.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoints import Part, published_names
from models.spa3r.vlm.model import Spa3VLM
from models.spec import Batch

PREFIX = "geometry_encoder.spa3r."


class Spa3VlmReference(nn.Module):
    """Spa3-VLM and the encoder of its latents, under the published names of both.

    Args:
        geometry: Spa3R with what it reads, whose published names begin with :data:`PREFIX` here.
        vlm: with its vision tower.
    """

    def __init__(self, geometry: nn.Module, vlm: Spa3VLM) -> None:
        super().__init__()
        self.geometry, self.vlm = geometry, vlm

    def reference_names(self) -> dict[str, str | Part]:
        """Our tensor name -> published name."""
        names: dict[str, str | Part] = {}
        for ours, theirs in published_names(self.geometry).items():
            names[f"geometry.{ours}"] = (
                dataclasses.replace(theirs, name=PREFIX + theirs.name) if isinstance(theirs, Part) else PREFIX + theirs
            )
        return names | {f"vlm.{ours}": theirs for ours, theirs in published_names(self.vlm).items()}

    @property
    def reference_ignored(self) -> tuple[str, ...]:
        """Published tensors that the geometry encoder has no place for."""
        return tuple(PREFIX + pattern for pattern in getattr(self.geometry, "reference_ignored", ()))

    def adapt_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each part brings its own tensors to one form."""
        inner = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
        adapt: Any = getattr(self.geometry, "adapt_reference", dict)
        rest = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
        return {**self.vlm.adapt_reference(rest), **{PREFIX + name: tensor for name, tensor in adapt(inner).items()}}


def image_batch(vlm: Spa3VLM, ids: Tensor, pixels: Tensor, grid: Tensor, latents: Tensor) -> Batch:
    """Columns of samples whose pictures are given as pixels.

    Args:
        vlm: with its vision tower.
        ids: (B, L) with placeholders.
        pixels: patches of all pictures, see :meth:`Spa3VLM.encode_images`; those of a sample one after the other.
        grid: (pictures, 3) patches in time, rows and columns.
        latents: (B, Q, D).
    """
    pictures = vlm.encode_images(pixels, grid)
    wanted = (ids == vlm.image_token_id).sum(1).tolist()
    side = int(vlm.language.config.vision_config.spatial_merge_size)
    samples, grids, merged, place = [], [], grid[:, 1:] // side, 0
    for tokens in wanted:
        first = place
        while place < len(pictures) and sum(map(len, pictures[first:place])) < tokens:
            place += 1
        samples.append(torch.cat([ids.new_zeros(0, vlm.width, dtype=pixels.dtype), *pictures[first:place]]))
        grids.append(merged[first:place])
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": ids,
        "segments": torch.zeros_like(ids),
        "visual": pad(samples, batch_first=True),
        "visual_lengths": torch.tensor([len(sample) for sample in samples], device=ids.device),
        "grids": pad(grids, batch_first=True),
        "grids_lengths": torch.tensor([len(sample) for sample in grids], device=ids.device),
        "latents": latents,
    }
