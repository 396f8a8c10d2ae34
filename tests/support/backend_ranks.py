"""A toy role whose micro-batches are of two kinds, trained for a few steps by any backend in plain processes.

Kind ``q`` has a loss of its own; kind ``g`` sends an activation away and is told its gradient when it comes back, up to
``window`` micro-batches later. Two heads are used by one kind each and take part with weight zero in the other. Kind
``n`` is a ``q`` that breaks the rule: the other head takes no part at all.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.bridge.schedule import source_schedule
from configs.schema import BackendConfig, TrainerConfig
from models.spec import RoleSpec, StepOutput

STEPS = 4
BATCH = 4
WIDTH = 6
CONFIG = TrainerConfig(lr=0.05, clip_norm=0.3, weight_decay=0.1)


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class TwoHeads(nn.Module):
    """Shared blocks and a head for each kind; one parameter is frozen, one buffer counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.answer = nn.Linear(WIDTH, 3)
        self.condition = nn.Linear(WIDTH, 5)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([0.5]))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, kind: str) -> Tensor:
        h = self.frozen(x)
        for block in self.blocks:
            h = block(h)
        answer = self.answer(h) * self.scale
        if kind == "n":
            return answer
        condition = self.condition(h)
        return answer + 0.0 * condition.sum() if kind == "q" else condition + 0.0 * answer.sum()


def _unused(*_: Any, **__: Any) -> StepOutput:
    raise AssertionError("the tests call the module themselves")


ROLE = RoleSpec(name="toy", step=_unused, counts=_unused, checkpointed=("Block",))
FREE = ("condition.*",)
"""What :data:`FREE_ROLE` leaves unclipped."""
FREE_ROLE = replace(ROLE, unclipped=FREE)


def inputs(step: int, micro: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's samples of a micro-batch, and the gradient that comes back for each of their activations."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    back = torch.randn(BATCH, 5, generator=generator)
    share = BATCH // world
    return x[rank * share : (rank + 1) * share], back[rank * share : (rank + 1) * share]


def micro_batches(module: nn.Module, backward: Any, kinds: str, window: int, step: int, rank: int, world: int) -> None:
    """One step in the order in which the role that sends activations makes its forwards and backwards."""
    outputs: dict[int, Tensor] = {}
    for op in source_schedule(kinds, "g", window):
        x, back = inputs(step, op.micro, rank, world)
        if op.action == "forward":
            outputs[op.micro] = module(x, kinds[op.micro])
        elif kinds[op.micro] == "g":
            backward(None, [(outputs.pop(op.micro), back)])
        else:
            backward(outputs.pop(op.micro).square().sum() / BATCH, ())


def oracle(
    kinds: str, config: TrainerConfig = CONFIG, steps: int = STEPS, unclipped: str = "nothing"
) -> dict[str, Any]:
    """The same steps by plain autograd and AdamW in one process: norms, weights and moments after each step.

    Parameters whose name begins with ``unclipped`` are left out of the norm.
    """
    module = TwoHeads()
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    decayed = {n for n, p in named.items() if p.ndim > 1}
    adam = torch.optim.AdamW(
        [
            {"params": [named[n] for n in named if n in decayed], "weight_decay": config.weight_decay},
            {"params": [named[n] for n in named if n not in decayed], "weight_decay": 0.0},
        ],
        lr=config.lr,
    )
    norms, weights, moments = [], [], []
    for step in range(steps):
        adam.zero_grad()
        total = torch.zeros(())
        for micro, kind in enumerate(kinds):
            x, back = inputs(step, micro, 0, 1)
            out = module(x, kind)
            total = total + ((out * back).sum() if kind == "g" else out.square().sum() / BATCH)
        total.backward()
        for parameter in named.values():  # one that took no part has a gradient of zero
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        counted = [p for n, p in named.items() if not n.startswith(unclipped)]
        norms.append(float(nn.utils.clip_grad_norm_(counted, config.clip_norm)))
        adam.step()
        weights.append({n: p.detach().clone() for n, p in named.items()})
        moments.append({n: adam.state[p]["exp_avg"].clone() for n, p in named.items()})
    return {"norms": norms, "weights": weights, "moments": moments}


def run_case(
    settings: BackendConfig, kinds: str, window: int, role: RoleSpec = ROLE, *, recompute: bool = False
) -> dict[str, Any]:
    """The steps with a backend, in a process of an initialised group; what :func:`oracle` gives."""
    from actors.trainers.backends import make_backend
    from actors.trainers.recompute import checkpoint_activations

    torch.manual_seed(0)
    backend = make_backend(settings, "cpu")
    module = TwoHeads()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += backend.rank  # overwritten by rank 0's
    if recompute:
        checkpoint_activations(module, role)
    module = backend.prepare(module, role, CONFIG)
    norms, weights, moments, sums = [], [], [], []
    for step in range(STEPS):
        backend.zero_grad()
        micro_batches(module, backend.backward, kinds, window, step, backend.rank, backend.world_size)
        extra, norm = backend.reduce(torch.tensor([1.0, backend.rank + 0.25], dtype=torch.float64))
        backend.update(CONFIG.lr, norm, CONFIG.clip_norm)
        norms.append(float(norm))
        sums.append(extra)
        saved, state = backend.weights(), backend.optimizer_state()
        weights.append({n: v for n, v in saved.items() if n != "scale"})
        moments.append({n: state[f"{n}/exp_avg"] for n in weights[-1]})
        assert bool(saved) == bool(state) == (backend.rank == 0)
    return {"norms": norms, "weights": weights, "moments": moments, "sums": sums}


def in_ranks(work: Callable[..., Any], folder: Path, world: int, *arguments: Any, timeout: float = 170) -> list[Any]:
    """``work(*arguments)`` in each of ``world`` processes of a gloo group; what each gave, in rank order."""
    context = multiprocessing.get_context("spawn")
    folder.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_rank, args=(work, folder, rank, world, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    failures = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not failures, failures[0]
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(work: Callable[..., Any], folder: Path, rank: int, world: int, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
        torch.save(work(*arguments), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    # Not the interpreter's own end: a thread of gloo may still be letting go of a tensor, and would abort the process.
    os._exit(0)
