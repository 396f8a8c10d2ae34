"""Distances between two sets of image features: the formulas behind FID, KID and FD-DINOv2, without any network.

The Fréchet distance needs means and covariances only, so it is accumulated as sums in float64 that add up over ranks.
The kernel distance is an average over random subsets and needs the features themselves. Whose features they are
decides the name of the score (Inception: FID and KID; DINOv2: FD-DINOv2); nothing here knows it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureSums:
    """Mean and covariance of features from sums in float64.

    The sums are taken about the first feature seen (``origin``), so that features far from zero do not cancel.
    """

    def __init__(self) -> None:
        self.count = 0
        self.origin: Tensor | None = None
        self.first = torch.zeros(0, dtype=torch.float64)
        """(D,) sum of the features minus ``origin``."""
        self.second = torch.zeros(0, 0, dtype=torch.float64)
        """(D, D) sum of their outer products."""

    def update(self, features: Tensor) -> None:
        """Add features (B, D). ValueError for another shape, or values that are not finite."""
        features = checked_features(features)
        if not len(features):
            return
        if self.origin is None:
            width = features.shape[1]
            self.origin = features[0].clone()
            self.first = torch.zeros(width, dtype=torch.float64)
            self.second = torch.zeros(width, width, dtype=torch.float64)
        if features.shape[1] != len(self.origin):
            raise ValueError(f"features of width {features.shape[1]} were added to others of {len(self.origin)}")
        shifted = features - self.origin
        self.count += len(features)
        self.first += shifted.sum(0)
        self.second += shifted.T @ shifted

    def merge(self, other: FeatureSums) -> None:
        """Add what another rank saw."""
        if other.origin is None:
            return
        if self.origin is None:
            self.count, self.origin = other.count, other.origin.clone()
            self.first, self.second = other.first.clone(), other.second.clone()
            return
        shift = other.origin - self.origin
        cross = torch.outer(other.first, shift)
        self.second += other.second + cross + cross.T + other.count * torch.outer(shift, shift)
        self.first += other.first + other.count * shift
        self.count += other.count

    def mean(self) -> Tensor:
        """(D,) float64."""
        assert self.origin is not None
        return self.origin + self.first / self.count

    def covariance(self) -> Tensor:
        """(D, D) float64, divided by n - 1."""
        return (self.second - torch.outer(self.first, self.first) / self.count) / (self.count - 1)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^1/2) of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017).

    The trace of the root is the sum of the square roots of the eigenvalues of C_a^1/2 C_b C_a^1/2, which has those of
    C_a C_b and is symmetric: all of them are real and, but for rounding, not negative, also for singular covariances
    (fewer samples than dimensions), where a general matrix root loses its accuracy.
    """
    mean_a, mean_b, covariance_a, covariance_b = (x.double() for x in (mean_a, mean_b, covariance_a, covariance_b))
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ covariance_b @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    difference = mean_a - mean_b
    distance = difference @ difference + covariance_a.trace() + covariance_b.trace() - 2 * trace
    return max(0.0, float(distance))  # of equal Gaussians rounding leaves about -1e-12


class FrechetDistance:
    """Fréchet distance of generated to real features, accumulated."""

    def __init__(self) -> None:
        self.generated, self.real = FeatureSums(), FeatureSums()

    def update(self, generated: Tensor, real: Tensor) -> None:
        """Add features (B, D) of each set; the two batches may differ in size."""
        self.generated.update(generated)
        self.real.update(real)

    def merge(self, other: FrechetDistance) -> None:
        """Add what another rank saw."""
        self.generated.merge(other.generated)
        self.real.merge(other.real)

    def compute(self) -> float | None:
        """The distance; None with fewer than two features in a set, where there is no covariance."""
        if min(self.generated.count, self.real.count) < 2:
            return None
        a, b = self.generated, self.real
        return frechet_distance(a.mean(), a.covariance(), b.mean(), b.covariance())


def polynomial_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of features (m, D) and (n, D) under k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018)."""
    a, b = a.double(), b.double()
    m, n, width = len(a), len(b), a.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / width + 1) ** 3

    within_a, within_b = kernel(a, a), kernel(b, b)
    first = (within_a.sum() - within_a.trace()) / (m * (m - 1))
    second = (within_b.sum() - within_b.trace()) / (n * (n - 1))
    return float(first + second - 2 * kernel(a, b).mean())


class KernelDistance:
    """Kernel distance of generated to real features: the mean over random subsets, as published for KID.

    Args:
        subsets: number of subsets.
        subset_size: features of each set in a subset; with fewer features, all of them (drawn without replacement).
        seed: of the drawing.
    """

    def __init__(self, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> None:
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self._generated: list[Tensor] = []
        self._real: list[Tensor] = []

    def update(self, generated: Tensor, real: Tensor) -> None:
        """Add features (B, D) of each set; they are kept in float32."""
        self._generated.append(checked_features(generated).float())
        self._real.append(checked_features(real).float())

    def merge(self, other: KernelDistance) -> None:
        """Add what another rank saw; the order of merging is the order of the features."""
        self._generated += other._generated
        self._real += other._real

    def compute(self) -> dict[str, float]:
        """``mean`` and ``std`` over the subsets, and their ``subset_size``; empty with fewer than two features."""
        if not self._generated:
            return {}
        generated, real = torch.cat(self._generated), torch.cat(self._real)
        size = min(self.subset_size, len(generated), len(real))
        if size < 2:
            return {}
        g = torch.Generator().manual_seed(self.seed)
        values = []
        for _ in range(self.subsets):
            chosen = (x[torch.randperm(len(x), generator=g)[:size]] for x in (generated, real))
            values.append(polynomial_mmd(*chosen))
        scores = torch.tensor(values, dtype=torch.float64)
        return {"mean": float(scores.mean()), "std": float(scores.std(correction=0)), "subset_size": float(size)}


def checked_features(features: Tensor) -> Tensor:
    """Features (B, D) as float64 on CPU. ValueError for another shape, or values that are not finite."""
    if features.ndim != 2:
        raise ValueError(f"features are (B, D), got {tuple(features.shape)}")
    features = features.detach().cpu().double()
    broken = int((~torch.isfinite(features)).any(1).sum())
    if broken:
        raise ValueError(f"{broken} of {len(features)} features are not finite; the network or the images are broken")
    return features
