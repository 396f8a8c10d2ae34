"""Heartbeats on a board in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from actors.bridge.liveness import Liveness
from services.errors import PeerLostError

NAMES = ["rank 0 of llm", "rank 0 of diffusion", "rank 1 of diffusion"]


class Board:
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.gone = False

    def write(self, name: str, text: str) -> None:
        if self.gone:
            raise RuntimeError("no store")
        self.texts[name] = text

    def read(self, names: Sequence[str]) -> list[str]:
        if self.gone:
            raise RuntimeError("no store")
        return [self.texts.get(name, "") for name in names]


@pytest.fixture
def board() -> Board:
    return Board()


def member(board: Board, place: int, **changes: Any) -> Liveness:
    settings = {"heartbeat_s": 0.02, "silence_s": 30.0, "phase_s": {"load": 0.2, "other": 30.0}}
    return Liveness(board, place, NAMES, **{**settings, **changes})


def settle() -> None:
    time.sleep(0.15)


def test_peers_that_beat_are_alive_and_described(board: Board) -> None:
    members = [member(board, place) for place in range(3)]
    for each in members:
        each.start()
    members[1].phase("forward", 3, 1)
    members[1].waiting(2)
    settle()
    members[0].check(1)
    members[0].check(2)
    assert "in phase forward of step 3, micro-batch 1" in members[0].describe(1)
    assert "waiting for rank 1 of diffusion" in members[0].describe(1)
    for each in members:
        each.close()


def test_who_waits_is_not_blamed_for_the_phase(board: Board) -> None:
    one, other = member(board, 0), member(board, 1)
    one.start()
    other.start()
    other.phase("load", 2)
    other.waiting(2)
    time.sleep(0.5)
    one.check(1)
    other.waiting(None)
    time.sleep(0.5)
    with pytest.raises(PeerLostError, match=r"in phase load for .*bridge\.phase_s\.load=0\.2"):
        one.check(1)
    one.close()
    other.close()


def test_a_peer_that_never_began_is_silent(board: Board) -> None:
    one = member(board, 0, silence_s=0.2)
    one.start()
    one.phase("forward", 1)
    one.waiting(2)
    time.sleep(0.4)
    with pytest.raises(PeerLostError) as lost:
        one.check(2)
    assert "rank 0 of llm (in phase forward of step 1) waits for rank 1 of diffusion since" in str(lost.value)
    assert "no sign of life" in str(lost.value)
    one.close()


def test_a_board_that_is_gone_is_named_and_not_the_peer(board: Board) -> None:
    one, other = member(board, 0, silence_s=0.3), member(board, 1)
    one.start()
    other.start()
    settle()
    board.gone = True
    time.sleep(0.5)
    with pytest.raises(PeerLostError, match="the rendezvous store does not answer"):
        one.check(1)
    one.close()
    other.close()


def test_a_failure_is_told_once_and_a_broken_connection_explained(board: Board) -> None:
    one, other = member(board, 0), member(board, 1)
    one.start()
    other.start()
    other.fail("ValueError: no paint")
    other.fail("PeerLostError: a consequence")
    assert "it failed: ValueError: no paint" in str(one.lost(1, "Connection closed"))
    assert "its connection broke (reset)" in str(one.lost(2, "reset"))
    one.close()
    other.close()


def test_ranks_end_together(board: Board) -> None:
    from concurrent.futures import ThreadPoolExecutor

    members = [member(board, place) for place in range(3)]
    for each in members:
        each.start()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(members[0].end)
        settle()
        assert not first.done()
        second = pool.submit(members[1].end)
        members[2].fail("lost")
        first.result(timeout=5)
        second.result(timeout=5)
    for each in members:
        each.close()
    with pytest.raises(PeerLostError, match="it has ended"):
        members[0].check(1)
