"""A peer that stops, dies, fails, hangs, or belongs to another life of the run: both sides end with a clear error."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.bridge.link import Link
from actors.bridge.local import run_roles
from actors.bridge.rendezvous import Rendezvous, StoreBoard
from services.errors import BridgeError, PeerLostError, ServiceError
from tests.support.joint_toy import (
    PAINTER,
    WRITER,
    Case,
    Pair,
    edge,
    joint_step,
    link_of,
    make_loop,
    start_pair,
    steps_for_ever,
)

QUICK = {"heartbeat_s": 0.1, "silence_s": 2.0}
LIMIT_S = 20.0
"""Far beyond every limit of these tests, far below the transport's own time-out."""


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    with Rendezvous() as opened:
        yield opened


def for_ever(case: Case, role: str, link: Link, backend: Any) -> None:
    for _ in steps_for_ever(case, role, link, backend):
        pass


def hang_at_three(case: Case, role: str, link: Link, backend: Any) -> None:
    for step in steps_for_ever(case, role, link, backend):
        if role == PAINTER and step == 3:
            link.phase("validate", step)
            time.sleep(60)


def fail_at_three(case: Case, role: str, link: Link, backend: Any) -> None:
    for step in steps_for_ever(case, role, link, backend):
        if role == PAINTER and step == 3:
            raise ValueError("the painter's brush broke")


def end_at_three(case: Case, role: str, link: Link, backend: Any) -> None:
    for step in steps_for_ever(case, role, link, backend):
        if role == PAINTER and step == 3:
            return


def other_step(case: Case, role: str, link: Link, backend: Any) -> None:
    loop = make_loop(case, role, link, backend)
    loop.train_step(joint_step(0 if role == PAINTER else 1, case.kinds))


def other_plan(case: Case, role: str, link: Link, backend: Any) -> None:
    loop = make_loop(case, role, link, backend)
    loaded = joint_step(0, case.kinds)
    if role == PAINTER:
        micro = loaded.micro_batches[0]
        micro.samples = micro.samples[::-1]
    loop.train_step(loaded)


def end(pair: Pair) -> None:
    for child in pair.children.values():
        child.kill()
        child.join()


def under_way(pair: Pair, rendezvous: Rendezvous) -> None:
    """Both have trained a few steps, as their heartbeats say."""
    board = StoreBoard(dist.PrefixStore("generation-1/beat", rendezvous._store))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        beats = [json.loads(text) for text in board.read(["0", "1"]) if text]
        if len(beats) == 2 and all(beat["step"] >= 2 for beat in beats):
            return
        assert all(child.is_alive() for child in pair.children.values()), pair.answers.get(timeout=1)
        time.sleep(0.05)
    raise AssertionError("the pair never began to train")


@pytest.mark.parametrize(("stopped", "waits"), [(WRITER, PAINTER), (PAINTER, WRITER)])
def test_a_peer_that_is_stopped_is_given_up_and_leaves_when_it_wakes(
    stopped: str, waits: str, rendezvous: Rendezvous
) -> None:
    pair = start_pair(Case(bridge=QUICK), rendezvous, for_ever)
    try:
        under_way(pair, rendezvous)
        os.kill(pair.children[stopped].pid, signal.SIGSTOP)
        kind, text = pair.outcome(waits, LIMIT_S)
        assert kind == "PeerLostError"
        assert f"rank 0 of {waits} (in phase" in text
        assert f"waits for rank 0 of {stopped} since" in text
        assert "no heartbeat for" in text
        assert "bridge.silence_s=2" in text
        assert "last seen" in text
        os.kill(pair.children[stopped].pid, signal.SIGCONT)
        kind, text = pair.outcome(stopped, LIMIT_S)
        assert kind == "PeerLostError"
        assert f"it failed: PeerLostError: rank 0 of {waits}" in text, "it is told why the other left"
    finally:
        end(pair)


@pytest.mark.parametrize(("killed", "waits"), [(WRITER, PAINTER), (PAINTER, WRITER)])
def test_a_peer_that_is_killed_is_noticed(killed: str, waits: str, rendezvous: Rendezvous) -> None:
    pair = start_pair(Case(bridge={"heartbeat_s": 0.1}), rendezvous, for_ever)
    try:
        under_way(pair, rendezvous)
        began = time.monotonic()
        os.kill(pair.children[killed].pid, signal.SIGKILL)
        kind, text = pair.outcome(waits, LIMIT_S)
        assert kind == "PeerLostError"
        assert f"rank 0 of {waits} (in phase" in text
        assert f"rank 0 of {killed} since" in text
        assert "its connection broke" in text
        assert time.monotonic() - began < LIMIT_S
    finally:
        end(pair)


def test_a_phase_that_lasts_too_long_is_given_up(rendezvous: Rendezvous) -> None:
    limits = {**QUICK, "phase_s": {"start": 30.0, "validate": 1.0, "other": 30.0}}
    pair = start_pair(Case(bridge=limits), rendezvous, hang_at_three)
    try:
        kind, text = pair.outcome(WRITER, LIMIT_S)
        assert kind == "PeerLostError"
        assert "rank 0 of painter since" in text
        assert "it is in phase validate for" in text
        assert "bridge.phase_s.validate=1" in text
    finally:
        end(pair)


def test_the_reason_of_a_peer_that_fails_is_told(rendezvous: Rendezvous) -> None:
    pair = start_pair(Case(bridge=QUICK), rendezvous, fail_at_three)
    try:
        assert pair.outcome(PAINTER, LIMIT_S)[0] == "ValueError"
        kind, text = pair.outcome(WRITER, LIMIT_S)
        assert kind == "PeerLostError"
        assert "it failed: ValueError: the painter's brush broke" in text
    finally:
        end(pair)


def test_a_peer_that_ends_early_is_noticed(rendezvous: Rendezvous) -> None:
    pair = start_pair(Case(bridge=QUICK), rendezvous, end_at_three)
    try:
        assert pair.outcome(PAINTER, LIMIT_S)[0] == "returned"
        kind, text = pair.outcome(WRITER, LIMIT_S)
        assert kind == "PeerLostError"
        assert "rank 0 of painter" in text
        assert "it has ended" in text
    finally:
        end(pair)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (other_step, "'agree' of step"),
        (other_plan, "digest: rank 0 of writer sent"),
    ],
)
def test_roles_that_disagree_end_on_both_sides(work: Any, said: str, rendezvous: Rendezvous) -> None:
    pair = start_pair(Case(bridge=QUICK), rendezvous, work)
    try:
        kind, text = pair.outcome(PAINTER, LIMIT_S)
        assert kind == "BridgeError"
        assert said in text
        assert "rank 0 of writer" in text
        assert "rank 0 of painter" in text
        kind, text = pair.outcome(WRITER, LIMIT_S)
        assert kind in ("BridgeError", "PeerLostError")
        assert "BridgeError" in text
    finally:
        end(pair)


def test_a_peer_of_another_generation_never_pairs(rendezvous: Rendezvous) -> None:
    case = Case(bridge={**QUICK, "phase_s": {"start": 2.0, "other": 30.0}})
    pair = start_pair(case, rendezvous, for_ever, generation=4, generations={WRITER: 3})
    try:
        kind, text = pair.outcome(WRITER, LIMIT_S)
        assert kind == "PeerLostError"
        assert "rank 0 of writer is of generation 3" in text
        assert "generation 4 is the one that is open" in text
        kind, text = pair.outcome(PAINTER, LIMIT_S)
        assert kind == "PeerLostError"
        assert "rank 0 of writer to start" in text
        assert "bridge.phase_s.start=2" in text
    finally:
        end(pair)


def test_a_new_generation_ends_the_old_one(rendezvous: Rendezvous) -> None:
    """The driver restarts all roles; a painter that was stopped meanwhile does not meet the new writer."""
    pair = start_pair(Case(bridge={"heartbeat_s": 0.1, "silence_s": 30.0}), rendezvous, for_ever)
    try:
        under_way(pair, rendezvous)
        os.kill(pair.children[PAINTER].pid, signal.SIGSTOP)
        rendezvous.open(2)
        kind, text = pair.outcome(WRITER, LIMIT_S)
        assert kind == "PeerLostError"
        assert "generation 2 of this run has begun; this rank is of generation 1" in text
    finally:
        end(pair)


def test_a_place_is_taken_once_in_a_generation(rendezvous: Rendezvous) -> None:
    pair = start_pair(Case(bridge=QUICK), rendezvous, for_ever)
    try:
        under_way(pair, rendezvous)
        with pytest.raises(PeerLostError, match="rank 0 of writer of generation 1 is there already"):
            link_of(Case(bridge=QUICK), WRITER, 0, rendezvous.address, 1, _Cpu())
    finally:
        end(pair)


class _Cpu:
    """What connect asks of a backend."""

    device = torch.device("cpu")


def test_a_store_that_is_not_there_is_said_so() -> None:
    with Rendezvous() as gone:
        address = gone.address
    with pytest.raises(ServiceError, match=f"rendezvous store at {address} does not answer"):
        link_of(Case(), WRITER, 0, address, 1, _Cpu())


# -- in one process ------------------------------------------------------------------------------------------


def local_link(role: str, transport: Any) -> Link:
    return Link(transport, role=role, rank=0, roles={WRITER: 1, PAINTER: 1}, edges=[edge()], window=1)


def test_inline_roles_end_with_the_first_error() -> None:
    def writes(transport: Any) -> None:
        local_link(WRITER, transport).exchange("agree", 0, None)

    def fails(transport: Any) -> None:
        raise ValueError("no paint")

    with pytest.raises(ValueError, match="no paint"):
        run_roles({WRITER: writes, PAINTER: fails})


def test_an_inline_role_that_ended_is_not_waited_for() -> None:
    with pytest.raises(PeerLostError, match="role writer waits for role painter: it has ended"):
        run_roles(
            {WRITER: lambda transport: local_link(WRITER, transport).exchange("agree", 0, None), PAINTER: lambda _: 7}
        )


def test_a_message_of_another_generation_is_refused() -> None:
    """Should one get through in spite of everything."""

    def task(role: str, generation: int, transport: Any) -> None:
        link = local_link(role, transport)
        link.generation = generation
        link.exchange("agree", 5, None)

    with pytest.raises(
        BridgeError, match=r"step 5, generation \d; rank 0 of \w+ sent 'agree' of step 5, generation \d"
    ):
        run_roles({WRITER: lambda t: task(WRITER, 1, t), PAINTER: lambda t: task(PAINTER, 2, t)})
