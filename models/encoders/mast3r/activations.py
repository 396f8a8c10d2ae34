"""From the raw output of the heads to metres, confidences and unit descriptors (DUSt3R section 3, MASt3R section 3.1).

A mode is (kind, lowest, highest) as in the published configurations, e.g. ("exp", 1, inf) for a confidence of at
least 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import ModelError

Mode = tuple[str, float, float]

_SHORTEST = 1e-8
"""Lengths below this are divided by this."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Modes of the outputs. Those of MASt3R's metric checkpoint, which UniUGG starts from, are the defaults."""

    depth: Mode = ("exp", -math.inf, math.inf)
    confidence: Mode = ("exp", 1.0, math.inf)
    descriptor_confidence: Mode = ("exp", 0.0, math.inf)

    def __post_init__(self) -> None:
        allowed = {
            "depth": ("exp", "linear", "square"),
            "confidence": ("exp", "sigmoid"),
            "descriptor_confidence": ("exp", "sigmoid"),
        }
        for name, kinds in allowed.items():
            kind = getattr(self, name)[0]
            if kind not in kinds:
                raise ModelError(f"MASt3R: the mode of {name} is {kind!r}; allowed are {', '.join(kinds)}")


def points(raw: Tensor, mode: Mode) -> Tensor:
    """Raw coordinates (..., 3) -> points. ``exp``: the length r becomes exp(r) - 1, the direction stays."""
    kind, lowest, highest = mode
    if kind == "linear":
        return raw if lowest == -math.inf and highest == math.inf else raw.clip(lowest, highest)
    length = torch.linalg.vector_norm(raw, dim=-1, keepdim=True)
    direction = raw / length.clamp_min(_SHORTEST)
    return direction * (length.square() if kind == "square" else torch.expm1(length))


def confidence(raw: Tensor, mode: Mode) -> Tensor:
    """Raw numbers -> confidences in [lowest, highest]: lowest + exp(raw), or a sigmoid between the two."""
    kind, lowest, highest = mode
    if kind == "sigmoid":
        return lowest + (highest - lowest) * torch.sigmoid(raw)
    return lowest + raw.exp().clip(max=highest - lowest)


def descriptors(raw: Tensor) -> Tensor:
    """Raw descriptors (..., D) -> unit length."""
    return raw / torch.linalg.vector_norm(raw, dim=-1, keepdim=True).clamp_min(_SHORTEST)
