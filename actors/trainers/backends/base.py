"""What a backend is: how one role's weights and gradients are spread over its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Edge = tuple[Tensor, Tensor]
"""An activation that left on an edge, and the gradient that came back for it."""


class Backend(Protocol):
    """Every method is called by all ranks alike, in the same order."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, module: nn.Module) -> None:
        """Move the module to the device and give every rank the weights of rank 0."""

    def backward(self, loss: Tensor | None, edges: Sequence[Edge] = ()) -> None:
        """Accumulate, once a micro-batch, the gradient of the loss and of what came back on edges."""

    def reduce(self, parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
        """Sum the gradients over the ranks (losses are already shares of the global mean: nothing is averaged),
        and ``extra``, a float64 vector on CPU, in the same message. Returns the sum of ``extra``.
        """

    def exchange(self, message: Any) -> list[Any]:
        """Every rank's message (small, picklable), in rank order."""


def backward(loss: Tensor | None, edges: Sequence[Edge] = ()) -> None:
    """One backward pass of ``loss + sum((h * grad).sum())``.

    One scalar, because separate backward calls on a shared graph crash DDP and ZeRO. Nothing is done where there is
    nothing to differentiate.
    """
    terms = [] if loss is None or not loss.requires_grad else [loss]
    terms += [(h.float() * grad.float()).sum() for h, grad in edges]
    if terms:
        torch.stack([term.float() for term in terms]).sum().backward()


def flatten_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All gradients as one float32 vector on CPU's or the device's memory; zeros where a parameter took no part."""
    parts = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters]
    return torch.cat([part.float() for part in parts])


def scatter_gradients(flat: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """The inverse of :func:`flatten_gradients`; gradients become views of ``flat`` where the dtype allows."""
    offset = 0
    for parameter in parameters:
        part = flat[offset : offset + parameter.numel()].view_as(parameter)
        parameter.grad = part.to(parameter.dtype)
        offset += parameter.numel()
