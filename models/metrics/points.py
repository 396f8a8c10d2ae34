"""Distances between point clouds: accuracy, completeness, Chamfer distance, F-score.

Conventions, since several are in use: accuracy is the mean distance from a predicted point to the nearest true one,
completeness the mean distance the other way, in metres; ``chamfer`` is the mean of the two, ``chamfer_sum`` their
sum, ``chamfer_squared`` the sum of the two mean squared distances. The F-score at t is the harmonic mean of the
shares of distances of at most t both ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

THRESHOLDS = (0.05, 0.1)
"""Metres at which the F-score is taken by default."""


def nearest_distances(points: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance of each of ``points`` (P, 3) to the nearest of ``others`` (Q, 3): (P,) float64 on CPU."""
    tree = cKDTree(others.detach().double().cpu().numpy())
    distances, _ = tree.query(points.detach().double().cpu().numpy())
    return torch.from_numpy(np.atleast_1d(distances))


def cloud_scores(predicted: Tensor, true: Tensor, *, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, float]:
    """Scores of one cloud (P, 3) against another (Q, 3), metres in one frame.

    Points that are not finite are left out. An empty dict when nothing is left of ``true``; when nothing is left of
    ``predicted`` the F-scores are 0 and there are no distances.
    """
    predicted, true = (x[torch.isfinite(x).all(-1)] for x in (predicted, true))
    if not len(true):
        return {}
    if not len(predicted):
        return {f"f_score_{t:g}": 0.0 for t in thresholds}
    accuracy, completeness = nearest_distances(predicted, true), nearest_distances(true, predicted)
    scores = {
        "accuracy": float(accuracy.mean()),
        "completeness": float(completeness.mean()),
        "chamfer_squared": float(accuracy.square().mean() + completeness.square().mean()),
    }
    scores["chamfer_sum"] = scores["accuracy"] + scores["completeness"]
    scores["chamfer"] = scores["chamfer_sum"] / 2
    for t in thresholds:
        precision, recall = (float((d <= t).double().mean()) for d in (accuracy, completeness))
        total = precision + recall
        scores[f"f_score_{t:g}"] = 2 * precision * recall / total if total else 0.0
    return scores


def cloud_batch(
    predicted: Tensor,
    predicted_valid: Tensor,
    true: Tensor,
    true_valid: Tensor,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, Tensor]:
    """Scores of a batch, one a sample: name -> (B,) float64, NaN where a sample has none (see :class:`Means`).

    Args:
        predicted: (B, ..., 3) metres; ``true`` (B, ..., 3) in the same frame, not necessarily as many.
        predicted_valid: (B, ...) bool; ``true_valid`` likewise.
        true: see ``predicted``.
        true_valid: see ``predicted_valid``.
        thresholds: of the F-score, metres.
    """
    rows = [
        cloud_scores(p[p_valid], t[t_valid], thresholds=thresholds)
        for p, p_valid, t, t_valid in zip(predicted, predicted_valid, true, true_valid, strict=True)
    ]
    names = [
        "accuracy", "completeness", "chamfer", "chamfer_sum", "chamfer_squared",
        *(f"f_score_{t:g}" for t in thresholds),
    ]  # fmt: skip
    return {name: torch.tensor([row.get(name, math.nan) for row in rows], dtype=torch.float64) for name in names}
