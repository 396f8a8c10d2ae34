"""Parameters, work and memory of one role's training step, from its model as fake tensors (no memory, no time).

Memory of one worker, in bytes (AdamW, weights in float32):

    weights      4 a parameter, and the buffers
    gradients    4 a trainable parameter
    optimiser    8 a trainable parameter (two moments)
    activations  the storages that autograd keeps for the backward pass of one micro-batch, counted by running the
                 forward pass on fake tensors under saved-tensor hooks (each storage once; parameters, buffers
                 and the batch itself are not counted again)
    batch        the collated tensors of one micro-batch
    working      twice the largest of the activations: the gradients that enter and leave an operation of its size

The peak is early in the backward pass, when all activations are still there and the gradients of the largest ones
are being made: weights + optimiser + activations + batch + working. With accumulation the parameters' gradients are
there too; without, they grow while the activations go, so only the larger of the two counts. A moving average of the
weights adds 4 a trainable parameter. Micro-batches that wait in the loader are host memory and counted apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.spec import RoleSpec

#: Host memory of a worker process before it holds any tensor: interpreter, torch, Ray.
PROCESS_BYTES = 700 * 10**6


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One worker's training step on one micro-batch."""

    trainable: int
    frozen: int
    flops: int
    """Forward and backward of the micro-batch."""
    weights: int
    gradients: int
    optimiser: int
    activations: int
    batch: int
    working: int

    def peak(self, accumulation: int = 1) -> int:
        """Peak bytes of tensors in a step of ``accumulation`` micro-batches."""
        gradients = self.gradients + self.working if accumulation > 1 else max(self.gradients, self.working)
        return self.weights + self.optimiser + self.activations + self.batch + gradients


def step_cost(
    module: nn.Module, role: RoleSpec, batch: Mapping[str, Any], *, autocast: bool = False, ema: bool = False
) -> StepCost:
    """The cost of ``role``'s step of ``module`` on ``batch``, made under one ``FakeTensorMode`` (or both real)."""
    parameters = list(module.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    with FlopCounterMode(display=False) as counter:
        saved, loss = _saved(module, role, batch, autocast)
        loss.backward()
    count = sum(p.numel() for p in trainable)
    return StepCost(
        trainable=count,
        frozen=sum(p.numel() for p in parameters) - count,
        flops=int(counter.get_total_flops()),
        weights=sum(_bytes(t) for t in (*parameters, *module.buffers())),
        gradients=sum(_bytes(p) for p in trainable),
        optimiser=sum(_bytes(p) for p in trainable) * (3 if ema else 2),
        activations=sum(saved),
        batch=sum(_bytes(t) for t in batch.values() if isinstance(t, Tensor)),
        working=2 * max(saved, default=0),
    )


def _saved(module: nn.Module, role: RoleSpec, batch: Mapping[str, Any], autocast: bool) -> tuple[list[int], Tensor]:
    """Bytes of every storage kept for the backward pass, and the sum of the losses."""
    known = [*module.parameters(), *module.buffers(), *(t for t in batch.values() if isinstance(t, Tensor))]
    with _count_saved(known) as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums = role.step(module, batch, {}).sums
    return saved, torch.stack([value.float() for value in sums.values()]).sum()


@contextmanager
def _count_saved(known: list[Tensor]) -> Iterator[list[int]]:
    """Yields a list that gets the bytes of every storage saved for backward that is not of ``known``, each once."""
    seen = {id(t.untyped_storage()) for t in known}
    alive = [t.untyped_storage() for t in known]  # an id is unique only while its object lives
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen.add(id(storage))
            alive.append(storage)
            saved.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
