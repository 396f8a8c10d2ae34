"""Semantic segmentation as published: intersection over union from one confusion matrix over all images."""

from __future__ import annotations

import torch
from torch import Tensor


class SegmentationMetrics:
    """mIoU pooled over images.

    Pixels whose truth is ``ignore`` leave TP, FP and FN; a class that occurs neither in the truth nor in a
    prediction on valid pixels is left out of the mean.
    """

    def __init__(self, classes: int, *, ignore: int = -1) -> None:
        self.ignore = ignore
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        """Rows are true classes, columns predicted ones."""

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Add class ids of any one shape; ``predicted`` must lie in [0, classes)."""
        valid = true != self.ignore
        classes = len(self.confusion)
        index = true[valid].long() * classes + predicted[valid].long()
        self.confusion += torch.bincount(index.cpu(), minlength=classes * classes).view(classes, classes)

    def merge(self, other: SegmentationMetrics) -> None:
        """Add what another rank saw."""
        self.confusion += other.confusion

    def per_class(self) -> Tensor:
        """(classes,) float64 IoU; NaN for a class that occurs nowhere."""
        hits = self.confusion.diagonal().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - self.confusion.diagonal()
        return torch.where(union > 0, hits / union, torch.nan)

    def compute(self) -> dict[str, float]:
        """``miou`` and pixel ``accuracy`` in [0, 1]; empty without a valid pixel."""
        pixels = int(self.confusion.sum())
        if not pixels:
            return {}
        iou = self.per_class()
        return {
            "miou": float(iou[~iou.isnan()].mean()),
            "accuracy": float(self.confusion.diagonal().sum()) / pixels,
        }
