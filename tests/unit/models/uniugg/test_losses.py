from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ModelError, WeightsError
from models.geometry.poses import make_pose, quaternion_to_matrix
from models.uniugg.losses import (
    SemanticObjective,
    SpatialObjective,
    both_orders,
    compared,
    distillation,
    semantic_counts,
    semantic_sums,
    spatial_counts,
    spatial_sums,
)
from models.uniugg.losses_matching import log_normalisers, matching_terms
from models.uniugg.losses_points import SKY_ERROR, confidence_regression, mean_distance, pair_targets, point_errors
from models.uniugg.losses_rgb import colour_terms

OBJECTIVE = SpatialObjective(
    temperature=0.05, block=7, alpha=0.2, beta=10.0, metric=True, lpips=0.0, ssim=0.0, lpips_weights="",
    symmetrise=False,
)  # fmt: skip


def dense_terms(
    descriptors: tuple[Tensor, Tensor],
    confidences: tuple[Tensor, Tensor],
    valid: Tensor,
    temperature: float,
    beta: float,
) -> Tensor:
    """The matching loss with the whole matrix, as a sum."""
    similar = descriptors[0] @ descriptors[1].mT / temperature
    probabilities = [similar.softmax(dim).diagonal(dim1=1, dim2=2).clip(1e-8) for dim in (1, 2)]
    loss = -(probabilities[0].log() + probabilities[1].log())
    confidence = (confidences[0] + confidences[1]) / 2
    return (confidence * loss - beta * confidence.log())[valid].sum()


def matches(samples: int, count: int, dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, Tensor], ...]:
    torch.manual_seed(0)
    first = F.normalize(torch.randn(samples, count, 6, dtype=dtype), dim=-1)
    second = F.normalize(first + 0.5 * torch.randn_like(first), dim=-1)
    confidences = torch.rand(2, samples, count, dtype=dtype) + 0.1
    return (first.requires_grad_(), second.requires_grad_()), tuple(confidences.requires_grad_().unbind())


@pytest.mark.parametrize("block", [1, 5, 16, 40])
def test_blockwise_matching_is_the_dense_one(block: int) -> None:
    descriptors, confidences = matches(3, 16, torch.float32)
    valid = torch.rand(3, 16) < 0.6
    results = []
    for terms in (
        matching_terms(descriptors, confidences, valid, temperature=0.05, beta=10.0, block=block).sum(),
        dense_terms(descriptors, confidences, valid, 0.05, 10.0),
    ):
        results.append([terms.detach(), *torch.autograd.grad(terms, [*descriptors, *confidences], retain_graph=True)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_hopeless_matches_are_clipped_at_the_published_probability() -> None:
    """At a low temperature an opposite descriptor has probability far below 1e-8: no gradient, a fixed loss."""
    first = torch.eye(4, 6).expand(1, 4, 6).clone().requires_grad_()
    second = torch.eye(4, 6).roll(1, 0).expand(1, 4, 6)
    ones = torch.ones(1, 4)
    terms = matching_terms((first, second), (ones, ones), ones.bool(), temperature=0.01, beta=10.0, block=3)
    torch.testing.assert_close(terms, torch.full((1, 4), -2 * math.log(1e-8)))
    terms.sum().backward()
    assert first.grad is not None
    assert not first.grad.any()


def test_log_normalisers_have_right_gradients_and_do_not_overflow() -> None:
    descriptors, _ = matches(2, 5)
    assert torch.autograd.gradcheck(lambda a, b: log_normalisers(a, b, 0.3, 2), descriptors)
    large = torch.tensor([[[1e3], [-1e3]]])
    columns, rows = log_normalisers(large, large, 1.0, 1)
    assert columns.tolist() == rows.tolist() == [[1e6, 1e6]]


def test_pairs_without_matches_and_other_pairs_do_not_matter() -> None:
    descriptors, confidences = matches(2, 9, torch.float32)
    settings = {"temperature": 0.05, "beta": 10.0, "block": 4}
    nothing = matching_terms(descriptors, confidences, torch.zeros(2, 9, dtype=torch.bool), **settings)
    assert float(nothing.detach().abs().sum()) == 0
    gradients = torch.autograd.grad(nothing.sum(), descriptors)
    assert not any(gradient.any() for gradient in gradients)
    valid = torch.ones(2, 9, dtype=torch.bool)
    both = matching_terms(descriptors, confidences, valid, **settings)
    alone = matching_terms(tuple(d[1:] for d in descriptors), tuple(c[1:] for c in confidences), valid[1:], **settings)
    torch.testing.assert_close(both[1:], alone)
    order = torch.randperm(9)
    shuffled = matching_terms(
        tuple(d[:, order] for d in descriptors), tuple(c[:, order] for c in confidences), valid, **settings
    )
    torch.testing.assert_close(shuffled, both[:, order], rtol=1e-4, atol=1e-4)
    swapped = matching_terms(descriptors[::-1], confidences[::-1], valid, **settings)
    torch.testing.assert_close(swapped, both, rtol=1e-4, atol=1e-4)


def scene(samples: int = 2, height: int = 16, width: int = 20, count: int = 30) -> dict[str, object]:
    """A batch of pairs with unknown pixels and sky."""
    generator = torch.Generator().manual_seed(1)
    depth = 1 + torch.rand(samples, 2, height, width, generator=generator)
    depth[:, :, 0], depth[:, :, 1, :5] = 0, -1
    depth[0, 0, 3, 3] = torch.nan
    quaternion = torch.tensor([1.0, 0.0, 0.0, 0.0]) + 0.2 * torch.randn(samples, 2, 4, generator=generator)
    pose = make_pose(quaternion_to_matrix(quaternion), torch.randn(samples, 2, 3, generator=generator))
    return {
        "kind": "pair",
        "weight": torch.ones(samples),
        "image": torch.randint(0, 256, (samples, 2, height, width, 3), generator=generator, dtype=torch.uint8),
        "depth": depth,
        "K": torch.tensor([[20.0, 0, 9], [0, 20, 8], [0, 0, 1]]).expand(samples, 2, 3, 3).contiguous(),
        "pose": pose,
        "matches": torch.randint(0, height * width, (samples, 2, count), generator=generator).int(),
        "match_valid": torch.rand(samples, count, generator=generator) < 0.5,
    }


def predicted(samples: int, height: int = 16, width: int = 20) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.rand(samples, height, width, *shape, generator=generator)

    def view() -> dict[str, Tensor]:
        desc = F.normalize(random(6) - 0.5, dim=-1)
        maps = {"pts3d": random(3), "conf": 1 + random(), "desc": desc, "desc_conf": 0.1 + random(), "rgb": random(3)}
        return {name: tensor.requires_grad_() for name, tensor in maps.items()}

    return view(), view()


def test_targets_are_the_points_of_the_scene_in_the_first_camera() -> None:
    batch = scene()
    targets = pair_targets(batch["depth"], batch["K"], batch["pose"])
    assert not targets.valid[:, :, 0].any()
    assert not targets.valid[0, 0, 3, 3]
    assert targets.sky[:, :, 1, :5].all()
    assert torch.isfinite(targets.points).all()
    depth, pose = batch["depth"], batch["pose"].double()
    z = float(depth[1, 1, 7, 4])
    camera = torch.tensor([(4 - 9) / 20 * z, (7 - 8) / 20 * z, z, 1.0], dtype=torch.float64)
    expected = torch.linalg.inv(pose[1, 0]) @ pose[1, 1] @ camera
    torch.testing.assert_close(targets.points[1, 1, 7, 4].double(), expected[:3], rtol=1e-5, atol=1e-5)


def test_regression_by_hand() -> None:
    batch = scene(1)
    targets = pair_targets(batch["depth"], batch["K"], batch["pose"])
    size = mean_distance(targets.points, targets.valid)
    flat, valid = targets.points.reshape(-1, 3), targets.valid.flatten()
    torch.testing.assert_close(size, flat[valid].norm(dim=-1).mean()[None])
    yes, no = torch.tensor([True]), torch.tensor([False])
    shifted = targets.points + torch.tensor([0.3, 0.0, 0.0])
    error = point_errors(shifted, targets, yes)
    torch.testing.assert_close(error[targets.valid], (0.3 / size).expand(int(targets.valid.sum())))
    assert (error[targets.sky] == SKY_ERROR).all()
    assert not error[~(targets.valid | targets.sky)].any()
    # Its own scale is free without metric data, and counts with it.
    assert float(point_errors(3 * targets.points, targets, no)[targets.valid].max()) < 1e-5
    assert float(point_errors(3 * targets.points, targets, yes)[targets.valid].mean()) == pytest.approx(2, rel=1e-4)
    loss = confidence_regression(torch.tensor([0.5, 9.0]), torch.tensor([2.0, 3.0]), torch.tensor([True, False]), 0.2)
    torch.testing.assert_close(loss, torch.tensor([1.0 - 0.2 * math.log(2), 0.0]))


def test_sums_are_means_of_the_paper_times_counts() -> None:
    batch, (view1, view2) = scene(), predicted(2)
    sums, counts = spatial_sums(view1, view2, batch, OBJECTIVE), spatial_counts(batch, OBJECTIVE)
    targets = pair_targets(batch["depth"], batch["K"], batch["pose"])
    counted = targets.valid | targets.sky
    assert counts["confidence"] == int(counted.sum())
    assert counts["matching"] == int(batch["match_valid"].sum())
    assert counts["rgb"] == 2 * 2 * 16 * 20
    image = batch["image"] / 255
    error = (torch.stack([view1["rgb"], view2["rgb"]], 1) - image).abs().mean()
    torch.testing.assert_close(sums["rgb"] / counts["rgb"], error)
    ends = []
    for number, view in enumerate((view1, view2)):
        index = batch["matches"][:, number].long()
        rows = torch.arange(2)[:, None]
        ends.append((view["desc"].flatten(1, 2)[rows, index], view["desc_conf"].flatten(1)[rows, index]))
    expected = dense_terms((ends[0][0], ends[1][0]), (ends[0][1], ends[1][1]), batch["match_valid"], 0.05, 10.0)
    torch.testing.assert_close(sums["matching"], expected, rtol=1e-4, atol=1e-3)
    every = point_errors(torch.stack([view1["pts3d"], view2["pts3d"]], 1), targets, torch.ones(2, dtype=torch.bool))
    confidence = torch.stack([view1["conf"], view2["conf"]], 1)
    pixels = (confidence * every - 0.2 * confidence.log())[counted]
    torch.testing.assert_close(sums["confidence"], 2 * pixels.sum(), rtol=1e-4, atol=1e-3)


def test_both_orders_swap_everything() -> None:
    batch = scene()
    objective = dataclasses.replace(OBJECTIVE, symmetrise=True)
    columns = both_orders(batch, symmetrise=True)
    swapped = {name: value[2:] for name, value in columns.items()}
    for name in ("image", "depth", "K", "pose", "matches"):
        torch.testing.assert_close(swapped[name][:, 0], batch[name][:, 1], equal_nan=True)
    once, twice = spatial_counts(batch, OBJECTIVE), spatial_counts(batch, objective)
    assert twice == {name: 2 * value for name, value in once.items()}
    view1, view2 = predicted(4)
    sums = spatial_sums(view1, view2, batch, objective)
    halves = [
        spatial_sums(*({n: m[part] for n, m in v.items()} for v in (view1, view2)), both, OBJECTIVE)
        for part, both in ((slice(0, 2), batch), (slice(2, 4), swapped))
    ]
    for name, value in sums.items():
        torch.testing.assert_close(value, halves[0][name] + halves[1][name], rtol=1e-4, atol=1e-3)


def test_a_sample_of_weight_zero_adds_nothing_even_without_a_valid_pixel() -> None:
    batch = scene()
    batch["depth"][1], batch["match_valid"][1] = 0, False
    batch["weight"] = torch.tensor([1.0, 0.0])
    view1, view2 = predicted(2)
    alone = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    sums = spatial_sums(view1, view2, batch, OBJECTIVE)
    expected = spatial_sums(*({n: m[:1] for n, m in v.items()} for v in (view1, view2)), alone, OBJECTIVE)
    for name, value in sums.items():
        torch.testing.assert_close(value, expected[name])
    assert spatial_counts(batch, OBJECTIVE) == spatial_counts(alone, OBJECTIVE)
    leaves = [*view1.values(), *view2.values()]
    for gradient in torch.autograd.grad(sum(sums.values()), leaves):
        assert torch.isfinite(gradient).all()
        assert not gradient[1].any()


def test_autocast_changes_nothing() -> None:
    batch, (view1, view2) = scene(), predicted(2)
    plain = spatial_sums(view1, view2, batch, OBJECTIVE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = spatial_sums(view1, view2, batch, OBJECTIVE)
    assert all(torch.equal(plain[name], within[name]) and within[name].dtype == torch.float32 for name in plain)


def test_colours(weights_dir: Path) -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (2, 40, 48, 3), dtype=torch.uint8)
    same = image / 255
    settings = {"lpips": 0.2, "ssim_weight": 0.5, "lpips_weights": str(weights_dir / "alexnet")}
    assert float(colour_terms(same, image, **settings).abs().max()) < 1e-5
    other = torch.rand(2, 40, 48, 3, requires_grad=True)
    plain = colour_terms(other, image, lpips=0.0, ssim_weight=0.0, lpips_weights="")
    torch.testing.assert_close(plain, (other - same).abs().mean((1, 2, 3)))
    full = colour_terms(other, image, **settings)
    assert (full > plain + 0.1).all()
    full.sum().backward()
    assert other.grad is not None
    assert torch.isfinite(other.grad).all()
    left_out = colour_terms(other, image, lpips=0.2, ssim_weight=0.0, lpips_weights="")
    assert torch.equal(left_out, plain)


def test_lpips_is_never_random(tmp_path: Path) -> None:
    picture = torch.zeros(1, 40, 40, 3)
    with pytest.raises(WeightsError, match="nowhere"):
        colour_terms(picture, picture.byte(), lpips=0.2, ssim_weight=0.0, lpips_weights=str(tmp_path / "nowhere"))


SEMANTIC = SemanticObjective(cosine=0.9, smooth_l1=0.1, share=1 / 3)


def test_distillation_by_hand_and_published_shares() -> None:
    student, teacher = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])
    assert float(distillation(student, teacher, 0.9, 0.1)) == pytest.approx(0.9 + 0.1 * (2.5 + 0.125) / 2)
    assert float(distillation(teacher, teacher, 0.9, 0.1)) == pytest.approx(0, abs=1e-6)
    assert [compared(n, SEMANTIC) for n in (768, 576, 49, 1)] == [256, 192, 16, 1]


def test_semantic_sums_over_drawn_tokens() -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 2, 3, 4, 5, requires_grad=True), torch.randn(2, 2, 3, 5)
    teacher = torch.randn(2, 2, 3, 4, 5), torch.randn(2, 2, 3, 5)
    images, draw = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([11, 12])
    sums = semantic_sums(student, teacher, images, draw, SEMANTIC)
    assert semantic_counts(images, 12, SEMANTIC) == {"semantic_tokens": 12.0, "semantic_summary": 3.0}
    sums["semantic_tokens"].backward()
    touched = student[0].grad.abs().sum(-1) > 0
    assert touched.flatten(2).sum(-1).tolist() == [[4, 4], [4, 0]]
    assert not torch.equal(touched[0, 0], touched[0, 1])
    everywhere = distillation(student[0], teacher[0], 0.9, 0.1)
    torch.testing.assert_close(sums["semantic_tokens"], everywhere[touched].sum())
    summary = distillation(student[1].flatten(2), teacher[1].flatten(2), 0.9, 0.1)
    torch.testing.assert_close(sums["semantic_summary"], (summary * images).sum())
    other = semantic_sums(student, teacher, images, draw + 5, SEMANTIC)
    assert float(other["semantic_tokens"]) != float(sums["semantic_tokens"])


def test_a_teacher_of_another_shape_is_named() -> None:
    one, two = torch.zeros(1, 1, 2, 2, 4), torch.zeros(1, 1, 2, 2, 6)
    summary = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ModelError, match=r"tokens are \(2, 2, 4\) an image and the teacher's \(2, 2, 6\)"):
        semantic_sums((one, summary), (two, summary), torch.ones(1, 1), torch.tensor([1]), SEMANTIC)
