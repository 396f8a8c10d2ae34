"""One process, no communication: the backend of inline runs, the oracle of the others, and what they build on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actors.trainers.backends.base import Edge, backward
from actors.trainers.optim import build_optimizer, clip, gradient_norm, set_rate, split
from actors.trainers.tensors import assign, fill, local, saved_tensors, trainable, whole
from configs.schema import TrainerConfig
from models.spec import RoleSpec


class SingleBackend:
    """Weights, gradients and optimiser in one place."""

    rank = 0
    world_size = 1
    sharded = False
    loss_scale = 1.0

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._parameters: dict[str, nn.Parameter] = {}
        self._clipped: list[nn.Parameter] = []
        self._unclipped: list[nn.Parameter] = []

    def prepare(
        self, module: nn.Module, role: RoleSpec, config: TrainerConfig, weights: Mapping[str, Tensor] | None = None
    ) -> nn.Module:
        """Put the module where it is trained and make its optimiser."""
        self._module = self._place(module, role, weights or {})
        self._parameters = trainable(self._module)
        self._clipped, self._unclipped = split(self._parameters, role.unclipped)
        self._optimizer = build_optimizer(self._module, config, role.no_decay, role.unclipped)
        return self._module

    def _place(self, module: nn.Module, role: RoleSpec, weights: Mapping[str, Tensor]) -> nn.Module:  # noqa: ARG002
        fill(module, weights, self.device)
        return module.to(self.device)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor | None, edges: Sequence[Edge] = ()) -> None:
        """Accumulate the gradient of a loss and of what came back on edges."""
        backward(loss, edges)

    def reduce(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Complete the gradients; returns ``extra`` summed over ranks, and the norm. Nobody else here.

        A parameter that took no part gets a zero gradient, as it would among several ranks.
        """
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return extra, gradient_norm(self._clipped, self._unclipped)

    def update(self, rate: float, norm: Tensor, limit: float) -> None:
        """Clip and step."""
        set_rate(self._optimizer, rate)
        clip(self._clipped, norm, limit)
        self._optimizer.step()

    def exchange(self, message: Any) -> list[Any]:
        """Every rank's message, in rank order."""
        return [message]

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters and buffers, whole, on CPU of rank 0."""
        return whole(saved_tensors(self._module), keep=self.rank == 0)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's moments as ``<parameter>/<field>``, whole, on CPU of rank 0."""
        state = self._optimizer.state
        named = {
            f"{name}/{field}": value
            for name, parameter in self._parameters.items()
            for field, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return whole(named, keep=self.rank == 0)

    def close(self) -> None:
        """Let go of the module and its optimiser."""
        self._parameters, self._clipped, self._unclipped = {}, [], []
        self.__dict__.pop("_module", None)
        self.__dict__.pop("_optimizer", None)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`weights` gave."""
        for name, target in saved_tensors(self._module).items():
            assign(target, tensors[name])

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`optimizer_state` gave."""
        self._optimizer.state.clear()
        for key, tensor in tensors.items():
            name, field = key.rsplit("/", 1)
            parameter = self._parameters[name]
            if tensor.ndim:
                value = torch.zeros_like(parameter, dtype=tensor.dtype)
                assign(value, tensor)
            else:  # Adam's step counter stays on CPU unless the optimiser is fused
                value = local(tensor).clone()
            self._optimizer.state[parameter][field] = value
