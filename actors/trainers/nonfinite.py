"""Finding the sample that made a loss or a gradient infinite or NaN, by training on each sample alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from actors.trainers.backends.base import Backend
from models.spec import RoleSpec


def find_culprits(
    module: nn.Module,
    role: RoleSpec,
    micro_batches: Sequence[Any],
    backend: Backend,
    autocast: AbstractContextManager[Any],
) -> dict[str, str]:
    """Sample id -> what is not finite about it. The module's gradients are cleared afterwards.

    Sharded weights are gathered by all ranks together, and a backward pass mixes the ranks' gradients: there only the
    losses are looked at, of as many samples on every rank.
    """
    culprits: dict[str, str] = {}
    for micro_batch in micro_batches:
        for index, sample in enumerate(micro_batch.samples):
            batch = _one(micro_batch.batch, index, len(micro_batch.samples), backend.device)
            with autocast, torch.set_grad_enabled(not backend.sharded):
                sums = role.step(module, batch, {}).sums
            why = _bad_sums(sums, batch) or ("" if backend.sharded else _bad_gradient(module, sums))
            if why:
                culprits[sample.id] = why
    module.zero_grad(set_to_none=True)
    return culprits


def _bad_sums(sums: Mapping[str, Tensor], batch: Mapping[str, Any]) -> str:
    """Which loss sums of a batch of one sample are not finite; "" if all are."""
    bad = [f"{term} is {float(value.detach())}" for term, value in sums.items() if not torch.isfinite(value).all()]
    if not bad:
        return ""
    inputs = [k for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point() and not _finite(v)]
    return ", ".join(bad) + (f"; not finite already in its input {', '.join(inputs)}" if inputs else "")


def _bad_gradient(module: nn.Module, sums: Mapping[str, Tensor]) -> str:
    """Which gradients of finite sums are not finite; "" if all are."""
    module.zero_grad(set_to_none=True)
    torch.stack([value.float() for value in sums.values()]).sum().backward()
    names = [n for n, p in module.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return f"the gradient of {', '.join(names[:3])} is not finite" if names else ""


def _one(batch: Mapping[str, Any], index: int, size: int, device: torch.device) -> dict[str, Any]:
    """The columns of one sample, still with a batch axis of 1."""
    return {
        name: value[index : index + 1].to(device) if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
        for name, value in batch.items()
    }


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
