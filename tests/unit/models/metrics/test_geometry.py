"""Point clouds, pointmaps, matches, token cosine: by hand and against scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from models.metrics.matching import MatchingMetrics
from models.metrics.means import Means
from models.metrics.pointmap import PointmapMetrics, plane_points, token_cosine
from models.metrics.points import cloud_batch, cloud_scores, nearest_distances


def test_clouds_by_hand() -> None:
    predicted = torch.tensor([[0.0, 0, 0], [3.0, 0, 0]])
    true = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [0.0, 4, 0]])
    scores = cloud_scores(predicted, true, thresholds=(1.0, 2.0))
    # Predicted to true: 0 and 2. True to predicted: 0, 1, 4.
    assert scores == {
        "accuracy": pytest.approx(1.0),
        "completeness": pytest.approx(5 / 3),
        "chamfer": pytest.approx((1 + 5 / 3) / 2),
        "chamfer_sum": pytest.approx(1 + 5 / 3),
        "chamfer_squared": pytest.approx(4 / 2 + 17 / 3),
        "f_score_1": pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3)),
        "f_score_2": pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3)),
    }


def test_nearest_distances_equal_scikit_learn() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(200, 3, generator=g), torch.randn(150, 3, generator=g)
    expected, _ = NearestNeighbors(n_neighbors=1).fit(b.double().numpy()).kneighbors(a.double().numpy())
    torch.testing.assert_close(nearest_distances(a, b), torch.from_numpy(expected[:, 0]))


def test_clouds_without_points() -> None:
    some, none = torch.zeros(2, 3), torch.zeros(0, 3)
    assert cloud_scores(some, none) == {}
    assert cloud_scores(none, some) == {"f_score_0.05": 0.0, "f_score_0.1": 0.0}
    assert cloud_scores(torch.full((2, 3), math.nan), some)["f_score_0.1"] == 0.0


def test_a_batch_leaves_samples_without_truth_out() -> None:
    points = torch.zeros(2, 2, 2, 3)
    moved = points + torch.tensor([0.0, 0.0, 0.08])
    valid = torch.tensor([[[True, True], [True, False]], [[False, False], [False, False]]])
    scores = cloud_batch(moved, torch.ones(2, 2, 2, dtype=torch.bool), points, valid)
    assert scores["chamfer"][0] == pytest.approx(0.08)
    assert math.isnan(float(scores["chamfer"][1]))
    means = Means()
    means.update(scores)
    assert means.compute()["f_score_0.1"] == 1.0
    assert means.compute()["f_score_0.05"] == 0.0
    assert means.count("chamfer") == 1


def test_pointmaps_by_hand() -> None:
    true = torch.tensor([[[0.0, 0.0, 2.0], [0.0, 0.0, 4.0], [9.0, 9.0, 9.0]]])
    predicted = torch.tensor([[[3.0, 4.0, 2.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]])
    valid = torch.tensor([[True, True, False]])
    metrics, rest = PointmapMetrics(), PointmapMetrics()
    metrics.update(predicted[:, :1], true[:, :1], valid[:, :1])
    rest.update(predicted[:, 1:], true[:, 1:], valid[:, 1:])
    metrics.merge(rest)
    assert metrics.compute() == {"error": pytest.approx((5 + 1) / 2), "relative": pytest.approx((5 / 2 + 1 / 4) / 2)}
    assert PointmapMetrics().compute() == {}
    with pytest.raises(ValueError, match="1 of 2 predicted points are not finite"):
        metrics.update(torch.where(predicted == 5, math.inf, predicted), true, valid)


def test_a_plane_in_another_cameras_frame() -> None:
    K = torch.tensor([[[2.0, 0.0, 0.5], [0.0, 2.0, 0.5], [0.0, 0.0, 1.0]]])
    pose = torch.eye(4)[None].clone()
    pose[0, :3, 3] = torch.tensor([1.0, 0.0, -1.0])
    points = plane_points(4.0, K, pose, 2, 2)
    assert points.shape == (1, 2, 2, 3)
    assert points[0, 0, 0].tolist() == [0.0, -1.0, 3.0]
    assert points[0, 1, 1].tolist() == [2.0, 1.0, 3.0]


def test_token_cosine() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 0.0]]])
    b = torch.tensor([[[3.0, 0.0], [5.0, 0.0]], [[-1.0, -1.0], [0.0, 1.0]]])
    assert token_cosine(a, b).tolist() == [pytest.approx(0.5), pytest.approx(-0.5)]


def one_hot_views(height: int, width: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pixel its own descriptor; view 2 is view 1 moved right by ``columns`` (cyclically)."""
    first = torch.eye(height * width).view(1, height, width, -1)
    return first, first.roll(columns, dims=2)


def test_matches_that_are_found_again() -> None:
    first, second = one_hot_views(4, 6, 2)
    source = torch.tensor([0, 7, 14])
    matches = torch.stack([source, source + 2])[None]
    metrics = MatchingMetrics(within=0.0)
    metrics.update(first, second, matches, torch.ones(1, 3, dtype=torch.bool))
    assert metrics.compute() == {"accuracy": 1.0, "chance": pytest.approx(1 / 24), "distance": 0.0}
    # Partners one column further: wrong at 0 pixels, right within one. Only the valid ones count.
    near = MatchingMetrics(within=1.0)
    near.update(first, second, matches + torch.tensor([[[0], [1]]]), torch.tensor([[True, True, False]]))
    exact = MatchingMetrics(within=0.0)
    exact.update(first, second, matches + torch.tensor([[[0], [1]]]), torch.tensor([[True, True, False]]))
    assert (near.matches, near.compute()["accuracy"], exact.compute()["accuracy"]) == (4, 1.0, 0.0)
    assert near.compute()["distance"] == 1.0


def test_chance_is_what_random_winners_get() -> None:
    g = torch.Generator().manual_seed(0)
    height, width, within = 9, 11, 2.5
    target = torch.randint(0, height * width, (2000,), generator=g)
    metrics = MatchingMetrics(within=within)
    descriptors = [torch.randn(1, height, width, 4, generator=g) for _ in range(2)]
    metrics.update(*descriptors, torch.stack([target, target])[None], torch.ones(1, 2000, dtype=torch.bool))
    winner = torch.randint(0, height * width, (100, 2000), generator=g)
    distance = torch.hypot((winner // width - target // width).double(), (winner % width - target % width).double())
    assert metrics.compute()["chance"] == pytest.approx(float((distance <= within).double().mean()), rel=0.02)


def test_matches_add_up_and_keep_their_distance() -> None:
    first, second = one_hot_views(4, 6, 2)
    source = torch.tensor([0, 7, 14])
    matches = torch.stack([source, source + 3])[None]
    whole, a, b = (MatchingMetrics(within=1.0) for _ in range(3))
    valid = torch.tensor([[True, True, True]])
    whole.update(first, second, matches, valid)
    a.update(first, second, matches[..., :1], valid[:, :1])
    b.update(first, second, matches[..., 1:], valid[:, 1:])
    a.merge(b)
    assert a.compute() == pytest.approx(whole.compute())
    assert MatchingMetrics().compute() == {}
    with pytest.raises(ValueError, match=r"within 3\.0 px were added to others within 1\.0 px"):
        a.merge(MatchingMetrics(within=3.0))
