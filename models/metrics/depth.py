"""Depth accuracy as published: AbsRel and the share within a factor of 1.25, after aligning medians per frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DepthMetrics:
    """Sums over frames; means are weighted by each frame's valid pixels (MonST3R's evaluation).

    A frame without valid pixels is left out.
    """

    abs_rel_sum: float = 0.0
    delta1_sum: float = 0.0
    pixels: float = 0.0
    frames: int = 0

    def update(self, predicted: Tensor, true: Tensor, *, align: bool = True) -> None:
        """Add frames.

        Args:
            predicted: (B, H, W) positive depths, any scale if ``align``.
            true: (B, H, W) metres; 0 or non-finite is unknown.
            align: scale each frame so that the medians over its valid pixels agree (torch's lower median).
        """
        for p, t in zip(predicted.double(), true.double(), strict=True):
            valid = torch.isfinite(t) & (t > 0)
            if not valid.any():
                continue
            p, t = p[valid], t[valid]
            if align:
                p = p * (t.median() / p.median())
            self.abs_rel_sum += float(((p - t).abs() / t).sum())
            self.delta1_sum += float((torch.maximum(p / t, t / p) < 1.25).sum())
            self.pixels += t.numel()
            self.frames += 1

    def merge(self, other: DepthMetrics) -> None:
        """Add what another rank saw."""
        self.abs_rel_sum += other.abs_rel_sum
        self.delta1_sum += other.delta1_sum
        self.pixels += other.pixels
        self.frames += other.frames

    def compute(self) -> dict[str, float]:
        """``abs_rel`` (lower is better) and ``delta1`` in [0, 1] (higher is better); empty without a valid frame."""
        if not self.pixels:
            return {}
        return {"abs_rel": self.abs_rel_sum / self.pixels, "delta1": self.delta1_sum / self.pixels}
