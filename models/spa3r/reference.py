"""Spa3R beside the frozen networks it was published with: VGGT and a semantic encoder, from pictures to losses.

In training the frozen part runs in the feature service; here both stand together, under the names of the published
checkpoint, to compare with it and to load it whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints import Part, published_names
from models.encoders.vggt import Vggt
from models.spa3r.losses import FieldObjective, field_counts, field_sums, resize_features
from models.spa3r.model import GEO, SEM, Field, Spa3R, without_prefix
from models.spa3r.spec import compared_views, pick, rows_of

SEMANTIC_SIDE = 224
"""Pixels of the square that a picture is stretched to for the semantic encoder."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Frozen(NamedTuple):
    """What the frozen networks say of view sets (B, V); poses and depth are VGGT's."""

    last: Tensor
    """(B, V, prefix + n, 2C): the aggregator's last output, special tokens too."""
    features: Tensor
    """(B, V, n, 2C): its patches."""
    context: Tensor
    """(B, Vc, n, 2C): patches of the context views, which have not seen the others."""
    pose: Tensor
    """(B, V, 9)."""
    depth: Tensor | None
    """(B, V, h, w), nearest to the patch grid."""
    semantic: Tensor | None
    """(B, V, n, Cs), on the patch grid."""
    grid: tuple[int, int]


class Spa3rReference(nn.Module):
    """The container. ``dino`` maps pictures (N, 3, 224, 224), normalised, to (N, h', w', Cs); None leaves it out."""

    def __init__(self, vggt: Vggt, spa3r: Spa3R, dino: nn.Module | None = None) -> None:
        super().__init__()
        self.vggt, self.spa3r, self.dino = vggt.requires_grad_(False), spa3r, dino
        self.reference_ignored = (*vggt.reference_ignored, *(() if dino is not None else ("dino.*",)))
        if dino is not None:
            dino.requires_grad_(False)

    def reference_names(self) -> dict[str, str | Part]:
        """Our names -> published ones: VGGT's and Spa3R's stand side by side, the semantic encoder has a prefix."""
        names: dict[str, str | Part] = {}
        for child in ("vggt", "spa3r"):
            names |= {f"{child}.{ours}": theirs for ours, theirs in published_names(getattr(self, child)).items()}
        return names

    def adapt_reference(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Without the training framework's prefix; VGGT takes its kind of norm from the names."""
        return self.vggt.adapt_reference(without_prefix(state))

    @torch.no_grad()
    def frozen(self, images: Tensor, targets: Tensor | None, *, asymmetric: bool, probe: bool = True) -> Frozen:
        """Pictures (B, V, 3, H, W) in [0, 1] and roles bool (B, V), True for a target (None: all are context).

        With ``asymmetric`` one pass, in which the context does not see the targets; without, one of the context alone
        and one in which all views see all, of which everything but the context is.
        """
        last = self.vggt.depth - 1
        grid = self.vggt.aggregator.patch_embed.grid(images.shape[-2], images.shape[-1])
        out = self.vggt(images, targets if asymmetric else None, keep=(last,), depth=probe)
        context = out.features
        if targets is not None:
            seen = rows_of(~targets)
            alone = None if asymmetric else self.vggt(pick(images, seen), depth=False)
            context = pick(out.features, seen) if alone is None else alone.features
        depth = None if out.depth is None else F.interpolate(out.depth, size=grid, mode="nearest")
        semantic = None if self.dino is None else resize_features(self._semantic(images), grid)
        return Frozen(out.kept[last], out.features, context, out.poses[-1], depth, semantic, grid)

    def _semantic(self, images: Tensor) -> Tensor:
        """Features (B, V, h', w', Cs) of the pictures, stretched and normalised."""
        assert self.dino is not None, "only called with a semantic encoder"
        pictures = F.interpolate(images.flatten(0, 1), size=(SEMANTIC_SIDE,) * 2, mode="bilinear", align_corners=False)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return self.dino((pictures - mean) / std).unflatten(0, images.shape[:2])

    def predict(self, images: Tensor) -> Tensor:
        """Latents (B, queries, width) of pictures (B, V, 3, H, W) that are all context."""
        seen = self.frozen(images, None, asymmetric=True, probe=False)
        return self.spa3r.encode(seen.context, seen.grid)

    def forward(
        self, images: Tensor, targets: Tensor, objective: FieldObjective, *, asymmetric: bool
    ) -> tuple[Frozen, Field, dict[str, Tensor]]:
        """What the frozen networks see, what is predicted at all views, and the mean of every loss term."""
        seen = self.frozen(images, targets, asymmetric=asymmetric, probe=objective.depth_probe)
        field = self.spa3r(seen.context, seen.pose, seen.grid)
        views = compared_views(targets, objective)
        true = {GEO: seen.features, SEM: seen.semantic}
        compared = Field(
            field.latents,
            {name: pick(tensor, views) for name, tensor in field.predicted.items()},
            None if field.depth is None else pick(field.depth, views),
        )
        weight = torch.ones(len(images), device=images.device)
        sums = field_sums(
            compared,
            {name: pick(tensor, views) for name, tensor in true.items() if tensor is not None},
            None if seen.depth is None else pick(seen.depth, views).flatten(2),
            weight,
            objective,
        )
        counts = field_counts(weight, views.shape[1], seen.grid[0] * seen.grid[1], objective)
        return seen, field, {name: value / counts[name] for name, value in sums.items()}
