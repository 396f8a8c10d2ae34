"""Matches between two views by nearest descriptors: the share that is right, beside what guessing would give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1024
"""Queries whose similarities to a whole view are held at a time."""


@dataclass
class MatchingMetrics:
    """Share of true correspondences that the nearest descriptor finds again, within some pixels.

    For each valid correspondence, the pixel of view 1 asks all pixels of view 2 for the largest inner product of
    descriptors; it is right when the winner lies at most ``within`` pixels from the true partner. Likewise from view
    2 to view 1. ``chance`` is the same share for a winner drawn uniformly.
    """

    within: float = 3.0
    right: float = 0.0
    chance_sum: float = 0.0
    distance_sum: float = 0.0
    matches: int = 0

    def update(self, first: Tensor, second: Tensor, matches: Tensor, valid: Tensor) -> None:
        """Add pairs.

        Args:
            first: (B, H, W, D) unit descriptors of view 1; ``second`` (B, H, W, D) of view 2.
            second: see ``first``.
            matches: (B, 2, M) flat pixel indices into view 1 and view 2.
            valid: (B, M) bool; the others are no correspondences.
        """
        for one, two, pair, real in zip(first, second, matches.long(), valid, strict=True):
            a, b = pair[0][real], pair[1][real]
            self._add(one, two, a, b)
            self._add(two, one, b, a)

    def _add(self, queries: Tensor, candidates: Tensor, source: Tensor, target: Tensor) -> None:
        height, width, channels = candidates.shape
        flat = candidates.reshape(-1, channels).float()
        rows = queries.reshape(-1, channels).float()[source]
        v, u = target // width, target % width
        for start in range(0, len(rows), _CHUNK):
            part = slice(start, start + _CHUNK)
            winner = (rows[part] @ flat.T).argmax(-1)
            distance = torch.hypot((winner // width - v[part]).double(), (winner % width - u[part]).double())
            self.right += float((distance <= self.within).sum())
            self.distance_sum += float(distance.sum())
            self.chance_sum += float(_disc_sizes(v[part], u[part], height, width, self.within).sum()) / len(flat)
        self.matches += len(rows)

    def merge(self, other: MatchingMetrics) -> None:
        """Add what another rank saw. ValueError when it counted within another distance."""
        if other.within != self.within:
            raise ValueError(f"matches within {other.within} px were added to others within {self.within} px")
        self.right += other.right
        self.chance_sum += other.chance_sum
        self.distance_sum += other.distance_sum
        self.matches += other.matches

    def compute(self) -> dict[str, float]:
        """``accuracy`` and ``chance`` in [0, 1], ``distance`` in pixels (mean); empty without a correspondence."""
        if not self.matches:
            return {}
        return {
            "accuracy": self.right / self.matches,
            "chance": self.chance_sum / self.matches,
            "distance": self.distance_sum / self.matches,
        }


def _disc_sizes(v: Tensor, u: Tensor, height: int, width: int, within: float) -> Tensor:
    """Pixels of the picture at most ``within`` from each (v, u): (M,)."""
    reach = int(within)
    total = torch.zeros_like(v)
    for dv in range(-reach, reach + 1):
        span = int((within * within - dv * dv) ** 0.5)
        columns = (u + span).clamp_max(width - 1) - (u - span).clamp_min(0) + 1
        total += torch.where((v + dv >= 0) & (v + dv < height), columns, 0)
    return total
