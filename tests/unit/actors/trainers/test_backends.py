"""Gradients of the backends against a single process, and the one-scalar backward."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.trainers.backends.base import backward, flatten_gradients, scatter_gradients
from actors.trainers.backends.ddp import DdpBackend
from actors.trainers.backends.single import SingleBackend
from configs.schema import TrainerConfig
from tests.support.toy_role import ROLE


def test_backward_of_a_loss_and_of_edges_is_one_pass() -> None:
    x = torch.randn(3, requires_grad=True)
    h = x * 2
    grad = torch.tensor([1.0, -2.0, 3.0])
    backward((h * 5).sum(), [(h, grad)])
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * (5 + grad))
    y = torch.randn(3, requires_grad=True)
    backward(None, [(y * y, grad)])
    assert y.grad is not None
    torch.testing.assert_close(y.grad, 2 * y.detach() * grad)
    backward(torch.tensor(1.0))  # nothing to differentiate
    backward(None)


def test_flat_gradients_round_trip_and_fill_zeros() -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 3, 1))
    a.grad, c.grad = torch.tensor([1.0, 2.0]), torch.tensor([7.0])
    flat = flatten_gradients([a, b, c])
    assert flat.tolist() == [1, 2, 0, 0, 0, 7]
    scatter_gradients(flat, [a, b, c])
    assert b.grad is not None
    assert b.grad.tolist() == [0, 0, 0]
    assert c.grad.tolist() == [7]


def test_single_backend_gives_unused_parameters_a_zero_gradient() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    backend = SingleBackend()
    backend.prepare(torch.nn.ParameterDict({"used": used, "unused": unused}), ROLE, TrainerConfig())
    backend.backward((used * 3).sum())
    extra, norm = backend.reduce(torch.tensor([4.0]))
    assert extra.tolist() == [4.0]
    assert float(norm) == pytest.approx(18**0.5)
    assert used.grad is not None
    assert used.grad.tolist() == [3, 3]
    assert unused.grad is not None
    assert unused.grad.tolist() == [0, 0]
    assert backend.exchange("hello") == ["hello"]


def _rank(rank: int, world: int, store: str, out: str, nan_at: int) -> None:
    """One rank of a gloo group: four toy steps, and what it saw."""
    from tests.support.toy_role import toy_loop, toy_step_of

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    loop = toy_loop(backend=DdpBackend(), shift=rank)  # overwritten by rank 0's weights
    terms = []
    for step in range(4):
        loaded = toy_step_of(step, micro_batches=2, rank=rank, world=world)
        loaded.broken = {f"broken-{rank}": "why"} if step == 0 else {}
        if step == nan_at and rank == world - 1:
            loaded.micro_batches[0].batch["x"][0] = float("nan")
        terms.append(loop.train_step(loaded))
    torch.save({"weights": loop.module.state_dict(), "terms": terms, "skipped": loop.state.skipped}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def run_ranks(folder: Path, world: int, *, nan_at: int = -1) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, world, str(folder / "store"), str(folder), nan_at))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def test_two_ranks_equal_one_process(toy: Any, tmp_path: Path) -> None:
    alone = toy.loop()
    expected = [alone.train_step(toy.step(step, micro_batches=2)) for step in range(4)]
    first, second = run_ranks(tmp_path, 2)
    for name, value in alone.module.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["weights"][name], second["weights"][name])
    for ours, theirs in zip(first["terms"], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert first["terms"] == second["terms"]


def test_a_nan_on_one_rank_skips_the_step_on_all(toy: Any, tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, 2, nan_at=2)
    assert (first["skipped"], second["skipped"]) == (1, 1)
    alone = toy.loop()
    for step in range(4):
        if step == 2:
            alone.state.step = 3
            continue
        alone.train_step(toy.step(step, micro_batches=2))
    for name, value in alone.module.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["weights"][name], second["weights"][name])
