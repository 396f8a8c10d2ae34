from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.neighbors import KNeighborsClassifier

from models.metrics.depth import DepthMetrics
from models.metrics.knn import knn_classify
from models.metrics.segmentation import SegmentationMetrics


def test_depth_by_hand_with_the_lower_median() -> None:
    true = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    predicted = torch.tensor([[[2.0, 2.0], [6.0, 20.0]]])
    metrics = DepthMetrics()
    metrics.update(predicted, true)
    # Lower medians 2 and 2: no scaling. Errors 1, 0, 1, 4; ratios 2, 1, 2, 5.
    assert metrics.compute() == {"abs_rel": pytest.approx((1 + 0 + 1 + 4) / 4), "delta1": pytest.approx(0.25)}
    plain = DepthMetrics()
    plain.update(predicted * 10, true)
    assert plain.compute() == pytest.approx(metrics.compute())
    exact = DepthMetrics()
    exact.update(predicted * 10, true, align=False)
    assert exact.compute()["abs_rel"] == pytest.approx(np.mean([19, 9, 19, 49]))


def test_depth_frames_weigh_by_their_valid_pixels() -> None:
    true = torch.zeros(3, 1, 4)
    true[0] = 1.0
    true[1, 0, 0] = 1.0  # one valid pixel; the third frame has none
    true[1, 0, 1] = math.nan
    predicted = torch.ones(3, 1, 4)
    predicted[0, 0, 3] = 2.0
    metrics = DepthMetrics()
    metrics.update(predicted, true)
    assert (metrics.frames, metrics.pixels) == (2, 5)
    assert metrics.compute() == {"abs_rel": pytest.approx(1 / 5), "delta1": pytest.approx(4 / 5)}
    assert DepthMetrics().compute() == {}


def test_depth_parts_add_up() -> None:
    g = torch.Generator().manual_seed(0)
    p, t = torch.rand(6, 5, 7, generator=g) + 0.1, torch.rand(6, 5, 7, generator=g) + 0.1
    whole, a, b = DepthMetrics(), DepthMetrics(), DepthMetrics()
    whole.update(p, t)
    a.update(p[:2], t[:2])
    b.update(p[2:], t[2:])
    a.merge(b)
    assert a.compute() == pytest.approx(whole.compute())


def test_miou_equals_torchmetrics_where_all_classes_occur() -> None:
    g = torch.Generator().manual_seed(0)
    true = torch.randint(0, 4, (5, 8, 9), generator=g)
    predicted = torch.where(torch.rand(5, 8, 9, generator=g) < 0.6, true, torch.randint(0, 4, (5, 8, 9), generator=g))
    true[:, 0] = -1
    metrics = SegmentationMetrics(4)
    metrics.update(predicted[:3], true[:3])
    rest = SegmentationMetrics(4)
    rest.update(predicted[3:], true[3:])
    metrics.merge(rest)
    reference = torchmetrics.JaccardIndex("multiclass", num_classes=4, ignore_index=-1)
    assert metrics.compute()["miou"] == pytest.approx(float(reference(predicted, true)), rel=1e-6)


def test_miou_leaves_absent_classes_out_and_keeps_false_alarms() -> None:
    metrics = SegmentationMetrics(5)
    true = torch.tensor([0, 0, 1, 1, -1])
    metrics.update(torch.tensor([0, 0, 1, 3, 4]), true)
    # 0: 2/2. 1: 1/2. 3: 0/1, predicted but never true. 2 and 4: absent (4 only on an ignored pixel).
    assert metrics.compute()["miou"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics.compute()["accuracy"] == pytest.approx(0.75)
    assert [bool(x) for x in metrics.per_class().isnan()] == [False, False, True, False, True]
    assert SegmentationMetrics(3).compute() == {}


def test_knn_equals_scikit_learn() -> None:
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(80, 6, generator=g), torch.randn(30, 6, generator=g)
    labels = torch.randint(0, 4, (80,), generator=g)
    unit = torch.nn.functional.normalize
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    reference.fit(unit(bank).numpy(), labels.numpy())
    expected = reference.predict(unit(queries).numpy())
    assert knn_classify(queries * 3, bank * 5, labels, 4).tolist() == expected.tolist()


def test_knn_with_a_small_bank_and_tiny_temperature() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([2, 0, 0])
    query = torch.tensor([[1.0, 0.001]])
    assert knn_classify(query, bank, labels, 3, temperature=1e-4).tolist() == [2]
    assert knn_classify(query, bank, labels, 3, temperature=1e4).tolist() == [0]
    with pytest.raises(ValueError, match="at least one"):
        knn_classify(query, bank[:0], labels[:0], 3)
