from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.trainers.checkpoint import Checkpoints, Identity, load_weights, resume
from actors.trainers.loop import Hooks
from actors.trainers.tensors import saved_tensors
from services.errors import ResumeError

IDENTITY = Identity(settings={"trainer.lr": 0.05, "trainer.betas": (0.9, 0.999)}, plan="p" * 64)


def saving_loop(toy: Any, folder: Path, *, keep: int = 2, **settings: Any) -> tuple[Any, Checkpoints]:
    checkpoints = Checkpoints(folder, IDENTITY, keep=keep)
    loop = toy.loop(dropout=0.3, ema=0.9, **settings)
    loop.hooks = Hooks(save=lambda step, best: checkpoints.save(loop, best=best))
    return loop, checkpoints


def everything(loop: Any) -> dict[str, torch.Tensor]:
    state = {f"w/{k}": v.detach().clone() for k, v in loop.module.state_dict().items()}
    state |= {f"e/{k}": v.clone() for k, v in loop.average.weights.items()}
    return state | {f"o/{k}": v for k, v in loop.backend.optimizer_state().items()}


def test_five_steps_resumed_equal_ten(toy: Any, tmp_path: Path) -> None:
    straight, _ = saving_loop(toy, tmp_path / "a")
    terms = [straight.train_step(step) for step in toy.steps(0, 10)]

    first, checkpoints = saving_loop(toy, tmp_path / "b")
    head = [first.train_step(step) for step in toy.steps(0, 5)]
    checkpoints.save(first, best=False)
    second, checkpoints = saving_loop(toy, tmp_path / "b")
    found = checkpoints.newest()
    assert found is not None
    resume(second, found)
    assert second.state == first.state
    tail = [second.train_step(step) for step in toy.steps(5, 10)]
    assert head + tail == terms
    a, b = everything(straight), everything(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.support import toy_role as toy
from actors.trainers.checkpoint import Checkpoints, Identity, resume
from actors.trainers.loop import Hooks
from actors.trainers.tensors import saved_tensors
import torch
torch.set_num_threads(1)
checkpoints = Checkpoints(Path({folder!r}), Identity(settings={{}}, plan="p"), keep=2)
loop = toy.toy_loop(dropout=0.3, ema=0.9, steps=10, checkpoint_every=5)
kill_at = int(sys.argv[1])
def metrics(step, split, numbers):
    print(step, float(numbers["loss"]).hex(), flush=True)
    if step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
loop.hooks = Hooks(metrics=metrics, save=lambda step, best: checkpoints.save(loop, best=best))
found = checkpoints.newest()
if found:
    resume(loop, found)
loop.run(toy.toy_steps(loop.state.step, 10))
"""


def test_kill_9_and_resume_repeat_the_same_losses(tmp_path: Path) -> None:
    def run(folder: Path, kill_at: int) -> tuple[int, dict[str, str]]:
        code = _KILLED.format(root=str(Path(__file__).parents[4]), folder=str(folder))
        done = subprocess.run(
            [sys.executable, "-c", code, str(kill_at)], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode, dict(line.split() for line in done.stdout.splitlines())

    code, straight = run(tmp_path / "straight", 0)
    assert code == 0
    assert len(straight) == 10
    killed, head = run(tmp_path / "killed", 7)  # two steps past the checkpoint
    assert killed == -signal.SIGKILL
    code, tail = run(tmp_path / "killed", 0)
    assert code == 0
    assert min(map(int, tail)) == 6
    assert head | tail == straight
    assert all(straight[step] == head[step] for step in head)


def test_keeps_the_newest_and_the_best(toy: Any, tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 2.5, 2.6])
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=2)
    loop = toy.loop(steps=10, validate_every=2)
    loop.hooks = Hooks(
        validate=lambda module: {"loss": next(values)}, save=lambda step, best: checkpoints.save(loop, best=best)
    )
    (tmp_path / ".writing-step-00000001-999").mkdir(parents=True)
    loop.config = type(loop.config)(**{**vars(loop.config), "checkpoint_every": 2})
    loop.run(toy.steps(0, 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000008", "step-00000010"]
    best, newest = checkpoints.best(), checkpoints.newest()
    assert best is not None
    assert best.step == 4
    assert newest is not None
    assert newest.step == 10


def test_another_may_say_which_steps_are_kept(toy: Any, tmp_path: Path) -> None:
    """As a run of several roles does, whose roles must keep the same steps."""
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=1)
    loop = toy.loop()
    for step in toy.steps(0, 4):
        loop.train_step(step)
        folder = checkpoints.save(loop, best=False, drop=False)
        assert folder == tmp_path / f"step-{step.step + 1:08d}"
    assert checkpoints.steps() == [1, 2, 3, 4]
    assert checkpoints.at(2).step == 2
    (tmp_path / "step-00000003" / "weights.safetensors").write_bytes(b"torn")
    assert checkpoints.steps() == [1, 2, 4]
    with pytest.raises(ResumeError, match=r"step-00000003 cannot be resumed: weights.safetensors is torn"):
        checkpoints.at(3)
    with pytest.raises(ResumeError, match=r"no checkpoint of step 7; it has \[1, 2, 4\]"):
        checkpoints.at(7)
    with pytest.raises(ResumeError, match="belongs to another run"):
        Checkpoints(tmp_path, Identity(settings={}, plan=IDENTITY.plan), keep=1).at(2)
    (tmp_path / ".writing-step-00000005-999").mkdir()
    checkpoints.drop_except([2, 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_tied_weight_is_saved_once(toy: Any, tmp_path: Path) -> None:
    class Tied(toy.Toy):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.again = self.linear
            self.linear.bias.requires_grad_(False)

    module = Tied()
    assert set(saved_tensors(module)) == {"linear.weight", "head.weight", "head.bias"}
    loop = toy.loop()
    loop.module = loop.backend.prepare(module, loop.role, loop.config)
    Checkpoints(tmp_path, IDENTITY, keep=1).save(loop, best=False)
    found = Checkpoints(tmp_path, IDENTITY, keep=1).newest()
    assert found is not None
    other = Tied()
    with torch.no_grad():
        other.linear.weight.zero_()
    load_weights(other, found)
    assert torch.equal(other.again.weight, module.linear.weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "weights.safetensors").write_bytes(b"x" * 40), "weights.safetensors is torn"),
        (lambda f: os.truncate(f / "optimizer.safetensors", 30), "optimizer.safetensors is torn"),
        (lambda f: (f / "state.json").unlink(), "state.json is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda f: os.truncate(f / "manifest.json", 50), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    ],
)
def test_a_torn_checkpoint_is_skipped_with_a_warning(
    toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, message: str
) -> None:
    loop, checkpoints = saving_loop(toy, tmp_path, checkpoint_every=5)
    loop.run(toy.steps(0, 10))
    damage(tmp_path / "step-00000010")
    with caplog.at_level(logging.WARNING, logger="loom3d"):
        found = checkpoints.newest()
    assert found is not None
    assert found.step == 5
    assert message in caplog.text


def test_one_flipped_byte_is_noticed(toy: Any, tmp_path: Path) -> None:
    loop, checkpoints = saving_loop(toy, tmp_path, steps=5)
    loop.run(toy.steps(0, 5))
    path = tmp_path / "step-00000005" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoints.newest() is None


def test_another_run_is_refused_and_the_difference_named(toy: Any, tmp_path: Path) -> None:
    loop, _ = saving_loop(toy, tmp_path, steps=1)
    loop.run(toy.steps(0, 1))
    other = Identity(settings={**IDENTITY.settings, "trainer.lr": 0.1, "seed": 3}, plan=IDENTITY.plan)
    with pytest.raises(ResumeError) as failure:
        Checkpoints(tmp_path, other, keep=1).newest()
    for part in ("trainer.lr: 0.05 then, 0.1 now", "seed: None then, 3 now", "trainer.resume=never"):
        assert part in str(failure.value)
    with pytest.raises(ResumeError, match="quarantine"):
        Checkpoints(tmp_path, Identity(settings=IDENTITY.settings, plan="q"), keep=1).newest()


def test_a_setting_that_is_new_counts_as_its_default(toy: Any, tmp_path: Path) -> None:
    """An upgrade that brings settings must not strand the runs that are under way."""
    loop, _ = saving_loop(toy, tmp_path, steps=1)
    loop.run(toy.steps(0, 1))

    def newest(now: str) -> int:
        settings = {**IDENTITY.settings, "recipe.form": now}
        found = Checkpoints(
            tmp_path, Identity(settings=settings, plan=IDENTITY.plan, defaults={"recipe.form": "plain"}), keep=1
        ).newest()
        assert found is not None
        return found.step

    assert newest("plain") == 1
    with pytest.raises(ResumeError, match=r"recipe\.form: 'plain' then, 'other' now"):
        newest("other")


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "missing", IDENTITY, keep=1)
    assert checkpoints.newest() is None
    assert checkpoints.best() is None


def test_averaged_weights_can_be_loaded_and_a_misfit_is_listed(toy: Any, tmp_path: Path) -> None:
    loop, checkpoints = saving_loop(toy, tmp_path, steps=3)
    loop.run(toy.steps(0, 3))
    found = checkpoints.newest()
    assert found is not None
    module = toy.Toy()
    load_weights(module, found, averaged=True)
    assert all(torch.equal(module.state_dict()[k], v) for k, v in loop.average.weights.items())
    with pytest.raises(ResumeError, match=r"missing \['extra"):
        load_weights(torch.nn.ModuleDict({"extra": torch.nn.Linear(1, 1)}), found)


def test_nothing_is_pickled(toy: Any, tmp_path: Path) -> None:
    loop, _ = saving_loop(toy, tmp_path, steps=1)
    loop.run(toy.steps(0, 1))
    names = sorted(path.name for path in (tmp_path / "step-00000001").iterdir())
    assert names == [
        "ema.safetensors", "manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors",
    ]  # fmt: skip
    json.loads((tmp_path / "step-00000001" / "state.json").read_text())
