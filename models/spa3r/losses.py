"""The losses of Spa3R's pre-training, as sums over patches and the counts that they are means over.

Per predicted target: ``<target>_l1``, the absolute (or smooth, beta 1) difference averaged over channels, and
``<target>_cosine``, 1 - cosine; and ``depth_probe``. Everything is float32, inside autocast too; a sample of weight 0
adds nothing. The trainer divides by the count over the whole global batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ModelError
from models.spa3r.model import Field

L1, SMOOTH_L1 = DIFFERENCES = ("l1", "smooth_l1")
TARGET_VIEWS, ALL_VIEWS = LOSS_VIEWS = ("targets", "all")
DEPTH_PROBE = "depth_probe"


@dataclass(frozen=True, kw_only=True)
class FieldObjective:
    """Settings of the losses; their defaults are those of ``recipe.spa3r`` in the run's config."""

    loss: str
    """l1 | smooth_l1."""
    loss_views: str
    """targets | all: which views are decoded and compared."""
    targets: tuple[str, ...]
    """What the model predicts: keys of its setting ``targets``."""
    depth_probe: bool
    """Whether the model has a probe."""

    def __post_init__(self) -> None:
        """ModelError for a value that is not allowed."""
        for name, value, allowed in (
            ("loss", self.loss, DIFFERENCES),
            ("loss_views", self.loss_views, LOSS_VIEWS),
        ):
            if value not in allowed:
                raise ModelError(f"recipe.spa3r.{name}={value!r}: allowed are {', '.join(allowed)}")

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms."""
        return loss_terms(self.targets, self.depth_probe)


def loss_terms(targets: Sequence[str], depth_probe: bool) -> tuple[str, ...]:
    """Names of the loss terms of a model with these targets: keys of ``recipe.losses``."""
    pairs = [f"{target}_{term}" for target in targets for term in ("l1", "cosine")]
    return (*pairs, DEPTH_PROBE) if depth_probe else tuple(pairs)


def field_sums(
    field: Field, targets: Mapping[str, Tensor], depth: Tensor | None, weight: Tensor, objective: FieldObjective
) -> dict[str, Tensor]:
    """Sum of every term over all patches of the given views.

    Args:
        field: predictions.
        targets: target -> (B, V, n, channels).
        depth: (B, V, n), or None without a probe.
        weight: (B,) of the samples.
        objective: settings.

    ModelError where a prediction and its target differ in shape.
    """
    with torch.autocast(weight.device.type, enabled=False):
        sums = {}
        for name in objective.targets:
            predicted, true = field.predicted[name].float(), targets[name].float()
            if predicted.shape != true.shape:
                raise ModelError(
                    f"target {name}: the model predicts {tuple(predicted.shape[1:])} a sample, its encoder gives "
                    f"{tuple(true.shape[1:])}; model.overrides.targets.{name} must be that encoder's width"
                )
            difference = pointwise(predicted, true, objective.loss).mean(-1)
            sums[f"{name}_l1"] = _weighted(difference, weight)
            sums[f"{name}_cosine"] = _weighted(1 - F.cosine_similarity(predicted, true, dim=-1), weight)
        if objective.depth_probe:
            if field.depth is None or depth is None:
                raise ModelError("the depth probe needs a model with depth_probe=true and the column 'depth'")
            sums[DEPTH_PROBE] = _weighted(pointwise(field.depth.float(), depth.float(), objective.loss), weight)
        return sums


def field_counts(weight: Tensor, views: int, patches: int, objective: FieldObjective) -> dict[str, float]:
    """Weighted patches of every term: samples (B,) of ``views`` views of ``patches`` patches."""
    count = float(weight.double().sum()) * views * patches
    return dict.fromkeys(objective.terms, count)


def pointwise(predicted: Tensor, true: Tensor, loss: str) -> Tensor:
    """Every element's |difference|, or its smooth form with beta 1."""
    if loss == L1:
        return (predicted - true).abs()
    return F.smooth_l1_loss(predicted, true, reduction="none")


def resize_features(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features (B, V, h', w', C) of another grid -> (B, V, n, C), bilinear, corners not aligned.

    So tokens of 16-pixel patches of a square copy of the picture meet VGGT's 14-pixel patches.
    """
    batch, views, *old, _ = features.shape
    if tuple(old) == tuple(grid):
        return features.flatten(2, 3)
    planes = features.flatten(0, 1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(planes, size=tuple(grid), mode="bilinear", align_corners=False)
    return resized.flatten(2).mT.unflatten(0, (batch, views))


def _weighted(terms: Tensor, weight: Tensor) -> Tensor:
    return (terms.flatten(1).sum(1) * weight).sum()
