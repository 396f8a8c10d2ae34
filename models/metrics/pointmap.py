"""Errors of pointmaps, and the plane of mean depth that a trained network has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.geometry.projection import transform, unproject


@dataclass
class PointmapMetrics:
    """Distance of predicted to true points over valid pixels, as sums that add up over ranks."""

    error_sum: float = 0.0
    relative_sum: float = 0.0
    pixels: int = 0

    def update(self, predicted: Tensor, true: Tensor, valid: Tensor) -> None:
        """Add pointmaps: (..., 3) metres in one frame, (..., 3), (...) bool. Pixels that are not valid do not count.

        ValueError when a predicted point at a valid pixel is not finite.
        """
        p, t = predicted[valid].double(), true[valid].double()
        broken = int((~torch.isfinite(p)).any(-1).sum())
        if broken:
            raise ValueError(f"{broken} of {len(p)} predicted points are not finite")
        error = (p - t).norm(dim=-1)
        self.error_sum += float(error.sum())
        self.relative_sum += float((error / t.norm(dim=-1).clamp_min(1e-8)).sum())
        self.pixels += len(p)

    def merge(self, other: PointmapMetrics) -> None:
        """Add what another rank saw."""
        self.error_sum += other.error_sum
        self.relative_sum += other.relative_sum
        self.pixels += other.pixels

    def compute(self) -> dict[str, float]:
        """``error``: mean distance in metres; ``relative``: mean of distance over the true point's distance from the
        origin. Empty without a valid pixel.
        """
        if not self.pixels:
            return {}
        return {"error": self.error_sum / self.pixels, "relative": self.relative_sum / self.pixels}


def plane_points(depth: float, K: Tensor, pose: Tensor, height: int, width: int) -> Tensor:
    """Points of a plane at one depth before each camera: the pointmap of whoever knows the mean depth only.

    Args:
        depth: metres.
        K: (B, 3, 3).
        pose: (B, 4, 4) of the camera in the frame of the points (identity for the reference view).
        height: of the picture.
        width: of the picture.

    Returns:
        (B, H, W, 3).
    """
    flat = K.new_full((len(K), height, width), depth)
    return transform(unproject(flat, K), pose)


def token_cosine(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean cosine of the tokens of each sample: (B, ..., C) twice -> (B,) float64."""
    cosine = F.cosine_similarity(predicted.double(), true.double(), dim=-1)
    return cosine.flatten(1).mean(1)
