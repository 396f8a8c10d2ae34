"""Joint checkpoints: what counts as saved, what is kept, what is resumed, and a run that is killed in between."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.bridge.rendezvous import Rendezvous
from actors.trainers.checkpoint import Checkpoints, Identity
from actors.trainers.joint import JointCheckpoints, joint_best, next_generation, read_joint
from actors.trainers.loop import Hooks
from services.errors import ResumeError
from tests.support.joint_toy import (
    PAINTER,
    WRITER,
    Case,
    Outcome,
    inline,
    joint_step,
    make_loop,
    start_pair,
    train_saving,
)

CASE = Case(kinds="gq", steps=7, dropout=0.2, settings={"checkpoint_every": 2, "log_every": 1})


def saved(folder: Path, case: Case = CASE) -> dict[str, Outcome]:
    return inline(case, functools.partial(train_saving, folder=folder))


def test_roles_are_saved_together_and_resume_to_the_bit(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole")
    saved(tmp_path / "cut", Case(**{**vars(CASE), "steps": 4, "settings": {**CASE.settings, "steps": 7}}))
    steps = read_joint(tmp_path / "whole")
    assert [entry.step for entry in steps] == [6, 7]
    assert all(set(entry.roles) == {WRITER, PAINTER} for entry in steps)
    for role in (WRITER, PAINTER):
        kept = sorted(path.name for path in (tmp_path / "whole" / role).iterdir())
        assert kept == ["step-00000006", "step-00000007"]
    resumed = saved(tmp_path / "cut")
    for role in (WRITER, PAINTER):
        assert resumed[role].log == ["4"]
        assert resumed[role].terms == whole[role].terms[4:]
        for name, value in whole[role].weights.items():
            assert torch.equal(value, resumed[role].weights[name])


def test_a_step_that_one_role_did_not_save_does_not_count(tmp_path: Path) -> None:
    """The painter died while it saved step 7: its folder is there, the joint manifest does not name it."""
    whole = saved(tmp_path)
    manifest = json.loads((tmp_path / "joint.json").read_text())
    manifest["steps"].pop()
    (tmp_path / "joint.json").write_text(json.dumps(manifest))
    again = saved(tmp_path)
    for role in (WRITER, PAINTER):
        assert again[role].log == ["6"]
        assert again[role].terms == whole[role].terms[6:]


def damage(folder: Path, how: str) -> None:
    if how == "missing":
        shutil.rmtree(folder)
    elif how == "torn":
        path = folder / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
    else:  # another life wrote this step once more, and differently
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "best": True}))


@pytest.mark.parametrize("how", ["missing", "torn", "other"])
def test_all_roles_fall_back_when_one_cannot_read_its_part(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path)
    damage(tmp_path / PAINTER / "step-00000007", how)
    with caplog.at_level(logging.WARNING, logger="loom3d"):
        again = saved(tmp_path)
    assert {role: outcome.log for role, outcome in again.items()} == {WRITER: ["6"], PAINTER: ["6"]}
    assert "step 7 of role painter is skipped" in caplog.text


def test_without_a_common_step_all_start_anew(tmp_path: Path) -> None:
    saved(tmp_path)
    damage(tmp_path / PAINTER / "step-00000007", "torn")
    damage(tmp_path / WRITER / "step-00000006", "torn")
    assert {outcome.log[0] for outcome in saved(tmp_path).values()} == {"0"}


def test_an_unreadable_manifest_is_not_taken_for_none(tmp_path: Path) -> None:
    assert read_joint(tmp_path) == []
    assert joint_best(tmp_path) is None
    for text in ("{", "{}", '{"format": 9, "steps": []}', '{"format": 1, "steps": [{"step": 1}]}'):
        (tmp_path / "joint.json").write_text(text)
        with pytest.raises(ResumeError, match=r"joint\.json"):
            read_joint(tmp_path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)

    def work(case: Case, role: str, link: Any, backend: Any) -> None:
        own = Checkpoints(tmp_path / role, Identity(settings={"lr": 0.5}, plan="toy"), keep=2)
        JointCheckpoints(tmp_path, own, link, keep=2).newest()

    with pytest.raises(ResumeError, match=r"lr: 0\.02 then, 0\.5 now"):
        inline(CASE, work)


def test_generations_count_up_and_last(tmp_path: Path) -> None:
    assert [next_generation(tmp_path / "checkpoints") for _ in range(3)] == [1, 2, 3]
    (tmp_path / "checkpoints" / "generation").write_text("x")
    with pytest.raises(ResumeError, match="holds 'x'"):
        next_generation(tmp_path / "checkpoints")


def test_the_best_step_is_kept_for_all_roles(tmp_path: Path) -> None:
    """The painter alone validates; what it finds decides for both."""
    values = iter([5.0, 1.0, 3.0, 4.0, 2.0])

    def work(case: Case, role: str, link: Any, backend: Any) -> Any:
        own = Checkpoints(tmp_path / role, Identity(settings={}, plan="toy"), keep=1)
        joint = JointCheckpoints(tmp_path, own, link, keep=1)
        hooks = Hooks(validate=(lambda _: {"paint": next(values)}) if role == PAINTER else None)
        loop = make_loop(case, role, link, backend, hooks)
        hooks.save = lambda _, best: joint.save(loop, best=best)
        return loop.run(joint_step(step, case.kinds) for step in range(case.steps))  # type: ignore[misc]

    settings = {"checkpoint_every": 1, "validate_every": 1, "best_metric": "paint"}
    states = inline(Case(kinds="gq", steps=5, settings=settings), work)
    assert {role: (state.best, state.best_step) for role, state in states.items()} == {
        WRITER: (1.0, 2),
        PAINTER: (1.0, 2),
    }
    assert [(entry.step, entry.best) for entry in read_joint(tmp_path)] == [(2, True), (5, False)]
    assert joint_best(tmp_path) == 2
    for role in (WRITER, PAINTER):
        assert sorted(path.name for path in (tmp_path / role).iterdir()) == ["step-00000002", "step-00000005"]


@pytest.mark.parametrize("said", ["stop", "resize", "checkpoint", "evaluate"])
def test_the_coordinating_rank_directs_all(said: str, tmp_path: Path) -> None:
    """The writer's word after its third step; the painter's own is not asked for."""
    seen: dict[str, list[str]] = {WRITER: [], PAINTER: []}

    def work(case: Case, role: str, link: Any, backend: Any) -> Any:
        loop = make_loop(case, role, link, backend)

        def direct() -> Any:
            assert role == WRITER
            return said if loop.state.step == 2 else "continue"

        def validate(_: Any) -> dict[str, float]:
            seen[role].append(f"validated {loop.state.step}")
            return {"loss": 1.0}

        def save(step: int, best: bool) -> None:
            seen[role].append(f"saved {step}{' best' if best else ''}")

        loop.hooks = Hooks(directive=direct, validate=validate, save=save)
        loop.run(joint_step(step, case.kinds) for step in range(case.steps))  # type: ignore[misc]
        return loop.state.step, loop.ended

    settings = {"checkpoint_every": 0, "validate_every": 0}
    ended = inline(Case(kinds="gq", steps=5, settings=settings), work)
    expected = {
        "stop": ((3, "stop"), ["saved 3"]),
        "resize": ((3, "resize"), ["saved 3"]),
        "checkpoint": ((5, "continue"), ["saved 3", "validated 5", "saved 5 best"]),
        "evaluate": ((5, "continue"), ["validated 3", "saved 3 best", "validated 5", "saved 5"]),
    }[said]
    for role in (WRITER, PAINTER):
        assert (ended[role], seen[role]) == expected


def test_validation_passes_through_the_edge_without_gradients() -> None:
    def work(case: Case, role: str, link: Any, backend: Any) -> Any:
        loop = make_loop(case, role, link, backend)
        seen: list[float] = []

        def compute(batch: Any, received: Any) -> Any:
            assert not torch.is_grad_enabled()
            assert not any(tensor.requires_grad for tensor in received.values())
            output = loop.role.step(loop.module, batch, received)
            seen.append(float(next(iter(output.sums.values()))))
            return output.outputs

        for step in range(3):
            loop.forward_only(joint_step(step, case.kinds), compute)  # type: ignore[arg-type]
        assert all(parameter.grad is None for parameter in loop.module.parameters())
        return seen

    found = inline(Case(kinds="gqg", three=True), work)
    assert {role: len(values) for role, values in found.items()} == {WRITER: 9, PAINTER: 6}
    first = inline(Case(kinds="gqg", three=True, steps=1, settings={"lr": 0.0}))
    assert sum(found[PAINTER][:2]) / 8 == pytest.approx(first[PAINTER].terms[0]["paint"])


def test_both_restart_after_a_kill_and_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """kill -9 of the painter in step 5: the last joint step is 4, and the next generation goes on from there."""
    work = functools.partial(train_saving, folder=tmp_path / "split", die_at=5)
    whole = saved(tmp_path / "whole")
    with Rendezvous() as rendezvous:
        first = start_pair(CASE, rendezvous, work, generation=next_generation(tmp_path / "split"))
        kind, text = first.outcome(WRITER)
        assert kind == "PeerLostError", text
        deadline = time.monotonic() + 30
        while any(child.is_alive() for child in first.children.values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert first.children[PAINTER].exitcode == -9
        assert [entry.step for entry in read_joint(tmp_path / "split")] == [2, 4]
        second = start_pair(CASE, rendezvous, work, generation=next_generation(tmp_path / "split"))
        for role in (WRITER, PAINTER):
            kind, outcome = second.outcome(role)
            assert kind == "returned", outcome
            assert outcome.log == ["4"]
            assert outcome.terms == whole[role].terms[4:]
            for name, value in whole[role].weights.items():
                assert torch.equal(value, outcome.weights[name])
    assert [(entry.step, entry.generation) for entry in read_joint(tmp_path / "split")] == [(6, 2), (7, 2)]
