"""A toy role whose every gradient can be computed by hand, and a fake of the loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actors.trainers.backends.single import SingleBackend
from actors.trainers.loop import Hooks, TrainLoop
from configs.schema import TrainerConfig
from models.spec import RoleSpec, StepOutput


class Toy(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.linear = nn.Linear(3, 2)
        self.head = nn.Linear(2, 1)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.linear(x))))[:, 0]


def toy_step(module: nn.Module, batch: Mapping[str, Any], received: Mapping[str, Tensor]) -> StepOutput:
    error = module(batch["x"]) - batch["y"]
    return StepOutput(
        sums={"square": (error.square() * batch["weight"]).sum(), "abs": (error.abs() * batch["weight"]).sum()}
    )


def toy_counts(batch: Mapping[str, Any]) -> dict[str, float]:
    n = float(batch["weight"].sum())
    return {"square": n, "abs": n}


ROLE = RoleSpec(name="toy", step=toy_step, counts=toy_counts)


@dataclass(frozen=True)
class Sample:
    id: str


@dataclass
class MicroBatch:
    batch: dict[str, Any]
    samples: tuple[Sample, ...]
    kind: str = "toy"
    index: int = 0


@dataclass
class Step:
    step: int
    micro_batches: list[MicroBatch]
    epoch: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    hit_rate: float = 1.0


def toy_data(step: int, size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 3, generator=generator)
    return {"x": x, "y": x.sum(1), "weight": torch.ones(size)}


def toy_step_of(step: int, *, micro_batches: int = 1, size: int = 8, rank: int = 0, world: int = 1) -> Step:
    """The same ``size`` samples, cut over micro-batches and then ranks."""
    data = toy_data(step, size)
    per = size // micro_batches
    share = per // world
    parts = []
    for index in range(micro_batches):
        begin = index * per + rank * share
        rows = slice(begin, begin + share)
        samples = tuple(Sample(f"toy/{step}#{i}") for i in range(begin, begin + share))
        parts.append(MicroBatch({k: v[rows] for k, v in data.items()}, samples, index=index))
    return Step(step, parts)


def toy_steps(start: int, stop: int, **how: int) -> Iterator[Step]:
    for step in range(start, stop):
        yield toy_step_of(step, **how)


def toy_loop(
    *, hooks: Hooks | None = None, backend: Any = None, dropout: float = 0.0, shift: float = 0.0, **settings: Any
) -> TrainLoop:
    """A loop over the toy role, whose weights begin ``shift`` away from the usual ones."""
    config = TrainerConfig(**{"steps": 10, "lr": 0.05, "warmup_steps": 2, "log_every": 1, **settings})
    module = Toy(dropout)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += shift
    return TrainLoop(
        module=module,
        role=ROLE,
        config=config,
        backend=backend or SingleBackend(),
        loss_weights={"square": 1.0, "abs": 0.5},
        seed=0,
        hooks=hooks,
    )
