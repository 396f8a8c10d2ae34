"""The role that trains Spa3R: losses by hand, counts, and what must not change a gradient."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.errors import ModelError
from models.spa3r.losses import FieldObjective, field_counts, field_sums, resize_features
from models.spa3r.model import Field, Spa3R
from models.spec import RoleSpec

GRID, CHANNELS, SEMANTIC = (2, 3), 20, 12
PATCHES = GRID[0] * GRID[1]
SMALL: dict[str, Any] = {
    "channels": CHANNELS, "width": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "queries": 5,
    "targets": {"geo": CHANNELS, "sem": SEMANTIC},
}  # fmt: skip
PAPER = FieldObjective(loss="l1", loss_views="targets", targets=("geo", "sem"), depth_probe=True)
RELEASED = FieldObjective(loss="smooth_l1", loss_views="all", targets=("geo", "sem"), depth_probe=True)
TERMS = ("geo_l1", "geo_cosine", "sem_l1", "sem_cosine", "depth_probe")


def build(**changes: Any) -> Spa3R:
    torch.manual_seed(0)
    module = models.build("spa3r-tiny", **{**SMALL, **changes})
    assert isinstance(module, Spa3R)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def role(objective: FieldObjective = PAPER) -> RoleSpec:
    return models.spec("spa3r-tiny").role("trainer").bind(objective=objective)


def batch(samples: int = 3, views: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)
    pose = torch.randn(samples, views, 9, generator=g) * 0.4
    pose[..., 6] += 1
    pose[..., 7:] = 0.8 + 0.4 * torch.rand(samples, views, 2, generator=g)
    roles = torch.zeros(samples, views, dtype=torch.bool)
    for sample in range(samples):
        roles[sample, 1 + torch.randperm(views - 1, generator=g)[:2]] = True
    return {
        "kind": "view_set",
        "id": [str(i) for i in range(samples)],
        "weight": torch.ones(samples),
        "draw": torch.arange(samples),
        "tokens": torch.randn(samples, views, 1, *GRID, CHANNELS, generator=g),
        "pose": pose,
        "depth": 1 + torch.rand(samples, views, *GRID, generator=g),
        "roles": roles,
        "semantic": torch.randn(samples, views, 1, 4, 4, SEMANTIC, generator=g),
        "size": torch.tensor([[28, 42]]).expand(samples, 2),
    }


def rows(whole: dict[str, Any], index: list[int]) -> dict[str, Any]:
    return {
        name: value if name == "kind" else [value[i] for i in index] if name == "id" else value[index]
        for name, value in whole.items()
    }


def gradients(module: torch.nn.Module, batches: list[dict[str, Any]], bound: RoleSpec) -> dict[str, Tensor]:
    """Of the global mean over all batches, as the trainer makes it."""
    module.zero_grad()
    counts = [bound.counts(each) for each in batches]
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    for each in batches:
        sums = bound.step(module, each, {}).sums
        sum(value / max(total[name], 1) for name, value in sums.items()).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_losses_by_hand() -> None:
    predicted = torch.tensor([[[[3.0, 0.0], [0.5, 0.5]]], [[[9.0, 9.0], [9.0, 9.0]]]])
    true = torch.tensor([[[[0.0, 4.0], [0.5, 0.0]]], [[[0.0, 0.0], [1.0, 1.0]]]])
    field = Field(torch.empty(0), {"geo": predicted}, torch.tensor([[[2.0, 1.0]], [[5.0, 5.0]]]))
    depth = torch.tensor([[[0.0, 1.25]], [[1.0, 1.0]]])
    weight = torch.tensor([1.0, 0.0])
    for loss, l1, probe in (
        ("l1", (3 + 4) / 2 + 0.5 / 2, 2 + 0.25),
        ("smooth_l1", (2.5 + 3.5) / 2 + 0.125 / 2, 1.5 + 0.03125),
    ):
        objective = FieldObjective(loss=loss, loss_views="all", targets=("geo",), depth_probe=True)
        sums = field_sums(field, {"geo": true}, depth, weight, objective)
        assert {name: float(value) for name, value in sums.items()} == pytest.approx(
            {"geo_l1": l1, "geo_cosine": 1 + (1 - math.sqrt(0.5)), "depth_probe": probe}, rel=1e-6
        )
        assert field_counts(weight, 1, 2, objective) == dict.fromkeys(("geo_l1", "geo_cosine", "depth_probe"), 2.0)


@pytest.mark.parametrize("objective", [PAPER, RELEASED], ids=["paper", "released"])
def test_the_step_is_context_cameras_and_means(objective: FieldObjective) -> None:
    module, whole = build(), batch()
    sums, counts = role(objective).step(module, whole, {}).sums, role(objective).counts(whole)
    assert tuple(sums) == tuple(counts) == TERMS
    expected = dict.fromkeys(TERMS, 0.0)
    views = 0
    for sample in range(3):
        roles = whole["roles"][sample]
        flat = whole["tokens"][sample, :, 0].flatten(1, 2)
        field = module(flat[~roles][None], whole["pose"][[sample]], GRID)
        semantic = F.interpolate(whole["semantic"][sample, :, 0].permute(0, 3, 1, 2), GRID, mode="bilinear")
        true = {"geo": flat, "sem": semantic.flatten(2).mT}
        for view in range(4):
            if objective is PAPER and not roles[view]:
                continue
            views += 1
            for name, tensor in true.items():
                got = field.predicted[name][0, view].detach()
                difference = got - tensor[view]
                small = difference.abs() < 1
                if objective is RELEASED:
                    difference = torch.where(small, difference.square() / 2, difference.abs() - 0.5)
                expected[f"{name}_l1"] += float(difference.abs().mean(-1).sum())
                norms = got.norm(dim=-1) * tensor[view].norm(dim=-1)
                expected[f"{name}_cosine"] += float((1 - (got * tensor[view]).sum(-1) / norms).sum())
            assert field.depth is not None
            off = (field.depth[0, view].detach() - whole["depth"][sample, view].flatten()).abs()
            if objective is RELEASED:
                off = torch.where(off < 1, off.square() / 2, off - 0.5)
            expected["depth_probe"] += float(off.sum())
    assert {name: float(value.detach()) for name, value in sums.items()} == pytest.approx(expected, rel=1e-4)
    assert counts == dict.fromkeys(TERMS, float(views * PATCHES))


def test_every_parameter_takes_part_and_the_probe_stands_apart() -> None:
    module, bound = build(), role()
    found = gradients(module, [batch()], bound)
    assert found.keys() == {name for name, _ in module.named_parameters()}
    assert all(gradient.any() and torch.isfinite(gradient).all() for gradient in found.values())
    apart = {name for name in found if any(fnmatch.fnmatchcase(name, glob) for glob in bound.unclipped)}
    assert apart == {name for name in found if name.startswith("depth_prob.")} != set()
    alone = gradients(module, [batch()], role(FieldObjective(**{**vars(PAPER), "depth_probe": False})))
    assert all(torch.equal(alone[name], found[name]) for name in found.keys() - apart)


@pytest.mark.parametrize("objective", [PAPER, RELEASED], ids=["paper", "released"])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(objective: FieldObjective) -> None:
    module, bound, whole = build(), role(objective), batch()
    together = gradients(module, [whole], bound)
    assert_same(gradients(module, [rows(whole, [0]), rows(whole, [1, 2])], bound), together)


def test_a_sample_of_weight_zero_is_as_if_it_were_not_there() -> None:
    module, bound, whole = build(), role(), batch()
    expected = gradients(module, [rows(whole, [0, 2])], bound)
    whole["weight"][1] = 0
    whole["tokens"][1] = whole["semantic"][1] = whole["depth"][1] = 0  # what a broken sample is filled with
    assert_same(gradients(module, [whole], bound), expected)


def test_context_that_was_encoded_apart_is_what_is_read() -> None:
    module, bound, whole = build(), role(), batch()
    before = bound.step(module, whole, {}).sums
    context = torch.stack([whole["tokens"][i][~whole["roles"][i]] for i in range(3)])
    same = bound.step(module, {**whole, "context_tokens": context}, {}).sums
    other = bound.step(module, {**whole, "context_tokens": context.flip(2) + 1}, {}).sums
    for name, value in before.items():
        torch.testing.assert_close(same[name], value)
        assert not torch.allclose(other[name], value, rtol=1e-4)


def test_clip_is_a_target_like_the_others() -> None:
    module = build(targets={"clip": SEMANTIC})
    objective = FieldObjective(loss="l1", loss_views="targets", targets=("clip",), depth_probe=False)
    module.depth_prob = None
    whole = batch()
    whole["clip"] = whole.pop("semantic")
    assert tuple(role(objective).step(module, whole, {}).sums) == ("clip_l1", "clip_cosine")


def test_features_of_another_grid_are_resized_without_aligned_corners() -> None:
    given = torch.randn(1, 2, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    halved = resize_features(given, (2, 2)).unflatten(2, (2, 2))
    expected = given.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    torch.testing.assert_close(halved, expected)
    assert torch.equal(resize_features(given, (4, 4)), given.flatten(2, 3))


def test_it_learns_one_batch() -> None:
    module, bound, one = build(), role(), batch()
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    counts, history = bound.counts(one), []
    for _ in range(40):
        optimiser.zero_grad()
        terms = {name: value / counts[name] for name, value in bound.step(module, one, {}).sums.items()}
        sum(terms.values()).backward()
        optimiser.step()
        history.append({name: float(value.detach()) for name, value in terms.items()})
    assert all(history[-1][term] < 0.7 * history[0][term] for term in TERMS)


def test_losses_are_float32_inside_autocast() -> None:
    module, bound, one = build(), role(RELEASED), batch()
    plain = bound.step(module, one, {}).sums
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = bound.step(module, one, {}).sums
    for name, value in sums.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, plain[name], rtol=0.05, atol=0.5)


def test_activation_checkpointing_of_the_named_blocks_changes_no_gradient() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    module, bound, one = build(), role(), batch()
    plain = gradients(module, [one], bound)
    blocks = [child for child in module.modules() if type(child).__name__ in bound.checkpointed]
    assert len(blocks) == 2
    apply_activation_checkpointing(
        module, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda child: any(child is one for one in blocks)
    )
    again = gradients(module, [one], bound)
    assert all(torch.equal(one, two) for one, two in zip(plain.values(), again.values(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pair"}, "takes micro-batches of view_set, got 'pair'"),
        ({"roles": torch.zeros(3, 4, dtype=torch.bool)}, r"at least one; got \[0\]"),
        ({"roles": torch.tensor([[False, True, True, True], [False, True, True, False], [False, True, True, False]])},
         r"as many views of each role, and at least one; got \[2, 3\]"),
        ({"roles": torch.tensor([[True, False, True, False]] * 3)}, "the first view of a set is always context"),
        ({"roles": torch.zeros(3, 1, dtype=torch.bool), "tokens": torch.zeros(3, 1, 1, *GRID, CHANNELS)},
         "at least two views"),
    ],
)  # fmt: skip
def test_view_sets_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        role().counts(batch() | change)


def test_what_an_objective_needs_is_asked_for() -> None:
    without = {name: value for name, value in batch().items() if name != "semantic"}
    with pytest.raises(ModelError, match="no column 'semantic'"):
        role().step(build(), without, {})
    narrow = batch()
    narrow["semantic"] = narrow["semantic"][..., :5]
    with pytest.raises(ModelError, match=r"predicts \(2, 6, 12\) a sample, its encoder gives \(2, 6, 5\).*targets.sem"):
        role().step(build(), narrow, {})
    with pytest.raises(ModelError, match="depth_probe=true"):
        role().step(build(depth_probe=False), batch(), {})
    for name, value in (("loss", "l2"), ("loss_views", "context")):
        with pytest.raises(ModelError, match=f"recipe.spa3r.{name}='{value}': allowed are"):
            FieldObjective(**{**vars(PAPER), name: value})


def test_a_plan_can_build_and_step_it_without_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, bound, one = FakeTensorMode(allow_non_fake_inputs=True), role(), batch()
    with mode:
        module = models.build("spa3r-base")
        wide = {
            "tokens": torch.zeros(3, 4, 1, *GRID, 2048),
            "semantic": torch.zeros(3, 4, 1, 14, 14, 1024),
        }
    # Small columns are real in a plan.
    sums = bound.step(module, one | wide, {}).sums
    torch.stack(list(sums.values())).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())
