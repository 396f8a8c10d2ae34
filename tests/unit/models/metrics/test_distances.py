"""FID's and KID's formulas, without any network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.kid import poly_mmd

from models.metrics.distances import (
    FeatureSums,
    FrechetDistance,
    KernelDistance,
    frechet_distance,
    polynomial_mmd,
)


def features(seed: int, count: int = 60, width: int = 12, shift: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g)
    return torch.randn(count, width, generator=g) @ mixing + shift


def test_frechet_by_hand() -> None:
    # Diagonal covariances: |m|^2 + sum (sqrt a - sqrt b)^2 = 9 + (1 - 2)^2 + (3 - 1)^2.
    a, b = torch.diag(torch.tensor([1.0, 9.0])), torch.diag(torch.tensor([4.0, 1.0]))
    mean = torch.tensor([3.0, 0.0])
    assert frechet_distance(mean, a, torch.zeros(2), b) == pytest.approx(14.0)
    assert frechet_distance(mean, a, mean, a) == pytest.approx(0.0, abs=1e-12)


def test_frechet_equals_the_matrix_root_of_scipy() -> None:
    a, b = features(0), features(1, shift=0.5)
    distance = FrechetDistance()
    distance.update(a, b)
    mean_a, mean_b = a.double().mean(0).numpy(), b.double().mean(0).numpy()
    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert distance.compute() == pytest.approx(expected, rel=1e-9)


def test_frechet_of_singular_covariances() -> None:
    # Five features of twelve dimensions: rank 4. The distance of a set to itself is 0, and to a shifted copy the shift.
    a = features(0, count=5)
    distance = FrechetDistance()
    distance.update(a, a + 2.0)
    assert distance.compute() == pytest.approx(12 * 4.0, rel=1e-6)


def test_sums_equal_numpy_far_from_zero_and_add_up_over_ranks() -> None:
    x = features(2, count=50).double() * 1e-3 + 1e4
    whole, parts = FeatureSums(), [FeatureSums() for _ in range(3)]
    whole.update(x)
    for part, rows in zip(parts, (x[:20], x[20:20], x[20:]), strict=True):
        part.update(rows)
    merged = FeatureSums()
    for part in parts:
        merged.merge(part)
    expected = torch.from_numpy(np.cov(x.numpy().T))
    for sums in (whole, merged):
        torch.testing.assert_close(sums.covariance(), expected, rtol=1e-6, atol=1e-14)
        torch.testing.assert_close(sums.mean(), x.mean(0), rtol=1e-12, atol=0)
    assert merged.count == 50


def test_a_set_without_covariance_has_no_distance() -> None:
    distance = FrechetDistance()
    assert distance.compute() is None
    distance.update(features(0, count=1), features(1, count=8))
    assert distance.compute() is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (torch.full((2, 3), math.nan), "2 of 2 features are not finite"),
        (torch.zeros(2, 3, 4), r"features are \(B, D\)"),
    ],
)
def test_broken_features_are_refused(broken: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureSums().update(broken)
    with pytest.raises(ValueError, match=message):
        KernelDistance().update(broken, features(0))


def test_features_of_two_widths_are_refused() -> None:
    sums = FeatureSums()
    sums.update(features(0))
    with pytest.raises(ValueError, match="width 5 were added to others of 12"):
        sums.update(features(0, width=5))


def test_mmd_by_hand() -> None:
    # One dimension, k = (xy + 1)^3. Within {0, 1}: k(0,1) = 1. Within {1, 2}: k(1,2) = 27.
    # Across: k(0,1) = k(0,2) = 1, k(1,1) = 8, k(1,2) = 27.
    value = polynomial_mmd(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]]))
    assert value == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_mmd_equals_torchmetrics() -> None:
    a, b = features(0, count=20).double(), features(1, count=20).double()
    assert polynomial_mmd(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_kernel_distance_is_seeded_and_takes_smaller_sets_whole() -> None:
    a, b = features(0, count=30), features(1, count=25)

    def score(seed: int, size: int) -> dict[str, float]:
        kernel = KernelDistance(subsets=5, subset_size=size, seed=seed)
        kernel.update(a[:10], b[:25])
        rest = KernelDistance()
        rest.update(a[10:], b[25:])
        kernel.merge(rest)
        return kernel.compute()

    assert score(0, 10) == score(0, 10)
    assert score(0, 10)["mean"] != score(1, 10)["mean"]
    assert score(0, 10)["std"] > 0
    whole = KernelDistance(subsets=3)
    whole.update(a[:25], b)
    assert whole.compute()["mean"] == pytest.approx(polynomial_mmd(a[:25], b), rel=1e-5)
    assert whole.compute()["subset_size"] == 25
    assert KernelDistance().compute() == {}
