"""The order of a step's passes: properties over every order of kinds and every window."""

from __future__ import annotations

import itertools
from collections import deque

import pytest

from actors.bridge.schedule import Op, source_schedule, target_schedule
from configs import ConfigError

ORDERS = ["".join(kinds) for length in range(7) for kinds in itertools.product("gqt", repeat=length)]
"""g crosses, q is the source's alone, t the target's alone."""


def of_source(order: str, window: int) -> tuple[Op, ...]:
    return source_schedule(["" if kind == "t" else kind for kind in order], {"g"}, window)


def of_target(order: str) -> tuple[Op, ...]:
    return target_schedule(["" if kind == "q" else kind for kind in order], {"g"})


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_every_micro_batch_goes_forward_then_backward_once(window: int) -> None:
    for order in ORDERS:
        for ops, mine in ((of_source(order, window), "gq"), (of_target(order), "gt")):
            expected = [i for i, kind in enumerate(order) if kind in mine]
            forward = [op.micro for op in ops if op.action == "forward"]
            backward = [op.micro for op in ops if op.action == "backward"]
            assert sorted(forward) == sorted(backward) == expected, order
            assert all(ops.index(Op("forward", m)) < ops.index(Op("backward", m)) for m in expected), order
            crossing = [m for m in forward if order[m] == "g"]
            assert crossing == sorted(crossing), f"{order}: both sides take what crosses in the order of the plan"


@pytest.mark.parametrize("window", [1, 2, 3])
def test_no_more_than_the_window_is_outstanding(window: int) -> None:
    for order in ORDERS:
        ahead, most = 0, 0
        for op in of_source(order, window):
            if order[op.micro] == "g":
                ahead += 1 if op.action == "forward" else -1
                most = max(most, ahead)
        assert most == min(window, order.count("g")), order


def timeline(order: str, window: int, cost: float = 1.0) -> tuple[float, float, float]:
    """Run both sides against each other: (end, busy time of the source, of the target); every pass costs the same.

    AssertionError when neither can go on.
    """
    sides = {"source": deque(of_source(order, window)), "target": deque(of_target(order))}
    clock = {"source": 0.0, "target": 0.0}
    busy = {"source": 0.0, "target": 0.0}
    done: dict[tuple[str, Op], float] = {}
    while any(sides.values()):
        moved = False
        for side, ops in sides.items():
            while ops:
                op = ops[0]
                needed = None
                if order[op.micro] == "g" and side == "target" and op.action == "forward":
                    needed = ("source", op)
                elif order[op.micro] == "g" and side == "source" and op.action == "backward":
                    needed = ("target", op)
                if needed is not None and needed not in done:
                    break
                clock[side] = max(clock[side], done[needed] if needed else 0.0) + cost
                busy[side] += cost
                done[side, ops.popleft()] = clock[side]
                moved = True
        assert moved, f"{order}: both wait for each other"
    return max(clock.values()), busy["source"], busy["target"]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_two_sides_never_wait_for_each_other_for_ever(window: int) -> None:
    for order in ORDERS:
        end, source, target = timeline(order, window)
        assert max(source, target) <= end <= source + target


def test_work_of_one_role_fills_the_time_of_waiting() -> None:
    """Serial would be the sum of both; with questions between, or a window, both groups work at once."""
    for order in ("gqgqgqgq", "qqqqgggg", "ggggqqqq"):
        end, source, target = timeline(order, 2)
        assert end <= max(source, target) + 2, "only the first forward and the last backward have nothing beside them"
    alone, source, target = timeline("gggggggg", 1)
    assert alone == source + target, "nothing overlaps with a window of 1 and nothing to fill it"
    assert timeline("gggggggg", 2)[0] < 0.7 * alone


def test_the_order_by_hand() -> None:
    ops = [f"{'F' if op.action == 'forward' else 'B'}{op.micro}" for op in of_source("qqgg", 2)]
    assert ops == ["F2", "F3", "F0", "B0", "B2", "F1", "B1", "B3"]
    ops = [f"{'F' if op.action == 'forward' else 'B'}{op.micro}" for op in of_source("ggg", 1)]
    assert ops == ["F0", "B0", "F1", "B1", "F2", "B2"]


def test_a_window_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bridge\.window=0"):
        source_schedule(["g"], {"g"}, 0)
