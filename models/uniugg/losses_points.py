"""The pointmap loss of DUSt3R and MASt3R: regression weighed by the confidence that the network gives itself.

Everything is float32, of fixed shape, and summed under masks: no boolean indexing, which would make shapes depend on
the data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.geometry.poses import relative
from models.geometry.projection import transform, unproject

SKY_ERROR = 2.0
"""Error charged where there is no surface: far more than an indoor point is off by, so that the confidence falls."""

_SMALLEST_SCALE = 1e-8


class PairTargets(NamedTuple):
    """What both views of a pair should show, in the first camera's frame."""

    points: Tensor
    """(B, 2, H, W, 3) metres; the origin of its camera where the depth is unknown."""
    valid: Tensor
    """(B, 2, H, W) bool: the depth is known."""
    sky: Tensor
    """(B, 2, H, W) bool: known to have no surface (negative depth)."""


def pair_targets(depth: Tensor, K: Tensor, pose: Tensor) -> PairTargets:
    """Targets from depth (B, 2, H, W) in metres, K (B, 2, 3, 3) and camera-to-world poses (B, 2, 4, 4).

    Depth 0 or not finite is unknown, negative is sky.
    """
    valid = torch.isfinite(depth) & (depth > 0)
    known = torch.where(valid, depth, 0.0).float()
    to_first = relative(pose[:, :1].float().expand_as(pose), pose.float())
    points = transform(unproject(known, K.float()), to_first)
    points = torch.where(torch.isfinite(points), points, 0.0)  # the camera of a broken sample is all zeros
    return PairTargets(points=points, valid=valid, sky=depth < 0)


def mean_distance(points: Tensor, valid: Tensor) -> Tensor:
    """Mean distance from the origin over the valid pixels of both views: points (B, 2, H, W, 3) -> (B,)."""
    distance = torch.where(valid, torch.linalg.vector_norm(points, dim=-1), 0.0)
    count = valid.sum((1, 2, 3)).clamp_min(1)
    return (distance.sum((1, 2, 3)) / count).clamp_min(_SMALLEST_SCALE)


def point_errors(predicted: Tensor, targets: PairTargets, metric: Tensor) -> Tensor:
    """Distance of predicted points (B, 2, H, W, 3) from the targets, (B, 2, H, W), as a share of the scene's size.

    The target is divided by its mean distance z. The prediction of a sample with ``metric`` (B,) bool is divided by
    the same z, so that it must be right in metres; of another one by its own, so that its scale is free.
    :data:`SKY_ERROR` on sky, 0 where nothing is known.
    """
    known = targets.valid.any(dim=3).any(dim=2).any(dim=1)
    size = torch.where(known, mean_distance(targets.points, targets.valid), 1.0)
    own = torch.where(known, mean_distance(predicted, targets.valid), 1.0)
    divisor = torch.where(metric, size, own)[:, None, None, None, None]
    error = torch.linalg.vector_norm(predicted / divisor - targets.points / size[:, None, None, None, None], dim=-1)
    return torch.where(targets.valid, error, torch.where(targets.sky, SKY_ERROR, 0.0))


def confidence_regression(error: Tensor, confidence: Tensor, counted: Tensor, alpha: float) -> Tensor:
    """``C e - alpha log C`` at every counted pixel, 0 elsewhere (DUSt3R, equation 4). All of one shape.

    It can be negative: a confident and right network is rewarded for its confidence.
    """
    return torch.where(counted, confidence * error - alpha * confidence.log(), 0.0)
