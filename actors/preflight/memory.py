"""Parameters, work and memory of one role's training step, from its model as fake tensors (no memory, no time).

Memory of one worker in bytes, AdamW on weights of float32. T is the bytes of the trained parameters, W of all of them
with the buffers, N the workers of the role, "part" what a worker keeps of something that is cut: 1/N of it. What stays:

    term        single, ddp   fsdp2         zero2       zero3
    weights     W             W part        W           W part
    master      -             -             T part      T part      the optimiser's own copy of the weights
    optimiser   2T            2T part       2T part     2T part     two moments; a moving average adds T, or its part
    buckets     -             -             b           b           b: gradients on their way, at most 400 MB
    gradients   T             T part        T part      T part

and what comes and goes, of which the largest counts:

    backward    activations + working + gathered; with accumulation, and in zero3, the gradients are there beside
                them, else they grow while the activations go and the larger of gradients and working counts
    reducing    the gradients, and the copies that travel: T (ddp) · b, or the largest parameter (zero2, zero3) ·
                the outer unit, its whole gradient and the copy that is scattered (fsdp2)
    updating    the gradients, and on a GPU one temporary of their size; zero2 and zero3 flatten a copy too

    activations the storages that autograd keeps for the backward pass of one micro-batch, counted by running the
                forward pass on fake tensors under saved-tensor hooks (each storage once; parameters, buffers and the
                batch itself are not counted again). The logits of a language model are among them, as often as they
                are kept: as the head gives them, in float32, normalised. So are the casts of weights that autocast
                makes, whole also where weights are cut; with checkpointing those of one block at a time
    working     twice the largest of the activations (often the logits): the gradients that enter and leave an
                operation of its size; with checkpointing, that of the largest outside of blocks (the logits), or what
                a block keeps while it is computed again with the gradients within it: they are not there together
    gathered    weights that are whole for a while: fsdp2, the outer unit (all that lies in no block) and two blocks,
                or everything without resharding; zero3, up to a thousand million parameters and the largest one (frozen
                embeddings left out)
    batch       the collated tensors of one micro-batch

With ``backend.offload`` master, moments and gradients (``optimizer``), and the part of the weights (``parameters``) are
host memory, which is counted apart, as are micro-batches that wait in the loader. With activation checkpointing a block
keeps its inputs only, and its forward pass is counted twice.
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
from actors.preflight.work import counting
from actors.trainers.tensors import bucket_elements
from configs.schema import BackendConfig
from models.spec import RoleSpec

#: Host memory of a worker process before it holds any tensor: interpreter, torch, Ray.
PROCESS_BYTES = 700 * 10**6

#: Elements that DeepSpeed's stage 3 may keep gathered at a time (its stage3_max_live_parameters).
_ZERO3_LIVE = 10**9


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One worker's training step on one micro-batch; the terms are those of the module's docstring, in bytes."""

    trainable: int
    frozen: int
    flops: int
    """Forward and backward of the micro-batch."""
    recomputed: int = 0
    """Of these, the forward passes of blocks that checkpointing makes again."""
    weights: int
    gradients: int
    optimiser: int
    activations: int
    batch: int
    working: int
    master: int = 0
    buckets: int = 0
    gathered: int = 0
    reducing: int = 0
    """Beside the gradients, while they are summed over the workers."""
    updating: int = 0
    """Beside the gradients, while the optimiser steps."""
    gradients_stay: bool = False
    """Whether the gradients have memory all the time."""
    host: int = 0
    """Of what is kept for the device in the host's memory."""

    def peak(self, accumulation: int = 1) -> int:
        """Peak bytes of tensors on the device in a step of ``accumulation`` micro-batches."""
        if accumulation > 1 or self.gradients_stay:
            gradients = self.gradients + self.working
        else:
            gradients = max(self.gradients, self.working)
        stays = self.weights + self.master + self.optimiser + self.buckets + self.batch
        return stays + max(
            self.activations + self.gathered + gradients,
            self.gradients + self.reducing,
            self.gradients + self.updating,
        )


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
    with stepping(module), counting() as counter:
        tape = _Tape([*parameters, *module.buffers(), *_tensors(batch), *received.values()], counter)
        blocks = role.checkpointed if checkpointing else ()
        with (
            tape.recording(module, blocks),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=not checkpointing),
        ):
            output = role.step(module, batch, received)
        ends = [value.float() for value in output.sums.values()]
        ends += [sent.float().sum() for sent in output.outputs.values()]  # their gradients come back
        total = torch.stack([end for end in ends if end.requires_grad] or [torch.zeros((), requires_grad=True)]).sum()
        total.backward()
        flops = int(counter.get_total_flops()) + tape.recomputed
    count = sum(p.numel() for p in trainable)
    cost = StepCost(
        trainable=count,
        frozen=sum(p.numel() for p in parameters) - count,
        flops=flops,
        recomputed=tape.recomputed,
        weights=sum(_bytes(t) for t in (*parameters, *module.buffers())),
        gradients=sum(_bytes(p) for p in trainable),
        optimiser=sum(_bytes(p) for p in trainable) * (3 if ema else 2),
        activations=tape.activations,
        batch=sum(_bytes(t) for t in (*_tensors(batch), *received.values())),
        working=tape.working,
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
    """Bytes that a block keeps while it is computed again, and twice its largest tensor."""
    _largest: int = 0
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

    @property
    def working(self) -> int:
        """What the backward pass needs beside them: of an operation outside of blocks, or of a block."""
        return max(2 * self._largest, self.largest_block)

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
            if not self._depth:
                self._largest = max(self._largest, size)
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
            inside = self.saved[self._began[0] :]
            self._inside += sum(inside)
            self.largest_block = max(self.largest_block, sum(inside) + 2 * max(inside, default=0))
            self.recomputed += self._reached - self._began[1]


def spread(
    cost: StepCost,
    module: nn.Module,
    role: RoleSpec,
    backend: BackendConfig,
    workers: int,
    *,
    accelerated: bool = False,
) -> StepCost:
    """``cost``, as one process alone has it, on one of ``workers`` of a backend: see the module's docstring.

    ``accelerated``: the optimiser steps on a GPU, where it works on all parameters at once.
    """
    temporary = cost.gradients if accelerated else 0
    if backend.name in ("single", "ddp"):
        return dataclasses.replace(cost, reducing=cost.gradients if workers > 1 else 0, updating=temporary)
    if backend.name == "fsdp2":
        return _fsdp2(cost, module, role, workers, reshard=backend.reshard_after_forward, temporary=temporary)
    return _zero(cost, module, backend, workers, temporary)


def _fsdp2(
    cost: StepCost, module: nn.Module, role: RoleSpec, workers: int, *, reshard: bool, temporary: int
) -> StepCost:
    outer, blocks = _units(module, role)
    block = max((sum(map(_bytes, unit)) for unit in blocks), default=0)
    rest, trained = sum(map(_bytes, outer)), sum(_bytes(p) for p in outer if p.requires_grad)
    whole = rest + sum(_bytes(p) for unit in blocks for p in unit)
    alone = workers == 1  # a group of one gathers nothing
    return dataclasses.replace(
        cost,
        weights=cost.weights - whole + whole // workers,
        gradients=cost.gradients // workers,
        optimiser=cost.optimiser // workers,
        gathered=0 if alone else min(rest + 2 * block, whole) if reshard else whole,
        reducing=0 if alone else rest + 2 * trained,
        updating=temporary // workers,
    )


def _zero(cost: StepCost, module: nn.Module, backend: BackendConfig, workers: int, temporary: int) -> StepCost:
    stage3 = backend.name == "zero3"
    parameters = [p for p in module.parameters() if p.requires_grad]
    largest = max((_bytes(p) for p in parameters), default=0)
    bucket = 4 * bucket_elements(cost.trainable) if parameters else 0
    master = gradients = cost.gradients // workers
    optimiser, weights, gathered = cost.optimiser // workers, cost.weights, 0
    if stage3:
        whole = sum(map(_bytes, module.parameters()))
        # A frozen table of embeddings is let go after the look-up: nothing asks for it in the backward pass.
        tables = [m.weight for m in module.modules() if isinstance(m, nn.Embedding) and not m.weight.requires_grad]
        needed = whole - sum(map(_bytes, tables))
        live = _ZERO3_LIVE * whole // max(1, sum(p.numel() for p in module.parameters()))
        gathered = min(needed, live + max(map(_bytes, module.parameters()), default=0))
        weights = cost.weights - whole + whole // workers
    part = dataclasses.replace(
        cost,
        weights=weights,
        master=master,
        gradients=gradients,
        optimiser=optimiser,
        buckets=bucket,
        gathered=gathered,
        reducing=min(cost.gradients, max(bucket, largest)),
        updating=gradients + temporary // workers,
        gradients_stay=stage3,
    )
    if backend.offload == "none":
        return part
    # Stage 2 keeps room on the device for one whole gradient. On the host lie the sums, what the optimiser reads of
    # them, and with stage 2 the weights on their way back.
    away = weights - (cost.weights - whole) if stage3 and backend.offload == "parameters" else 0
    return dataclasses.replace(
        part,
        weights=weights - away,
        master=0,
        optimiser=0,
        gradients=0 if stage3 else largest,
        updating=0,
        gradients_stay=not stage3,
        host=master + optimiser + (2 if stage3 else 3) * gradients + away,
    )


def _units(module: nn.Module, role: RoleSpec) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
    """Parameters that are gathered together: those in no block, and those of each block."""
    blocks = [child for child in module.modules() if type(child).__name__ in role.checkpointed and child is not module]
    inside = {id(p) for block in blocks for p in block.parameters()}
    return [p for p in module.parameters() if id(p) not in inside], [list(block.parameters()) for block in blocks]


def _tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
