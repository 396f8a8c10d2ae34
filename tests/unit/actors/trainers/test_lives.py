"""Groups that end and start again, as plain functions: no Ray."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.trainers import refusal
from actors.trainers.lives import Outcomes, live, root_cause, together
from actors.trainers.roles import RoleResult
from models.errors import WeightsError
from services.errors import CacheError, PeerLostError, ServiceError
from services.runtime import supervise

DONE = RoleResult(steps=6, skipped=0, samples=48, resumed_from=0, best_step=None, validation={})


def ended(*errors: tuple[str, Exception | None]) -> Outcomes:
    def run(error: Exception | None) -> RoleResult:
        if error is not None:
            raise error
        return DONE

    return {role: supervise.attempt(role, functools.partial(run, error)) for role, error in errors}


def lives(*each: Outcomes) -> Callable[[int], Outcomes]:
    return lambda number: each[number]


def test_who_lost_a_peer_is_not_to_blame() -> None:
    lost, own = PeerLostError("rank 0 of llm waits"), ServiceError("it was killed")
    assert root_cause({"llm": lost, "diffusion": own}) == ("diffusion", own)
    assert root_cause({"llm": lost}) == ("llm", lost)


def test_all_start_again_until_it_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = ended(("llm", PeerLostError("gone")), ("diffusion", ServiceError("worker 0 died\ntraceback")))
    second = ended(("llm", None), ("diffusion", None))
    with caplog.at_level(logging.WARNING, "loom3d"):
        assert live(lives(first, second), tmp_path, first="llm", restarts=3) == DONE
    (said,) = [record.getMessage() for record in caplog.records if record.name == "loom3d"]
    assert said == (
        "role diffusion failed (worker 0 died); all roles start again from their last joint step (restart 1 of 3)"
    )


def test_the_last_error_is_raised_when_no_restart_is_left(tmp_path: Path) -> None:
    every = [ended(("llm", PeerLostError("gone")), ("diffusion", ServiceError(f"died {n}"))) for n in range(3)]
    with pytest.raises(ServiceError, match="died 2"):
        live(lives(*every), tmp_path, first="llm", restarts=2)


@pytest.mark.parametrize("noted", [False, True])
def test_an_error_of_the_users_making_is_not_tried_again(tmp_path: Path, noted: bool) -> None:
    error = WeightsError("encoder/model.safetensors lacks proj.weight")
    if noted:  # the worker wrote it down, and the driver has only heard of the other role
        refusal.note(tmp_path, error)
        life = ended(("llm", PeerLostError("rank 0 of diffusion failed")))
    else:
        life = ended(("llm", PeerLostError("rank 0 of diffusion failed")), ("diffusion", error))
    with pytest.raises(WeightsError, match=r"lacks proj\.weight"):
        live(lives(life), tmp_path, first="llm", restarts=3)


def test_an_error_that_comes_back_unchanged_is_tried_twice_unless_more_was_saved(tmp_path: Path) -> None:
    def life(number: int) -> Outcomes:
        numbers.append(number)
        if number == 1:
            (tmp_path / "checkpoints" / "llm" / "step-00000004").mkdir(parents=True)
        return ended(("llm", CacheError("the copies of the data differ")))

    numbers: list[int] = []
    with pytest.raises(CacheError, match="copies"):
        live(life, tmp_path, first="llm", restarts=9)
    assert numbers == [0, 1, 2], "the second came after a checkpoint, the third did not"


def test_the_others_end_at_the_first_failure(tmp_path: Path) -> None:
    told = threading.Event()

    def fails() -> RoleResult:
        raise ServiceError("mine")

    def waits() -> RoleResult:
        assert told.wait(20)
        raise PeerLostError("superseded")

    outcomes = together({"llm": waits, "diffusion": fails}, end=told.set, folder=tmp_path, patience_s=20)
    assert list(outcomes) == ["diffusion", "llm"]
    assert [type(o.failure.error) for o in outcomes.values() if o.failure] == [ServiceError, PeerLostError]


def test_one_that_does_not_end_is_left_alone(tmp_path: Path) -> None:
    release = threading.Event()

    def fails() -> RoleResult:
        raise ServiceError("mine")

    def hangs() -> RoleResult:
        release.wait(20)
        return DONE

    outcomes = together({"llm": hangs, "diffusion": fails}, end=lambda: None, folder=tmp_path, patience_s=0.05)
    release.set()
    assert list(outcomes) == ["diffusion"]


def test_an_interrupt_ends_all_groups(tmp_path: Path) -> None:
    told, returned = threading.Event(), []

    def group(role: str) -> RoleResult:
        told.wait(20)
        returned.append(role)
        raise PeerLostError("superseded")

    def interrupt() -> None:
        import os
        import signal

        time.sleep(0.2)
        # To the process, as a terminal sends it: a signal to this thread alone would not wake the waiting one.
        os.kill(os.getpid(), signal.SIGINT)

    groups = {role: (lambda role=role: group(role)) for role in ("llm", "diffusion")}
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        together(groups, end=told.set, folder=tmp_path, patience_s=20)
    assert sorted(returned) == ["diffusion", "llm"]
