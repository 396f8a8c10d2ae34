"""Scale and shift that lay predicted depths over true ones; every rule has the name that its scores carry.

All take predicted and true depths (P,) float64 of valid pixels and return (scale, shift).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Alignment = Callable[[Tensor, Tensor], tuple[float, float]]


def no_alignment(predicted: Tensor, true: Tensor) -> tuple[float, float]:  # noqa: ARG001 - one signature for all
    """Metric depth as it is."""
    return 1.0, 0.0


def median_scale(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Medians made equal (the lower of two middle values)."""
    return float(true.median() / predicted.median()), 0.0


def least_squares_scale(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Scale that minimises the squared error."""
    return float(predicted @ true / (predicted @ predicted)), 0.0


def least_squares_scale_shift(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Scale and shift that minimise the squared error; a constant prediction is only shifted."""
    centred = predicted - predicted.mean()
    spread = centred @ centred
    scale = float(centred @ (true - true.mean()) / spread) if spread > 0 else 1.0
    return scale, float(true.mean() - scale * predicted.mean())


def l1_scale(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Scale that minimises the absolute error, exactly: the median of true / predicted weighted by predicted."""
    usable = predicted > 0
    if not usable.any():
        return 1.0, 0.0
    ratio, order = (true[usable] / predicted[usable]).sort()
    weight = predicted[usable][order].cumsum(0)
    return float(ratio[int(torch.searchsorted(weight, weight[-1] / 2))]), 0.0


def l1_scale_shift(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Scale and shift that minimise the absolute error, to the precision of the arithmetic.

    For a given scale the best shift is the median of the residuals, and what then is left is convex in the scale:
    the minimum is bracketed, and the bracket shrunk by the golden section.
    """

    def shift(scale: float) -> float:
        return float((true - scale * predicted).median())

    def error(scale: float) -> float:
        return float((scale * predicted + shift(scale) - true).abs().sum())

    start, _ = least_squares_scale_shift(predicted, true)
    step = max(abs(start), 1e-6)
    low, high = start - step, start + step
    while error(low) < error((low + high) / 2):
        low -= high - low
    while error(high) < error((low + high) / 2):
        high += high - low
    golden = (5**0.5 - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = error(left), error(right)
    for _ in range(80):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = error(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = error(right)
    best = (low + high) / 2
    return best, shift(best)


def monst3r_weiszfeld_scale(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """MonST3R's scale: ten reweighted least-squares steps towards the absolute error, from the ratio of the means."""
    scale = true.mean() / predicted.mean()
    for _ in range(10):
        weight = 1 / ((scale * predicted - true).abs() + 1e-8)
        scale = (weight * predicted * true).sum() / (weight * predicted.square()).sum()
    return float(scale.clamp_min(1e-3)), 0.0


def monst3r_adam_scale_shift(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """MonST3R's scale and shift: at most 1000 steps of Adam (1e-4) on the absolute error, from the ratio of medians.

    At this rate it moves either number by at most 0.1 and so stops short of the minimum; it is here for comparison
    with published figures only. :func:`l1_scale_shift` finds the minimum.
    """
    with torch.enable_grad():
        scale = (true.median() / predicted.median()).detach().clone().requires_grad_()
        shift = torch.zeros_like(scale).requires_grad_()
        optimizer = torch.optim.Adam([scale, shift], lr=1e-4)
        previous = None
        for _ in range(1000):
            optimizer.zero_grad()
            loss = (scale * predicted + shift - true).abs().sum()
            loss.backward()
            optimizer.step()
            value = loss.item()
            if previous is not None and abs(previous - value) < 1e-6:
                break
            previous = value
    return scale.item(), shift.item()


ALIGNMENTS: Mapping[str, Alignment] = {
    "none": no_alignment,
    "median_scale": median_scale,
    "least_squares_scale": least_squares_scale,
    "least_squares_scale_shift": least_squares_scale_shift,
    "l1_scale": l1_scale,
    "l1_scale_shift": l1_scale_shift,
    "monst3r_weiszfeld_scale": monst3r_weiszfeld_scale,
    "monst3r_adam_scale_shift": monst3r_adam_scale_shift,
}
