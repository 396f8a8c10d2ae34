"""Finding the sample that made a loss or a gradient infinite or NaN, by training on each sample alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from actors.bridge.link import Links, Micro
from actors.trainers.backends.base import Backend
from models.spec import RoleSpec, StepOutput


def find_culprits(
    module: nn.Module,
    role: RoleSpec,
    parts: Iterable[tuple[Micro, Mapping[str, Any]]],
    backend: Backend,
    autocast: AbstractContextManager[Any],
    link: Links,
) -> dict[str, str]:
    """Sample id -> what is not finite about it, in this role. The module's gradients are cleared afterwards.

    Sharded weights are gathered by all ranks together, and a backward pass mixes the ranks' gradients: there only the
    losses are looked at, of as many samples on every rank. What crosses edges crosses once more, without gradients.
    """
    culprits: dict[str, str] = {}
    for micro, batch in parts:
        received = link.receive(micro, gradients=False)
        if link.joint:
            with autocast, torch.no_grad():
                outputs = role.step(module, batch, received).outputs
            link.send(micro, outputs, gradients=False)
        for index, sample in enumerate(micro.ids):
            one, came = _one(batch, index, len(micro.ids)), _one(received, index, len(micro.ids))
            came = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in came.items()}
            with autocast, torch.set_grad_enabled(not backend.sharded):
                output = role.step(module, one, came)
            why = _bad_values(output, {**one, **came}) or (
                "" if backend.sharded else _bad_gradient(module, output, came)
            )
            if why:
                culprits[sample] = f"{role.name}: {why}" if link.joint else why
        link.done(micro)
    module.zero_grad(set_to_none=True)
    return culprits


def _bad_values(output: StepOutput, inputs: Mapping[str, Any]) -> str:
    """Which loss sums and sent tensors of a batch of one sample are not finite; "" if all are."""
    bad = [f"{term} is {float(value.detach())}" for term, value in output.sums.items() if not _finite(value)]
    bad += [f"{name}, which leaves on an edge, is not finite" for name, v in output.outputs.items() if not _finite(v)]
    if not bad:
        return ""
    named = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point() and not _finite(v)]
    return ", ".join(bad) + (f"; not finite already in its input {', '.join(named)}" if named else "")


def _bad_gradient(module: nn.Module, output: StepOutput, received: Mapping[str, Tensor]) -> str:
    """Which gradients of finite values are not finite; "" if all are. What leaves on an edge gets the gradient 1."""
    module.zero_grad(set_to_none=True)
    values = [v.float().sum() for v in (*output.sums.values(), *output.outputs.values()) if v.requires_grad]
    if values:
        torch.stack(values).sum().backward()
    names = [n for n, p in module.named_parameters() if p.grad is not None and not _finite(p.grad)]
    names += [n for n, tensor in received.items() if tensor.grad is not None and not _finite(tensor.grad)]
    return f"the gradient of {', '.join(names[:3])} is not finite" if names else ""


def _one(batch: Mapping[str, Any], index: int, size: int) -> dict[str, Any]:
    """The columns of one sample, still with a batch axis of 1."""
    cut: dict[str, Any] = {}
    for name, value in batch.items():
        per_sample = (isinstance(value, Tensor) and value.shape[:1] == (size,)) or (
            isinstance(value, list) and len(value) == size
        )
        cut[name] = value[index : index + 1] if per_sample else value
    return cut


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
