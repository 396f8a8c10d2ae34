"""A checkpoint that would be broken is refused, and the one before it stays the newest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.trainers import checkpoint as module_under_test
from actors.trainers.checkpoint import Checkpoints, Identity, resume
from services.errors import WeightsError
from tests.support.toy_role import toy_loop, toy_step_of

IDENTITY = Identity(settings={"trainer.lr": 0.05}, plan="p" * 64)
Tensors = dict[str, torch.Tensor]
SOME = "linear.weight"


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


WRONG: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "a weight is missing": ("weights", lambda t: without(t, SOME), rf"missing: {SOME}"),
    "one rank's part": ("weights", lambda t: t | {SOME: t[SOME][:1]}, rf"{SOME} is \(1, 3\) instead of \(2, 3\)"),
    "nothing of it": ("weights", lambda t: t | {SOME: torch.empty(0)}, rf"{SOME} is \(0,\) instead of \(2, 3\)"),
    "zeros": ("weights", lambda t: t | {SOME: torch.zeros(2, 3)}, rf"zero everywhere, .*: {SOME}"),
    "one too many": ("weights", lambda t: t | {"more": torch.ones(1)}, r"left over: more"),
    "no weights at all": ("weights", lambda _: {}, r"missing: head.bias, head.weight, linear.bias, linear.weight"),
    "a moment is missing": (
        "optimizer_state", lambda t: without(t, f"{SOME}/exp_avg"), rf"optimizer.safetensors: missing: {SOME}/exp_avg",
    ),
    "a moment's part": (
        "optimizer_state", lambda t: t | {f"{SOME}/exp_avg": torch.ones(3)}, rf"{SOME}/exp_avg is \(3,\) instead of",
    ),
}  # fmt: skip


def trained(folder: Path) -> tuple[Any, Checkpoints]:
    """A loop after three steps, of which the second was saved."""
    loop, checkpoints = toy_loop(ema=0.9), Checkpoints(folder, IDENTITY, keep=2)
    for step in range(3):
        loop.train_step(toy_step_of(step))
        if step == 1:
            checkpoints.save(loop, best=False)
    return loop, checkpoints


def check_nothing_is_left(folder: Path, checkpoints: Checkpoints) -> None:
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, checkpoints.steps()) == (2, [2])
    assert [path.name for path in folder.iterdir()] == ["step-00000002"], "no draft is left"
    again = toy_loop(ema=0.9)
    resume(again, found)
    assert again.state.step == 2


@pytest.mark.parametrize("case", WRONG)
def test_what_was_gathered_wrongly_is_not_saved(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, change, said = WRONG[case]
    loop, checkpoints = trained(tmp_path)
    right = getattr(loop.backend, method)
    monkeypatch.setattr(loop.backend, method, lambda: change(right()))
    with pytest.raises(WeightsError, match=rf"step-00000003 was not saved, since it would be broken \(.*{said}"):
        checkpoints.save(loop, best=True)
    check_nothing_is_left(tmp_path, checkpoints)
    monkeypatch.undo()
    assert checkpoints.save(loop, best=False).name == "step-00000003"
    assert checkpoints.steps() == [2, 3]


@pytest.mark.parametrize("cut", ["a tensor", "the end"])
def test_what_was_written_wrongly_is_not_saved(cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, checkpoints = trained(tmp_path)

    def failing(tensors: Tensors, path: Path) -> None:
        save_file(without(tensors, SOME) if cut == "a tensor" else tensors, path)
        if cut == "the end":
            path.write_bytes(path.read_bytes()[:40])

    monkeypatch.setattr(module_under_test, "save_file", failing)
    said = rf"read again: missing: {SOME}" if cut == "a tensor" else r"weights.safetensors cannot be read again"
    with pytest.raises(WeightsError, match=said):
        checkpoints.save(loop, best=True)
    check_nothing_is_left(tmp_path, checkpoints)


def test_a_layer_that_is_zero_may_be_saved(tmp_path: Path) -> None:
    loop, checkpoints = trained(tmp_path)
    with torch.no_grad():
        loop.module.linear.bias.zero_()
    assert checkpoints.save(loop, best=False).name == "step-00000003"
