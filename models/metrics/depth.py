"""Depth accuracy as published: AbsRel and the share within a factor of 1.25, after an alignment that has a name.

Single frames: the medians of each frame are made equal (the protocol on NYU-v2), or nothing is aligned (metric
depth). Video: one alignment for a whole sequence (:class:`VideoDepthMetrics`); see :mod:`models.metrics.alignment`
for the alignments there are. Means are weighted by valid pixels (MonST3R's evaluation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.metrics.alignment import ALIGNMENTS, median_scale

PairDecoder = Callable[[Tensor, Tensor], Sequence[Mapping[str, Tensor]]]

#: One alignment a sequence: the default of video depth.
VIDEO_ALIGNMENT = "least_squares_scale_shift"
#: Video alignments that are reported beside each other, since papers do not say which of them they used.
VIDEO_ALIGNMENTS = (VIDEO_ALIGNMENT, "least_squares_scale", "median_scale")


@dataclass
class DepthMetrics:
    """Sums over frames; means are weighted by each frame's valid pixels.

    A frame without valid pixels is left out.
    """

    abs_rel_sum: float = 0.0
    delta1_sum: float = 0.0
    pixels: float = 0.0
    frames: int = 0

    def update(self, predicted: Tensor, true: Tensor, *, align: bool = True, max_depth: float | None = None) -> None:
        """Add frames.

        Args:
            predicted: (B, H, W) positive depths, any scale if ``align``.
            true: (B, H, W) metres; 0 or non-finite is unknown.
            align: scale each frame so that the medians over its valid pixels agree (torch's lower median).
            max_depth: true depths of at least this are unknown as well (Bonn: 70 m).
        """
        for p, t in zip(predicted.double(), true.double(), strict=True):
            valid = valid_depth(t, max_depth)
            if not valid.any():
                continue
            p, t = p[valid], t[valid]
            self.add(p * median_scale(p, t)[0] if align else p, t, frames=1)

    def add(self, predicted: Tensor, true: Tensor, *, frames: int) -> None:
        """Add aligned depths (P,) and true ones (P,) of valid pixels. A depth of at most 0 is never within 1.25."""
        self.abs_rel_sum += float(((predicted - true).abs() / true).sum())
        close = torch.maximum(predicted / true, true / predicted) < 1.25
        self.delta1_sum += float((close & (predicted > 0)).sum())
        self.pixels += true.numel()
        self.frames += frames

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


def frame_scores(
    predicted: Tensor,
    true: Tensor,
    *,
    align: bool = False,
    max_depth: float | None = None,
    known: Tensor | None = None,
) -> dict[str, Tensor]:
    """AbsRel and delta1 of each frame for itself, to be averaged over frames (and by groups of them, see ``Means``).

    Args:
        predicted: (B, H, W) depths.
        true: (B, H, W) metres; 0 or non-finite is unknown.
        align: make the medians equal; by default metric depth is judged as it is.
        max_depth: true depths of at least this are unknown.
        known: (B, H, W) bool, where there is a prediction (a drawn cloud has holes); the rest does not count.

    Returns:
        ``abs_rel`` and ``delta1``, (B,) float64, NaN for a frame in which no pixel counts.
    """
    rows: dict[str, list[float]] = {"abs_rel": [], "delta1": []}
    for place in range(len(true)):
        metrics = DepthMetrics()
        truth = true[place : place + 1]
        if known is not None:
            truth = torch.where(known[place], truth, torch.zeros_like(truth))
        metrics.update(predicted[place : place + 1], truth, align=align, max_depth=max_depth)
        found = metrics.compute()
        for name, values in rows.items():
            values.append(found.get(name, math.nan))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}


class VideoDepthMetrics:
    """Depth of videos, each aligned once as a whole, under one or several alignments at a time.

    Args:
        alignments: names in :data:`models.metrics.alignment.ALIGNMENTS`. The first is also reported without its name.
        max_depth: true depths of at least this are unknown.
    """

    def __init__(self, alignments: Sequence[str] = VIDEO_ALIGNMENTS, *, max_depth: float | None = None) -> None:
        unknown = sorted(set(alignments) - set(ALIGNMENTS))
        if unknown or not alignments:
            raise ValueError(f"unknown alignments {unknown}; there are {', '.join(ALIGNMENTS)}")
        self.sums = {name: DepthMetrics() for name in alignments}
        self.max_depth = max_depth
        self.sequences = 0

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Add one whole sequence: (T, H, W) depths of any scale, (T, H, W) metres (0 or non-finite is unknown).

        A sequence without a valid pixel is left out.
        """
        predicted, true = predicted.double(), true.double()
        valid = valid_depth(true, self.max_depth)
        if not valid.any():
            return
        frames = int(valid.flatten(1).any(1).sum())
        p, t = predicted[valid], true[valid]
        for name, metrics in self.sums.items():
            scale, shift = ALIGNMENTS[name](p, t)
            metrics.add(p * scale + shift, t, frames=frames)
        self.sequences += 1

    def merge(self, other: VideoDepthMetrics) -> None:
        """Add what another rank saw."""
        for name, metrics in self.sums.items():
            metrics.merge(other.sums[name])
        self.sequences += other.sequences

    def compute(self) -> dict[str, float]:
        """``abs_rel/<alignment>``, ``delta1/<alignment>``, and both without a name for the first alignment."""
        numbers: dict[str, float] = {}
        for name, metrics in self.sums.items():
            values = metrics.compute()
            numbers = numbers or dict(values)
            numbers |= {f"{score}/{name}": value for score, value in values.items()}
        return numbers


def self_pair_depth(decode: PairDecoder, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth of single pictures by a network of pairs: each is paired with itself, as DUSt3R is evaluated on NYU-v2.

    Published code averages the two orders of the pair; of a picture and itself they are one, so it is decoded once.

    Args:
        decode: two grids of tokens -> the two views' predictions, with ``pts3d`` (B, H, W, 3).
        tokens: (B, h, w, C).
        size: (height, width) of the true depth; the prediction is resized to it by a bicubic filter.

    Returns:
        (B, height, width) z of view 1's points.
    """
    depth = decode(tokens, tokens)[0]["pts3d"][..., 2]
    return F.interpolate(depth[:, None], size, mode="bicubic", align_corners=False)[:, 0]


def valid_depth(true: Tensor, max_depth: float | None = None) -> Tensor:
    """Where a true depth is known: finite, above 0, and below ``max_depth`` where that is given."""
    valid = torch.isfinite(true) & (true > 0)
    return valid if max_depth is None else valid & (true < max_depth)
