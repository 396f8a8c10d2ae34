"""The matching loss of MASt3R (section 3.2): InfoNCE in both directions over the sampled pixels of a pair.

The similarities of M pixels with M others are never held at once: both passes go through them in blocks of rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOWEST = math.log(1e-8)
"""Probabilities below 1e-8 count as that, without a gradient, as in the official code."""


def log_normalisers(first: Tensor, second: Tensor, temperature: float, block: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of ``S = first second^T / temperature`` over its columns and over its rows.

    Args:
        first: descriptors (B, M, D), float32.
        second: descriptors (B, N, D), float32.
        temperature: of the softmax.
        block: rows of S that exist at a time.

    Returns:
        (B, M) over columns and (B, N) over rows.
    """
    return _LogNormalisers.apply(first, second, temperature, block)


def matching_terms(
    descriptors: tuple[Tensor, Tensor],
    confidences: tuple[Tensor, Tensor],
    valid: Tensor,
    *,
    temperature: float,
    beta: float,
    block: int,
) -> Tensor:
    """``q l - beta log q`` of every valid match, 0 for the others; (B, M).

    l is minus the log-probability of the match among all sampled pixels of the pair, in both directions added; q is
    the mean confidence of its two ends. Pixels of false matches stand among the others as negatives.

    Args:
        descriptors: (B, M, D) of unit length at the ends of the matches, in view 1 and view 2.
        confidences: (B, M) at the same pixels.
        valid: (B, M) bool: a true match.
        temperature: of the softmax.
        beta: weight of the log-confidence.
        block: see :func:`log_normalisers`.
    """
    first, second = (descriptor.float() for descriptor in descriptors)
    with torch.autocast(first.device.type, enabled=False):
        over_columns, over_rows = log_normalisers(first, second, temperature, block)
        match = (first * second).sum(-1) / temperature
        # Rounding may put a sum of exponentials just below its largest term.
        loss = -((match - over_columns).clamp_min(_LOWEST) + (match - over_rows).clamp_min(_LOWEST))
        confidence = (confidences[0].float() + confidences[1].float()) / 2
        return torch.where(valid, confidence * loss - beta * confidence.log(), 0.0)


class _LogNormalisers(torch.autograd.Function):
    """See :func:`log_normalisers`. Backward computes each block of similarities again."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, temperature: float, block: int) -> tuple[Tensor, Tensor]:
        over_columns = first.new_empty(first.shape[:-1])
        largest = first.new_full(second.shape[:-1], -torch.inf)
        total = torch.zeros_like(largest)
        for sample in range(len(first)):
            for rows in _blocks(first.shape[1], block):
                similar = torch.mm(first[sample, rows], second[sample].T).div_(temperature)
                peak = similar.amax(1, keepdim=True)
                # The columns' running maximum and the sum of exponentials relative to it.
                higher = torch.maximum(largest[sample], similar.amax(0))
                total[sample] *= (largest[sample] - higher).exp_()
                largest[sample] = higher
                exponential = (similar - higher).exp_()
                total[sample] += exponential.sum(0)
                del exponential
                over_columns[sample, rows] = similar.sub_(peak).exp_().sum(1).log_().add_(peak[:, 0])
        over_rows = total.log_().add_(largest)
        ctx.save_for_backward(first, second, over_columns, over_rows)
        ctx.temperature, ctx.block = temperature, block
        return over_columns, over_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_columns: Tensor, grad_rows: Tensor) -> tuple[Tensor, Tensor, None, None]:
        first, second, over_columns, over_rows = ctx.saved_tensors
        grad_first, grad_second = torch.empty_like(first), torch.zeros_like(second)
        with torch.autocast(first.device.type, enabled=False):
            for sample in range(len(first)):
                for rows in _blocks(first.shape[1], ctx.block):
                    similar = torch.mm(first[sample, rows], second[sample].T).div_(ctx.temperature)
                    # d lse / d S is the softmax: of the rows, and of the columns.
                    grad = (similar - over_columns[sample, rows, None]).exp_()
                    grad *= grad_columns[sample, rows, None]
                    grad.addcmul_(similar.sub_(over_rows[sample]).exp_(), grad_rows[sample])
                    grad_first[sample, rows] = torch.mm(grad, second[sample]).div_(ctx.temperature)
                    grad_second[sample].addmm_(grad.T, first[sample, rows], alpha=1 / ctx.temperature)
        return grad_first, grad_second, None, None


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]
