"""Roles that share a process, and roles that do not, compute the same."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.trainers.backends.base import Edge, combine
from actors.trainers.backends.single import SingleBackend
from tests.support.joint_toy import (
    LOSSES,
    PAINTER,
    ROLES,
    WRITER,
    Case,
    Outcome,
    Painter,
    Writer,
    break_in,
    inline,
    joint_step,
    make_loop,
    nan_in,
    split,
    train,
)

CASES = {
    "gq window 2": Case(kinds="gq", dropout=0.2),
    "qg window 1": Case(kinds="qg", window=1, dropout=0.2),
    "gqgq window 3": Case(kinds="gqgq", window=3, dropout=0.2),
    "qqgg window 2": Case(kinds="qqgg", dropout=0.2),
    "ggg window 1": Case(kinds="ggg", window=1),
    "three tensors": Case(kinds="gqg", three=True, dropout=0.2),
    "two writers": Case(kinds="gqg", writers=2, three=True),
    "two painters": Case(kinds="ggq", painters=2, three=True),
    "broken for the writer": Case(steps=4, spoil=functools.partial(break_in, WRITER, 1, 1)),
    "broken for the painter": Case(steps=4, spoil=functools.partial(break_in, PAINTER, 2, 1)),
    "nan for the painter": Case(steps=4, spoil=functools.partial(nan_in, PAINTER, "y", 3, 2)),
    "nan for the writer": Case(steps=4, spoil=functools.partial(nan_in, WRITER, "x", 0, 2)),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Outcome]]:
    """All cases in plain processes that are started once."""
    return dict(zip(CASES, split(list(CASES.values())), strict=True))


def assert_equal(one: dict[str, Outcome], other: dict[str, Outcome], **tolerance: float) -> None:
    for role in (WRITER, PAINTER):
        for mine, theirs in zip(one[role].terms, other[role].terms, strict=True):
            assert mine == (theirs if not tolerance else pytest.approx(theirs, rel=1e-5, nan_ok=True))
        for name, value in one[role].weights.items():
            torch.testing.assert_close(value, other[role].weights[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].steps == 20])
def test_a_split_run_equals_the_inline_one(name: str, outcomes: dict[str, dict[str, Outcome]]) -> None:
    """Bit for bit with one rank a role; with two, sums are taken in another order."""
    case = CASES[name]
    ranks = case.writers + case.painters
    reference = inline(Case(kinds=case.kinds, window=case.window, three=case.three, dropout=case.dropout))
    assert_equal(outcomes[name], reference, **({} if ranks == 2 else {"rtol": 1e-5, "atol": 1e-6}))
    first, last = (sum(reference[PAINTER].terms[step].values()) for step in (0, -1))
    assert last < first, "the toy learns, so equal weights mean something"


@pytest.mark.parametrize("breaks", [WRITER, PAINTER])
def test_a_sample_that_breaks_on_one_side_weighs_nothing_on_both(
    breaks: str, outcomes: dict[str, dict[str, Outcome]]
) -> None:
    """The step equals one whose data say weight 0 on both sides from the start, and the counts follow."""
    sample = {WRITER: 1, PAINTER: 2}[breaks]

    def both(who: str, loaded: Any) -> None:
        break_in(who, sample, 1, who, loaded)
        loaded.broken = {}

    split_run = outcomes[f"broken for the {breaks}"]
    reference = inline(Case(steps=4, spoil=both))
    assert_equal(split_run, reference)
    for role in (WRITER, PAINTER):
        assert split_run[role].broken == [{f"toy/1/0#{sample}": "truncated file"}]
        assert reference[role].broken == []


@pytest.mark.parametrize(("role", "column", "sample"), [(PAINTER, "y", 3), (WRITER, "x", 0)])
def test_a_nan_on_one_side_makes_both_skip(
    role: str, column: str, sample: int, outcomes: dict[str, dict[str, Outcome]]
) -> None:
    spoil = functools.partial(nan_in, role, column, sample, 2)
    found = outcomes[f"nan for the {role}"]
    assert {name: outcome.skipped for name, outcome in found.items()} == {WRITER: 1, PAINTER: 1}
    assert_equal(found, inline(Case(steps=4, spoil=spoil)))
    clean = inline(Case(steps=2))
    before = inline(Case(steps=3, spoil=spoil))
    for who in (WRITER, PAINTER):
        for name, value in clean[who].weights.items():
            assert torch.equal(value, before[who].weights[name]), "the skipped step left the weights alone"


def test_what_is_not_finite_is_named_with_its_role(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="loom3d"):
        inline(Case(steps=1, spoil=functools.partial(nan_in, WRITER, "x", 0, 0)))
    assert "toy/0/0#0: writer: guess is nan" in caplog.text
    assert "not finite already in its input x" in caplog.text
    assert "toy/0/0#0: painter: paint is nan; not finite already in its input h" in caplog.text
    assert "toy/0/0#1" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "painters"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_order_window_and_size(writers: int, painters: int) -> None:
    orders = itertools.product(("gq", "qg", "gqgq", "qqgg", "qgggq"), (1, 2, 3), (False, True))
    cases = [
        Case(kinds=kinds, window=window, three=three, writers=writers, painters=painters)
        for kinds, window, three in orders
    ]
    for case, outcome in zip(cases, split(cases), strict=True):
        reference = inline(Case(kinds=case.kinds, window=case.window, three=case.three))
        assert_equal(outcome, reference, **({} if writers + painters == 2 else {"rtol": 1e-5, "atol": 1e-6}))


def test_the_sum_does_not_depend_on_the_roles_being_apart() -> None:
    """Against both modules trained as one, without any edge."""
    case = Case(kinds="gqg", steps=1, three=True)
    found: dict[str, dict[str, Tensor]] = {}

    def gradients(case: Case, role: str, link: Any, backend: Any) -> None:
        loop = make_loop(case, role, link, backend)
        loop.train_step(joint_step(0, case.kinds))
        found[role] = {n: p.grad.clone() for n, p in loop.module.named_parameters() if p.grad is not None}

    inline(case, gradients)
    writer, painter = Writer(), Painter()
    loaded = joint_step(0, case.kinds)
    counts = {"guess": 12.0, "paint": 8.0}
    loss = torch.zeros(())
    for micro in loaded.micro_batches:
        left = ROLES[WRITER].step(writer, micro.batch, {})
        loss = loss + LOSSES["guess"] * left.sums["guess"] / counts["guess"]
        if micro.kind == "g":
            right = ROLES[PAINTER].step(painter, micro.batch, left.outputs)
            loss = loss + LOSSES["paint"] * right.sums["paint"] / counts["paint"]
    loss.backward()
    for role, module in ((WRITER, writer), (PAINTER, painter)):
        norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        scale = min(1.0, 0.5 / float(norm))  # the loop has clipped its own
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(found[role][name], scale * parameter.grad, rtol=1e-4, atol=1e-6)


class Doubling(SingleBackend):
    """Scales its loss, as DeepSpeed's engine must be made to cancel its own average, and undoes it in its gradients."""

    loss_scale = 2.0

    def backward(self, loss: Tensor | None, edges: Sequence[Edge] = ()) -> None:
        scalar = combine(loss, edges)
        if scalar is not None:
            (2.0 * scalar).backward()

    def reduce(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        return super().reduce(extra)


def test_what_crosses_is_free_of_a_backend_s_own_scale() -> None:
    """Doubling is exact in floating point, so not a bit may differ."""
    case = Case(kinds="gqg", steps=5, three=True)
    scaled = inline(case, lambda case, role, link, _: train(case, role, link, Doubling()))
    assert_equal(scaled, inline(case))
