"""What a backend is: how one role's weights, gradients and optimiser are spread over its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.schema import TrainerConfig
from models.spec import RoleSpec

Edge = tuple[Tensor, Tensor]
"""An activation that left on an edge, and the gradient that came back for it."""


class Backend(Protocol):
    """Owns the optimiser and the gradients. Every method is called by all ranks alike, in the same order."""

    rank: int
    world_size: int
    device: torch.device
    sharded: bool
    """Whether a forward or backward pass talks to the other ranks, so that none can make one alone."""

    loss_scale: float
    """What :meth:`backward` multiplies the loss by: gradients of tensors that came on an edge are as much too large."""

    def prepare(
        self, module: nn.Module, role: RoleSpec, config: TrainerConfig, weights: Mapping[str, Tensor] | None = None
    ) -> nn.Module:
        """Place and spread the module, give every rank the weights of rank 0, make the optimiser.

        Parameters that require a gradient are trained. Returns what is called from now on; names stay.

        ``weights`` has the values of what the module holds on the meta device: they are read one by one, by every rank,
        and where the backend cuts weights, a rank keeps its part of each before it reads the next.
        """

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def backward(self, loss: Tensor | None, edges: Sequence[Edge] = ()) -> None:
        """Accumulate, once a micro-batch, the gradient of the loss and of what came back on edges."""

    def reduce(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Complete the gradients: their sum over the ranks, since losses are shares of the global mean already.

        ``extra``, a float64 vector on CPU, is summed with them. Returns that sum and the norm of the gradient but for
        parameters that the role leaves unclipped, not finite if any gradient (theirs too) is not; both are equal on
        all ranks. The weights are not touched.
        """

    def update(self, rate: float, norm: Tensor, limit: float) -> None:
        """One optimiser step at learning rate ``rate`` (times ``trainer.lr_scale``), with the gradient of the last
        :meth:`reduce` scaled down to norm ``limit`` (0: as it is), but for what the role leaves unclipped.
        """

    def exchange(self, message: Any) -> list[Any]:
        """Every rank's message (small, picklable), in rank order."""

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters and persistent buffers: whole, on CPU, by the module's own names; empty but on rank 0."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's state as ``<parameter>/<field>``, as :meth:`weights` gives weights."""

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`weights` gave, on any backend and any number of ranks; equal on all ranks."""

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`optimizer_state` gave."""

    def close(self) -> None:
        """Let go of the module and of the default process group, once all ranks are done; the backend is over then.

        A process that ends by itself must have called it: see :mod:`actors.trainers.backends.groups`.
        """


def combine(loss: Tensor | None, edges: Sequence[Edge] = ()) -> Tensor | None:
    """``loss + sum((h * grad).sum())``, one scalar; None where there is nothing to differentiate.

    Separate backward calls on a shared graph crash ZeRO and DDP.
    """
    terms = [] if loss is None or not loss.requires_grad else [loss]
    terms += [(h.float() * grad.float()).sum() for h, grad in edges]
    return torch.stack([term.float() for term in terms]).sum() if terms else None


def backward(loss: Tensor | None, edges: Sequence[Edge] = ()) -> None:
    """One backward pass of :func:`combine`."""
    scalar = combine(loss, edges)
    if scalar is not None:
        scalar.backward()


def flatten_gradients(parameters: Sequence[nn.Parameter], extra: Tensor | None = None) -> Tensor:
    """All gradients as one float32 vector on CPU's or the device's memory, ``extra`` (n,) behind them.

    Zeros where a parameter took no part.
    """
    parts = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters]
    parts += [] if extra is None else [extra.to(parts[0].device)]
    return torch.cat([part.float() for part in parts])


def scatter_gradients(flat: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """The inverse of :func:`flatten_gradients`; gradients become views of ``flat`` where the dtype allows."""
    offset = 0
    for parameter in parameters:
        part = flat[offset : offset + parameter.numel()].view_as(parameter)
        parameter.grad = part.to(parameter.dtype)
        offset += parameter.numel()
