"""Means of scores by sample, in all and by group: sums in float64 that add up over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from models.geometry.poses import relative, rotation_angle


class Means:
    """Mean of every score over its samples; ``<score>@<group>`` for each group that a sample belongs to."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, scores: Mapping[str, Tensor], groups: Sequence[Sequence[str]] = ()) -> None:
        """Add scores by sample.

        Args:
            scores: name -> (B,) values. A NaN says that a sample has no such score; it is left out.
            groups: for each sample the names of its groups; () where there are none.

        ValueError when a score, or ``groups``, is not one a sample.
        """
        for name, values in scores.items():
            if values.ndim != 1 or (groups and len(groups) != len(values)):
                raise ValueError(
                    f"{name}: one score and one list of groups a sample is needed, got {tuple(values.shape)} and "
                    f"{len(groups)} lists"
                )
            for place, value in enumerate(values.double().tolist()):
                if value == value:
                    for key in (name, *(f"{name}@{group}" for group in (groups[place] if groups else ()))):
                        self._sums[key] = self._sums.get(key, 0.0) + value
                        self._counts[key] = self._counts.get(key, 0) + 1

    def merge(self, other: Means) -> None:
        """Add what another rank saw."""
        for key, value in other._sums.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
            self._counts[key] = self._counts.get(key, 0) + other._counts[key]

    def count(self, name: str) -> int:
        """Samples behind a score (0: it does not exist)."""
        return self._counts.get(name, 0)

    def compute(self) -> dict[str, float]:
        """Name -> mean; a score without samples is not there."""
        return {key: value / self._counts[key] for key, value in self._sums.items()}


def bin_name(value: float, edges: Sequence[float], quantity: str) -> str:
    """Group of a number by ascending upper ends, the ends included: ``angle<=15``, ``angle<=30``, ``angle>30``."""
    for edge in edges:
        if value <= edge:
            return f"{quantity}<={edge:g}"
    return f"{quantity}>{edges[-1]:g}" if edges else quantity


def view_groups(pose: Tensor, angle_bins: Sequence[float], distance_bins: Sequence[float]) -> list[list[str]]:
    """Groups of pairs of views by how far the camera moved, for :meth:`Means.update`.

    Args:
        pose: (B, 2, 4, 4) camera-to-world, metres.
        angle_bins: ascending upper ends in degrees of the rotation between the views.
        distance_bins: ascending upper ends in metres of the distance between them.

    Returns:
        For each pair ``angle<=15`` or the like, and ``distance<=0.5`` or the like.
    """
    change = relative(pose[:, 0].double(), pose[:, 1].double())
    angles = rotation_angle(change[:, :3, :3]).rad2deg().tolist()
    distances = change[:, :3, 3].norm(dim=-1).tolist()
    return [
        [bin_name(angle, angle_bins, "angle"), bin_name(distance, distance_bins, "distance")]
        for angle, distance in zip(angles, distances, strict=True)
    ]
