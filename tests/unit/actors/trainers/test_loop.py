from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch

from actors.trainers.loop import Hooks
from actors.trainers.optim import learning_rate, parameter_groups
from configs import ConfigError
from configs.schema import TrainerConfig
from services.errors import NonFiniteError
from services.telemetry import events


def weights(loop: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in loop.module.state_dict().items()}


def test_a_step_is_adamw_on_the_mean_loss(toy: Any) -> None:
    loop = toy.loop(weight_decay=0.1, clip_norm=0.0)
    reference = toy.Toy()
    decay = [p for p in reference.parameters() if p.ndim > 1]
    rest = [p for p in reference.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.05)
    for step in range(4):
        loop.train_step(toy.step(step))
        data = toy.data(step, 8)
        error = reference(data["x"]) - data["y"]
        adam.zero_grad()
        (error.square().mean() + 0.5 * error.abs().mean()).backward()
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, loop.config)
        adam.step()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(loop.module.state_dict()[name], value)


def test_gradient_does_not_depend_on_accumulation(toy: Any) -> None:
    whole, cut = toy.loop(), toy.loop()
    for step in range(3):
        a = whole.train_step(toy.step(step))
        b = cut.train_step(toy.step(step, micro_batches=4))
        assert a == pytest.approx(b, rel=1e-6)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(cut)[name], rtol=1e-5, atol=1e-6)


def test_uneven_weights_are_divided_by_the_count_of_the_whole_step(toy: Any) -> None:
    """Three of four samples of one micro-batch are broken: the mean is over the five that are left."""
    cut, whole = toy.loop(), toy.loop()
    step = toy.step(0, micro_batches=2)
    step.micro_batches[0].batch["weight"][:3] = 0
    terms = cut.train_step(step)
    data = toy.data(0, 8)
    data["weight"][:3] = 0
    error = toy.Toy()(data["x"][3:]) - data["y"][3:]
    assert terms["square"] == pytest.approx(float(error.detach().square().mean()), rel=1e-6)
    merged = toy.step(0)
    merged.micro_batches[0].batch = data
    whole.train_step(merged)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(cut)[name], rtol=1e-5, atol=1e-6)


def test_clipping_limits_the_norm_that_the_optimiser_sees(toy: Any) -> None:
    loop = toy.loop(clip_norm=0.01)
    loop.train_step(toy.step(0))
    norm = torch.nn.utils.get_total_norm([p.grad for p in loop.module.parameters()])
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_parameters_have_their_factor_on_the_learning_rate(toy: Any) -> None:
    """The first glob that fits counts; a factor of 0 leaves the weights where they are."""
    loop = toy.loop(lr_scale={"linear.bias": 0.0, "linear.*": 0.5}, clip_norm=0.0, weight_decay=0.1)
    reference = toy.Toy()
    adam = torch.optim.AdamW(
        [
            {"params": [reference.head.weight], "weight_decay": 0.1, "scale": 1.0},
            {"params": [reference.head.bias], "weight_decay": 0.0, "scale": 1.0},
            {"params": [reference.linear.weight], "weight_decay": 0.1, "scale": 0.5},
        ]
    )
    before = reference.linear.bias.detach().clone()
    for step in range(3):
        loop.train_step(toy.step(step))
        data = toy.data(step, 8)
        error = reference(data["x"]) - data["y"]
        adam.zero_grad()
        (error.square().mean() + 0.5 * error.abs().mean()).backward()
        for group in adam.param_groups:
            group["lr"] = group["scale"] * learning_rate(step, loop.config)
        adam.step()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(loop.module.state_dict()[name], value)
    assert torch.equal(loop.module.linear.bias, before)


def test_a_factor_that_fits_no_parameter_is_refused(toy: Any) -> None:
    with pytest.raises(ConfigError, match=r"trainer.lr_scale: \['encoder.*'\] fits none of the 4 parameters"):
        toy.loop(lr_scale={"head.*": 0.5, "encoder.*": 0.1})


def test_a_factor_of_frozen_parameters_has_no_effect() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[1].requires_grad_(False)
    groups = parameter_groups(module, TrainerConfig(lr_scale={"1.*": 0.2}), ("bias",))
    assert [group["scale"] for group in groups] == [1.0, 1.0]
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def test_learning_rate_warms_up_and_falls_to_the_floor() -> None:
    config = TrainerConfig(steps=100, lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(55, config) == pytest.approx(0.55)
    assert learning_rate(100, config) == pytest.approx(0.1)
    rates = [learning_rate(step, config) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_moving_average_follows_its_definition(toy: Any) -> None:
    loop = toy.loop(ema=0.9)
    expected = weights(loop)
    for step in range(3):
        loop.train_step(toy.step(step))
        expected = {k: 0.9 * expected[k] + 0.1 * v for k, v in weights(loop).items()}
    for name, value in loop.average.weights.items():
        torch.testing.assert_close(value, expected[name])
    before = weights(loop)
    loop.average.swap(loop.module)
    torch.testing.assert_close(weights(loop)["linear.weight"], expected["linear.weight"])
    loop.average.swap(loop.module)
    assert all(torch.equal(v, before[k]) for k, v in weights(loop).items())


def test_a_nan_is_named_skipped_and_finally_fatal(toy: Any, caplog: pytest.LogCaptureFixture) -> None:
    loop = toy.loop(max_skipped_steps=1, ema=0.5)
    before, averaged = weights(loop), {k: v.clone() for k, v in loop.average.weights.items()}
    bad = toy.step(0, micro_batches=2)
    bad.micro_batches[1].batch["x"][2, 0] = math.nan
    with caplog.at_level(logging.WARNING, logger="loom3d"):
        loop.train_step(bad)
    assert "toy/0#6" in caplog.text
    assert "not finite already in its input x" in caplog.text
    assert "toy/0#5" not in caplog.text
    assert all(torch.equal(v, before[k]) for k, v in weights(loop).items())
    assert all(torch.equal(v, averaged[k]) for k, v in loop.average.weights.items())
    assert loop.state.step == 1
    loop.train_step(toy.step(1))
    assert not torch.equal(weights(loop)["linear.weight"], before["linear.weight"])
    again = toy.step(2)
    again.micro_batches[0].batch["y"][7] = math.inf
    with pytest.raises(NonFiniteError, match=r"toy/2#7.*|max_skipped_steps allows 1") as failure:
        loop.train_step(again)
    assert "toy/2#7" in str(failure.value)
    assert "toy/2#6" not in str(failure.value)


def test_a_gradient_alone_that_is_not_finite_is_found(toy: Any, caplog: pytest.LogCaptureFixture) -> None:
    """sqrt(0) is a finite loss with an infinite gradient."""
    from models.spec import RoleSpec, StepOutput

    def step(module: Any, batch: Any, received: Any) -> StepOutput:
        return StepOutput(sums={"root": (module(batch["x"]) * batch["scale"]).abs().sqrt().sum()})

    loop = toy.loop()
    loop.role = RoleSpec(name="toy", step=step, counts=lambda batch: {"root": float(len(batch["x"]))})
    loop.loss_weights = {"root": 1.0}
    loaded = toy.step(0)
    loaded.micro_batches[0].batch["scale"] = torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1])
    with caplog.at_level(logging.WARNING, logger="loom3d"):
        terms = loop.train_step(loaded)
    assert math.isfinite(terms["root"])
    assert loop.state.skipped == 1
    assert "toy/0#3" in caplog.text
    assert "gradient of" in caplog.text
    caplog.clear()
    loop.backend.sharded = True  # as where a backward pass would mix the ranks' gradients
    again = toy.step(1)
    again.micro_batches[0].batch["scale"] = torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1])
    with caplog.at_level(logging.WARNING, logger="loom3d"):
        loop.train_step(again)
    assert "the loss of every single sample is finite" in caplog.text
    assert "backend=ddp" in caplog.text


def test_broken_samples_reach_the_hook(toy: Any) -> None:
    seen: list[Any] = []
    loop = toy.loop(hooks=Hooks(broken=seen.append))
    step = toy.step(0)
    step.broken = {"toy/0#1": "truncated file"}
    loop.train_step(step)
    assert seen == [{"toy/0#1": "truncated file"}]


def test_run_logs_validates_and_saves_when_due(toy: Any) -> None:
    lines: list[Any] = []
    saves: list[tuple[int, bool]] = []
    values = iter([0.5, 0.7, 0.4])

    def validate(module: torch.nn.Module) -> dict[str, float]:
        assert not module.training
        return {"loss": next(values)}

    hooks = Hooks(
        metrics=lambda step, split, numbers: lines.append((step, split, numbers)),
        validate=validate,
        save=lambda step, best: saves.append((step, best)),
    )
    loop = toy.loop(hooks=hooks, steps=9, validate_every=3, checkpoint_every=2, log_every=4)
    state = loop.run(toy.steps(0, 9))
    assert [(step, split) for step, split, _ in lines] == [
        (3, "val"), (4, "train"), (6, "val"), (8, "train"), (9, "train"), (9, "val"),
    ]  # fmt: skip
    assert saves == [(2, False), (3, True), (4, False), (6, False), (8, False), (9, True)]
    assert (state.best, state.best_step, state.samples) == (0.4, 9, 72)
    train = [numbers for _, split, numbers in lines if split == "train"]
    assert set(train[0]) >= {"loss", "loss/square", "lr", "grad_norm", "samples_per_s", "wait_share", "hit_rate"}
    assert train[0]["loss"] == pytest.approx(train[0]["loss/square"] + 0.5 * train[0]["loss/abs"])


def test_an_unknown_best_metric_says_what_there_is(toy: Any) -> None:
    loop = toy.loop(hooks=Hooks(validate=lambda module: {"loss": 1.0}), best_metric="miou", steps=1)
    with pytest.raises(KeyError, match=r"miou.*loss"):
        loop.run(toy.steps(0, 1))


def test_global_generators_belong_to_the_role(toy: Any) -> None:
    """Two roles that take turns in one process draw what each would have drawn alone, and nobody else notices."""
    alone, turns, other = toy.loop(dropout=0.5), toy.loop(dropout=0.5), toy.loop(dropout=0.5)
    alone_terms = [alone.train_step(toy.step(step)) for step in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    mixed_terms = []
    for step in range(3):
        mixed_terms.append(turns.train_step(toy.step(step)))
        other.train_step(toy.step(step))
    assert mixed_terms == alone_terms
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_autocast_keeps_float32_weights(toy: Any) -> None:
    loop = toy.loop(precision="bfloat16")
    exact = toy.loop()
    a, b = loop.train_step(toy.step(0)), exact.train_step(toy.step(0))
    assert a["square"] != b["square"]
    assert a["square"] == pytest.approx(b["square"], rel=0.05)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in loop.module.parameters())


def test_spans_are_written(toy: Any, tmp_path: Any) -> None:
    events.configure(tmp_path, "trainer-0")
    try:
        toy.loop(steps=2).run(toy.steps(0, 2))
    finally:
        events.configure(None, "")
    whats = [json.loads(line)["what"] for line in (tmp_path / "trainer-0.jsonl").read_text().splitlines()]
    assert whats.count("forward") == whats.count("backward") == whats.count("step") == whats.count("load") == 2
    assert whats.count("checkpoint") == 1
