"""Every backend against plain autograd in one process: norms, weights and moments over four steps.

For every order of two kinds of micro-batch and every window, since this is where distributed backends go wrong in
silence. The ranks are plain processes; one set of them runs all cases of a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.trainers.backends import make_backend
from configs import ConfigError
from configs.schema import BackendConfig
from models.spec import RoleSpec
from tests.support.backend_ranks import (
    CONFIG,
    FREE_ROLE,
    ROLE,
    STEPS,
    WIDTH,
    in_ranks,
    oracle,
    run_case,
)

ORDERS = ("gq", "qg", "gqgq", "qqgg")
WINDOWS = (1, 2, 3)
MATRIX = [(kinds, window) for kinds in ORDERS for window in WINDOWS]
#: Two backwards without a forward between them, and parameters that take no part at all in a step's first micro-batch.
HARD = [("gg", 2), ("nqg", 2), ("nn", 1)]
FEW = [("gq", 1), ("qg", 2), ("gqgq", 3), ("qqgg", 2), *HARD]
BACKENDS = {
    **{name: BackendConfig(name=name) for name in ("single", "ddp", "fsdp2", "zero2")},
    "fsdp2 kept": BackendConfig(name="fsdp2", reshard_after_forward=False),
    "zero3": BackendConfig(name="zero3", persistence_threshold=0),  # else such small parameters are not partitioned
    "zero3 persistent": BackendConfig(name="zero3", persistence_threshold=20),
    "zero2 offload": BackendConfig(name="zero2", offload="optimizer"),
    "zero3 offload": BackendConfig(name="zero3", offload="optimizer", persistence_threshold=0),
    "zero3 parameters": BackendConfig(name="zero3", offload="parameters", persistence_threshold=0),
}
RECOMPUTED = " recomputed"
"""End of the name of a backend whose blocks keep their inputs only."""


def run_cases(names: Sequence[str], cases: Sequence[tuple[str, int]], role: RoleSpec = ROLE) -> dict[str, Any]:
    """All cases of all backends on this rank."""
    return {
        f"{name}/{kinds}/{window}": run_case(
            BACKENDS[name.removesuffix(RECOMPUTED)], kinds, window, role, recompute=name.endswith(RECOMPUTED)
        )
        for name in names
        for kinds, window in cases
    }


def check(
    ranks: list[dict[str, Any]],
    names: Sequence[str],
    cases: Sequence[tuple[str, int]],
    unclipped: str = "nothing",
) -> None:
    """Rank 0 has the oracle's numbers, every rank the same norms."""
    for kinds, window in cases:
        expected = oracle(kinds, unclipped=unclipped)
        assert min(expected["norms"]) > (1 if unclipped != "nothing" else 2)  # so the limit of 0.3 matters
        for name in names:
            first = ranks[0][f"{name}/{kinds}/{window}"]
            assert first["norms"] == pytest.approx(expected["norms"], rel=1e-5), (name, kinds, window)
            for what in ("weights", "moments"):
                for step in range(STEPS):
                    assert first[what][step].keys() == expected[what][step].keys()
                    for parameter, value in expected[what][step].items():
                        torch.testing.assert_close(
                            first[what][step][parameter],
                            value,
                            rtol=1e-5,
                            atol=1e-6,
                            msg=lambda text, at=(name, kinds, window, what, step, parameter): f"{at}: {text}",
                        )
            for rank in ranks:
                same = rank[f"{name}/{kinds}/{window}"]
                assert same["norms"] == first["norms"]
                world = len(ranks)
                assert all(extra.tolist() == [world, world * (world - 1) / 2 + 0.25 * world] for extra in same["sums"])


def test_single_and_groups_of_one_equal_autograd(tmp_path: Path) -> None:
    names = ("single", "ddp", "fsdp2")
    cases = MATRIX + HARD
    check(in_ranks(run_cases, tmp_path, 1, names, cases), names, cases)


@pytest.mark.parametrize("names", [("ddp", "fsdp2"), ("zero2", "zero3")], ids="+".join)
def test_two_ranks_equal_autograd(tmp_path: Path, names: tuple[str, ...]) -> None:
    check(in_ranks(run_cases, tmp_path, 2, names, FEW), names, FEW)


@pytest.mark.parametrize(
    ("names", "world"), [(("single", "fsdp2", "zero2", "zero3"), 1), (("ddp", "fsdp2", "zero2", "zero3"), 2)]
)
def test_what_a_role_leaves_unclipped_is_in_no_norm(tmp_path: Path, names: tuple[str, ...], world: int) -> None:
    cases = [("gq", 1), ("qqgg", 2)]
    check(in_ranks(_run_free, tmp_path, world, names, cases), names, cases, unclipped="condition")
    for kinds, _ in cases:  # the test would not see a difference that is not there
        assert oracle(kinds)["norms"] != pytest.approx(oracle(kinds, unclipped="condition")["norms"], rel=0.05)


def _run_free(names: Sequence[str], cases: Sequence[tuple[str, int]]) -> dict[str, Any]:
    return run_cases(names, cases, FREE_ROLE)


class Apart(torch.nn.Module):
    """Two layers that share nothing, so that a NaN in one leaves the other's gradient alone."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = torch.nn.Linear(WIDTH, 3)
        self.condition = torch.nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.answer(x), self.condition(x)


def _norm_beside_a_nan(names: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        for factor in (1.0, float("nan")):
            backend = make_backend(BACKENDS[name], "cpu")
            module = backend.prepare(Apart(), FREE_ROLE, CONFIG)
            backend.zero_grad()
            answer, condition = module(torch.ones(2, WIDTH))
            share = factor if backend.rank == backend.world_size - 1 else 1.0
            backend.backward(answer.sum() + share * condition.sum())
            found[f"{name}/{factor}"] = backend.reduce(torch.zeros(1, dtype=torch.float64))[1]
    return found


@pytest.mark.parametrize("names", [("ddp", "fsdp2"), ("zero2", "zero3")], ids="+".join)
def test_the_norm_tells_of_a_nan_in_what_is_unclipped(tmp_path: Path, names: tuple[str, ...]) -> None:
    for rank in in_ranks(_norm_beside_a_nan, tmp_path, 2, names):
        for name in names:
            # Of the answer alone: 3 rows of 6 weights and 3 biases, each 2 samples on 2 ranks.
            assert float(rank[f"{name}/1.0"]) == pytest.approx(4 * (3 * (WIDTH + 1)) ** 0.5, rel=1e-6)
            assert not torch.isfinite(rank[f"{name}/nan"])


def test_two_ranks_with_moments_on_the_host_and_recomputed_blocks_equal_autograd(tmp_path: Path) -> None:
    names, cases = ("zero2 offload", "zero3 parameters", "zero3 offload recomputed"), [("gqgq", 3), ("nqg", 2)]
    ranks = in_ranks(run_cases, tmp_path, 2, names, cases)
    check(ranks, names, cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*(name for name in BACKENDS if name != "single"), *(name + RECOMPUTED for name in ("fsdp2", "zero2", "zero3"))],
)
@pytest.mark.parametrize("world", [1, 2])
def test_every_order_and_window_equals_autograd(tmp_path: Path, name: str, world: int) -> None:
    cases = MATRIX + HARD
    check(in_ranks(run_cases, tmp_path, world, [name], cases), [name], cases)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backend.name='fsdp' is unknown; choose one of single, ddp, fsdp2"):
        make_backend(BackendConfig(name="fsdp"), "cpu")
