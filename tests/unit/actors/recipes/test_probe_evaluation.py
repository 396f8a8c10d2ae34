from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actors.recipes.probe_evaluation import Survey, _beside_baselines, _knn, principal_colours
from services.contracts import PlanSample, ViewRole


def sample(scene: str, view: int) -> PlanSample:
    return PlanSample(
        id=f"s/{scene}:{view}", source="s", item=scene, kind="view", views=(ViewRole(index=view),), seed=0
    )


def batch(summaries: list[list[float]], types: list[int], weights: list[float]) -> dict[str, Any]:
    n = len(summaries)
    depth = torch.zeros(n, 1, 2)
    depth[:, 0, 0] = torch.arange(1, n + 1)
    return {
        "summary": torch.tensor(summaries)[:, None],
        "scene_type": torch.tensor(types),
        "depth": depth,
        "labels": torch.tensor([[[1, -1]]] * n),
        "weight": torch.tensor(weights),
        "id": [str(i) for i in range(n)],
    }


def test_survey_leaves_fillers_out() -> None:
    survey = Survey()
    samples = [sample("a", 0), sample("a", 1), sample("b", 0)]
    survey.add(batch([[3.0, 0], [0, 2], [1, 1]], [0, 0, 1], [1, 1, 0]), samples, 4)
    features, types = survey.by_view()
    assert features.tolist() == [[1, 0], [0, 1]]
    assert types.tolist() == [0, 0]
    by_scene, scene_types = survey.by_scene()
    torch.testing.assert_close(by_scene, torch.tensor([[0.5**0.5, 0.5**0.5]]))
    assert scene_types.tolist() == [0]
    means = survey.mean_depth()
    assert means["mean depth"].tolist() == [[1.5, 1.5]]
    assert means["mean depth map"].tolist() == [[1.5, 1.5]]  # the second pixel is never known: the mean over all
    assert survey.majority_class() == 1


def test_an_empty_survey_has_no_baseline() -> None:
    survey = Survey()
    assert survey.mean_depth() == {}
    assert survey.majority_class() is None


def test_knn_counts_views_and_scenes_with_their_majority_baseline() -> None:
    bank, queries = Survey(), Survey()
    scenes = [sample("a", 0), sample("b", 0), sample("c", 0)]
    bank.add(batch([[1.0, 0], [1, 0.1], [0, 1]], [0, 0, 1], [1, 1, 1]), scenes, 4)
    asked = [sample("d", 0), sample("e", 0), sample("e", 1)]
    queries.add(batch([[1.0, 0], [0, 1], [0.1, 1]], [0, 1, 1], [1, 1, 1]), asked, 4)
    rows = _knn(bank, queries, 2)
    assert rows["knn/view_top1"]["value"] == pytest.approx(1.0)
    assert rows["knn/view_top1"]["baseline"] == pytest.approx(1 / 3)
    assert rows["knn/scene_top1"]["baseline"] == pytest.approx(1 / 2)
    unknown = Survey()
    unknown.add(batch([[1.0, 0]], [-1], [1]), [sample("f", 0)], 4)
    assert _knn(bank, unknown, 2) == {}


def test_losses_stay_out_and_directions_are_right() -> None:
    numbers = {"loss": 1.0, "loss/segmentation": 1.0, "depth_dpt/abs_rel": 0.1, "segmentation/miou": 0.5}
    baselines = {"mean depth": {"abs_rel": 0.2}, "mean depth map": {"abs_rel": 0.15}, "majority class": {"miou": 0.1}}
    rows = _beside_baselines(numbers, baselines)
    depth = {"value": 0.1, "baseline": 0.2, "baseline_name": "mean depth", "better": "lower"}
    assert rows == {
        "depth_dpt/abs_rel": depth | {"also": {"mean depth map": 0.15}},
        "segmentation/miou": {"value": 0.5, "baseline": 0.1, "baseline_name": "majority class", "better": "higher"},
    }


def test_principal_colours_show_the_largest_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 5, 6, 3, generator=generator) * torch.tensor([10.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:3]
    colours = principal_colours(scores @ basis)
    assert colours.shape == (4, 5, 6, 3)
    assert colours.dtype == np.uint8
    for channel in range(3):
        true = scores[..., channel].flatten().numpy()
        assert abs(np.corrcoef(colours[..., channel].ravel(), true)[0, 1]) > 0.9
    assert principal_colours(torch.randn(1, 2, 2, 2)).shape == (1, 2, 2, 3)
