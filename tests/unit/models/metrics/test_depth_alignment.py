"""Alignments of depth and the metrics of videos."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sklearn.linear_model import LinearRegression

from models.metrics.alignment import ALIGNMENTS
from models.metrics.depth import VIDEO_ALIGNMENT, DepthMetrics, VideoDepthMetrics, frame_scores, self_pair_depth


def depths(seed: int = 0, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions that are right up to scale 2 and shift 0.3, but for noise and a few gross errors."""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(count, generator=g, dtype=torch.float64) * 3 + 0.5
    t = 2 * p + 0.3 + 0.05 * torch.randn(count, generator=g, dtype=torch.float64)
    t[:6] += 4
    return p, t


@pytest.mark.parametrize(
    ("name", "scale", "shift"),
    [
        ("none", 1.0, 0.0),
        ("median_scale", 3.0, 0.0),  # medians 2 and 6
        ("least_squares_scale", (3 + 12 + 36) / (1 + 4 + 16), 0.0),
        ("least_squares_scale_shift", 33 / 14, 0.5),  # worked out below
        ("l1_scale", 3.0, 0.0),  # ratios 3, 3, 2.25 with weights 1, 2, 4: the weighted median is 2.25
    ],
)
def test_alignments_by_hand(name: str, scale: float, shift: float) -> None:
    p, t = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([3.0, 6.0, 9.0]).double()
    if name == "l1_scale":
        scale = 2.25
    if name == "least_squares_scale_shift":
        # Means 7/3 and 6; sum of squares 42/9, of products (-4/3)(-3) + 0 + (5/3)(3) = 9; 9 / (42/9) = 27/14.
        scale, shift = 27 / 14, 6 - 27 / 14 * 7 / 3
    assert ALIGNMENTS[name](p, t) == (pytest.approx(scale), pytest.approx(shift))


def test_least_squares_equals_scikit_learn() -> None:
    p, t = depths()
    both = LinearRegression().fit(p[:, None].numpy(), t.numpy())
    one = LinearRegression(fit_intercept=False).fit(p[:, None].numpy(), t.numpy())
    expected = (pytest.approx(both.coef_[0]), pytest.approx(both.intercept_))
    assert ALIGNMENTS["least_squares_scale_shift"](p, t) == expected
    assert ALIGNMENTS["least_squares_scale"](p, t)[0] == pytest.approx(one.coef_[0])


def l1_optimum(p: torch.Tensor, t: torch.Tensor, *, shift: bool) -> float:
    """The least absolute error by linear programming: minimise sum e with -e <= s p + b - t <= e."""
    n = len(p)
    columns = np.stack([p.numpy(), np.ones(n)], 1)[:, : 1 + shift]
    a = np.block([[columns, -np.eye(n)], [-columns, -np.eye(n)]])
    bounds = [(None, None)] * columns.shape[1] + [(0, None)] * n
    cost = np.concatenate([np.zeros(columns.shape[1]), np.ones(n)])
    return float(linprog(cost, A_ub=a, b_ub=np.concatenate([t.numpy(), -t.numpy()]), bounds=bounds).fun)


@pytest.mark.parametrize("seed", range(3))
def test_l1_alignments_reach_the_optimum(seed: int) -> None:
    p, t = depths(seed)
    for name, shift in (("l1_scale", False), ("l1_scale_shift", True)):
        scale, offset = ALIGNMENTS[name](p, t)
        error = float((scale * p + offset - t).abs().sum())
        assert error == pytest.approx(l1_optimum(p, t, shift=shift), rel=1e-7)


def test_monst3rs_alignments_stop_short_of_the_optimum() -> None:
    p, t = depths()
    scale, shift = ALIGNMENTS["monst3r_adam_scale_shift"](p, t)
    start = float(t.median() / p.median())
    assert abs(scale - start) <= 0.11
    assert abs(shift) <= 0.11
    error = float((scale * p + shift - t).abs().sum())
    before = float((start * p - t).abs().sum())
    assert l1_optimum(p, t, shift=True) < error < before
    weiszfeld, none = ALIGNMENTS["monst3r_weiszfeld_scale"](p, t)
    assert none == 0
    assert float((weiszfeld * p - t).abs().sum()) == pytest.approx(l1_optimum(p, t, shift=False), rel=0.02)


def test_a_constant_prediction_is_only_shifted() -> None:
    p, t = torch.full((4,), 2.0).double(), torch.tensor([1.0, 2.0, 3.0, 6.0]).double()
    assert ALIGNMENTS["least_squares_scale_shift"](p, t) == (1.0, pytest.approx(1.0))


def test_a_video_is_aligned_once_as_a_whole() -> None:
    # Frame 1 is right at scale 2, frame 2 at scale 4; per frame both would be perfect.
    predicted = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]])
    true = torch.tensor([[[2.0, 4.0]], [[4.0, 8.0]]])
    video = VideoDepthMetrics(("least_squares_scale", "none"))
    video.update(predicted, true)
    # s = (2 + 8 + 4 + 16) / (1 + 4 + 1 + 4) = 3: errors 1/2, 2/4, 1/4, 2/8.
    values = video.compute()
    assert values["abs_rel"] == values["abs_rel/least_squares_scale"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 4)
    assert values["abs_rel/none"] == pytest.approx((0.5 + 0.5 + 0.75 + 0.75) / 4)
    frames = DepthMetrics()
    frames.update(predicted, true)
    assert frames.compute()["abs_rel"] == pytest.approx(0.0)


def test_sequences_weigh_by_valid_pixels_and_add_up() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.rand(3, 4, 5, 6, generator=g) + 0.2
    t = torch.rand(3, 4, 5, 6, generator=g) + 0.2
    t[1, :, :, 2:] = 0
    t[2] = math.nan
    whole, a, b = VideoDepthMetrics(), VideoDepthMetrics(), VideoDepthMetrics()
    for metrics, part in ((whole, range(3)), (a, range(1)), (b, range(1, 3))):
        for one in part:
            metrics.update(p[one], t[one])
    a.merge(b)
    assert a.compute() == pytest.approx(whole.compute())
    assert whole.sequences == 2
    assert whole.sums[VIDEO_ALIGNMENT].pixels == 4 * 5 * 6 + 4 * 5 * 2
    singles = []
    for one in range(2):
        single = VideoDepthMetrics()
        single.update(p[one], t[one])
        singles.append(single.compute()["abs_rel"])
    assert whole.compute()["abs_rel"] == pytest.approx((120 * singles[0] + 40 * singles[1]) / 160)


def test_far_depth_is_unknown_and_a_negative_one_is_never_close() -> None:
    metrics = DepthMetrics()
    metrics.update(torch.tensor([[[-1.0, 1.0, 5.0]]]), torch.tensor([[[1.0, 1.0, 80.0]]]), align=False, max_depth=70)
    assert metrics.pixels == 2
    assert metrics.compute() == {"abs_rel": pytest.approx(1.0), "delta1": pytest.approx(0.5)}
    video = VideoDepthMetrics(("none",), max_depth=70)
    video.update(torch.ones(1, 1, 1), torch.full((1, 1, 1), 80.0))
    assert video.compute() == {}


def test_an_unknown_alignment_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown alignments \['best'\]; there are none, median_scale"):
        VideoDepthMetrics(("best",))


def test_frames_for_themselves() -> None:
    true = torch.tensor([[[1.0, 2.0]], [[4.0, 0.0]], [[0.0, 0.0]]])
    predicted = torch.tensor([[[2.0, 2.0]], [[5.0, 9.0]], [[1.0, 1.0]]])
    scores = frame_scores(predicted, true)
    assert scores["abs_rel"][:2].tolist() == [0.5, 0.25]
    assert scores["delta1"][:2].tolist() == [0.5, 0.0]  # 5 / 4 is not below 1.25
    assert bool(scores["abs_rel"][2].isnan())
    known = torch.tensor([[[False, True]], [[False, True]], [[True, True]]])
    assert scores["abs_rel"].isnan().tolist() == [False, False, True]
    holes = frame_scores(predicted, true, known=known)
    assert holes["abs_rel"][0] == 0
    assert holes["abs_rel"].isnan().tolist() == [False, True, True]
    assert frame_scores(predicted * 7, true, align=True)["abs_rel"][1] == 0


def test_a_picture_paired_with_itself() -> None:
    def decode(first: torch.Tensor, second: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        assert first is second
        return [{"pts3d": first[..., :3]}, {"pts3d": first[..., :3] * 9}]

    tokens = torch.ones(2, 4, 6, 5) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    depth = self_pair_depth(decode, tokens, (8, 12))
    assert depth.shape == (2, 8, 12)
    torch.testing.assert_close(depth, torch.full_like(depth, 3.0))
