"""Data parallel over a torch process group: every backward is local, one all-reduce a step.

torch's DistributedDataParallel is not used on purpose: its reducer fires in the first backward, which is silently
wrong when forwards run ahead of backwards or when a step holds micro-batches of two kinds. Summing once, after the
last backward, is right in every order; and since a loss is a share of the global mean already, the sum is the
gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.trainers.backends.base import flatten_gradients, scatter_gradients
from actors.trainers.backends.groups import close_groups
from actors.trainers.backends.single import SingleBackend
from actors.trainers.optim import gradient_norm
from models.spec import RoleSpec


class DdpBackend(SingleBackend):
    """Whole weights on every rank of ``group`` (None: the default group, which must be initialised)."""

    def __init__(self, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None) -> None:
        super().__init__(device)
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def _place(self, module: nn.Module, role: RoleSpec, weights: Mapping[str, Tensor]) -> nn.Module:
        """Move the module to the device and copy the weights and buffers of rank 0 to all."""
        self._share(module)
        return super()._place(module, role, weights)

    def _share(self, module: nn.Module) -> None:
        """Move what is not on meta to the device and give every rank rank 0's; the rest all ranks read themselves."""
        module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                if not tensor.is_meta:
                    dist.broadcast(tensor, group=self.group, group_src=0)

    def reduce(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Sum gradients and ``extra`` over the ranks in one all-reduce; returns the sum of ``extra``, and the norm.

        ``extra`` travels as float32 behind the gradients. A rank's own numbers stay exact with one rank.
        """
        if self.world_size == 1:
            return super().reduce(extra)
        parameters = list(self._parameters.values())
        message = flatten_gradients(parameters, extra)
        dist.all_reduce(message, group=self.group)
        scatter_gradients(message, parameters)
        return message[len(message) - len(extra) :].double().cpu(), gradient_norm(self._clipped, self._unclipped)

    def close(self) -> None:
        """Let go of the module, and end the default group, whoever made it; a group of one's own stays."""
        super().close()
        if self.group is None:
            close_groups()

    def exchange(self, message: Any) -> list[Any]:
        """Every rank's message, in rank order."""
        if self.world_size == 1:
            return [message]
        messages: list[Any] = [None] * self.world_size
        dist.all_gather_object(messages, message, group=self.group)
        return messages
