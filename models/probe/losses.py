"""Losses of the probe as sums and counts, so that a step's gradient does not depend on how its batch is split."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.spec import Batch

IGNORE = -1
"""Label of a pixel without a class."""


def valid_depth(batch: Batch) -> Tensor:
    """(B, H, W) bool: depth is known (finite and above 0) and the sample counts (weight above 0)."""
    depth: Tensor = batch["depth"]
    return torch.isfinite(depth) & (depth > 0) & (batch["weight"] > 0)[:, None, None]


def valid_labels(batch: Batch) -> Tensor:
    """(B, H, W) bool: the pixel has a class and the sample counts."""
    labels: Tensor = batch["labels"]
    return (labels != IGNORE) & (batch["weight"] > 0)[:, None, None]


def counts(batch: Batch) -> dict[str, float]:
    """Weighted number of valid pixels of each loss term, from the targets alone."""
    weight = batch["weight"].double()
    depth = float((valid_depth(batch).sum((1, 2)) * weight).sum())
    labels = float((valid_labels(batch).sum((1, 2)) * weight).sum())
    return {"depth_linear": depth, "depth_dpt": depth, "segmentation": labels}


def log_depth_l1(prediction: Tensor, batch: Batch) -> Tensor:
    """Weighted sum over valid pixels of ``|log predicted - log true|``.

    Ours in place of the scale-invariant log loss (Eigen et al. 2014): that one squares a mean over pixels, so its
    gradient changes when a batch is cut differently; this is its additive part, in L1.

    Args:
        prediction: (B, H, W) log metres.
        batch: ``depth`` (B, H, W) metres with 0 = unknown, ``weight`` (B,).
    """
    valid = valid_depth(batch)
    target = torch.where(valid, batch["depth"], torch.ones_like(batch["depth"])).log()
    error = torch.where(valid, (prediction - target).abs(), torch.zeros_like(prediction))
    return (error.sum((1, 2)) * batch["weight"]).sum()


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Weighted sum over labelled pixels of the cross-entropy of (B, classes, H, W) logits."""
    target = torch.where(valid_labels(batch), batch["labels"], torch.full_like(batch["labels"], IGNORE))
    loss = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    return (loss.sum((1, 2)) * batch["weight"]).sum()
