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

With activation checkpointing a block keeps its inputs only; what it saves itself is there for one block at a time
(working), and its forward pass is counted twice. A backend that shards divides by its workers: see :func:`spread`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from actors.preflight.fake import stepping
from models.spec import RoleSpec

#: Host memory of a worker process before it holds any tensor: interpreter, torch, Ray.
PROCESS_BYTES = 700 * 10**6

#: Elements that DeepSpeed's stage 3 may keep gathered at a time (its stage3_max_live_parameters).
_ZERO3_LIVE = 10**9


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
    module: nn.Module,
    role: RoleSpec,
    batch: Mapping[str, Any],
    received: Mapping[str, Tensor] | None = None,
    *,
    autocast: bool = False,
    ema: bool = False,
    checkpointing: bool = False,
) -> StepCost:
    """The cost of ``role``'s step of ``module`` on ``batch``, made under one ``FakeTensorMode`` (or both real)."""
    return step_and_outputs(
        module, role, batch, received or {}, autocast=autocast, ema=ema, checkpointing=checkpointing
    )[0]


def step_and_outputs(
    module: nn.Module,
    role: RoleSpec,
    batch: Mapping[str, Any],
    received: Mapping[str, Tensor],
    *,
    autocast: bool = False,
    ema: bool = False,
    checkpointing: bool = False,
) -> tuple[StepCost, Mapping[str, Tensor]]:
    """:func:`step_cost`, and what leaves on edges."""
    parameters = list(module.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    with stepping(module), FlopCounterMode(display=False) as counter:
        tape = _Tape([*parameters, *module.buffers(), *_tensors(batch), *received.values()], counter)
        blocks = role.checkpointed if checkpointing else ()
        with tape.recording(module, blocks), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = role.step(module, batch, received)
        ends = [value.float() for value in output.sums.values()]
        ends += [sent.float().sum() for sent in output.outputs.values()]  # their gradients come back
        total = torch.stack([end for end in ends if end.requires_grad] or [torch.zeros((), requires_grad=True)]).sum()
        total.backward()
        flops = int(counter.get_total_flops()) + tape.recomputed
    count = sum(p.numel() for p in trainable)
    working = 2 * max(tape.saved, default=0) + tape.largest_block
    if checkpointing and autocast:  # casts of the weights live until the forward pass ends
        working = max(working, count * 2)
    cost = StepCost(
        trainable=count,
        frozen=sum(p.numel() for p in parameters) - count,
        flops=flops,
        weights=sum(_bytes(t) for t in (*parameters, *module.buffers())),
        gradients=sum(_bytes(p) for p in trainable),
        optimiser=sum(_bytes(p) for p in trainable) * (3 if ema else 2),
        activations=tape.activations,
        batch=sum(_bytes(t) for t in (*_tensors(batch), *received.values())),
        working=working,
    )
    return cost, output.outputs


@dataclass
class _Tape:
    """Bytes of every storage that autograd keeps, each once, and how much of that blocks would compute again."""

    known: Sequence[Tensor]
    counter: FlopCounterMode
    saved: list[int] = field(default_factory=list)
    recomputed: int = 0
    """Operations of blocks' forward passes."""
    largest_block: int = 0
    _inputs: int = 0
    _inside: int = 0
    _depth: int = 0
    _reached: int = 0
    _began: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self._alive = {id(t.untyped_storage()): t.untyped_storage() for t in self.known}
        # An id is unique only while its object lives.

    @property
    def activations(self) -> int:
        """Bytes that wait for the backward pass."""
        return sum(self.saved) - self._inside + self._inputs

    @contextmanager
    def recording(self, module: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
        """Listens to the forward pass within; ``blocks`` are the classes that keep their inputs only."""
        handles = []
        for child in module.modules():
            if type(child).__name__ in blocks:
                handles.append(child.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(child.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._depth:  # what comes after the last tensor that is kept is not computed again
            self._reached = int(self.counter.get_total_flops())
        if size := self._new(tensor):
            self.saved.append(size)
        return tensor

    def _new(self, tensor: Tensor) -> int:
        """Bytes of the tensor's storage the first time that it is seen, else 0."""
        storage = tensor.untyped_storage()
        if id(storage) in self._alive:
            return 0
        self._alive[id(storage)] = storage
        return storage.nbytes()

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._depth == 0:
            self._inputs += sum(self._new(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            self._reached = int(self.counter.get_total_flops())
            self._began = len(self.saved), self._reached
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            inside = sum(self.saved[self._began[0] :])
            self._inside += inside
            self.largest_block = max(self.largest_block, inside)
            self.recomputed += self._reached - self._began[1]


def spread(
    cost: StepCost, module: nn.Module, role: RoleSpec, backend: str, workers: int, *, reshard: bool = True
) -> StepCost:
    """``cost`` on one of ``workers`` of a backend; single and ddp keep everything on each of them.

    fsdp2 divides weights, gradients and moments, and gathers the block at work and the next one (without
    resharding: all of them). zero2 divides gradients and moments and keeps another copy of its part of the weights;
    zero3 divides the weights too, and keeps up to a thousand million of them gathered.
    """
    if workers == 1:
        return cost
    if backend in ("single", "ddp"):
        # Gradients, as one flat vector and as the message that is summed, when activations are gone.
        return dataclasses.replace(cost, working=max(cost.working, 3 * cost.gradients - cost.activations))
    weights, optimiser = cost.weights, cost.optimiser
    if backend == "zero2":
        optimiser += cost.gradients
    elif backend == "zero3":
        weights = weights // workers + min(weights, 4 * _ZERO3_LIVE)
        optimiser += cost.gradients
    else:
        gathered = 2 * _largest_block(module, role) if reshard else weights
        weights = weights // workers + min(gathered, weights)
    return dataclasses.replace(
        cost, weights=weights, gradients=cost.gradients // workers, optimiser=optimiser // workers
    )


def _largest_block(module: nn.Module, role: RoleSpec) -> int:
    """Bytes of the largest unit that is gathered at once: a block, or all that lies in none."""
    blocks = [child for child in module.modules() if type(child).__name__ in role.checkpointed and child is not module]
    inside = {id(p): p for block in blocks for p in block.parameters()}
    rest = sum(_bytes(p) for p in module.parameters() if id(p) not in inside)
    return max([rest, *(sum(_bytes(p) for p in block.parameters()) for block in blocks)])


def _tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
