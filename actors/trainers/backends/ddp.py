"""Data parallel over a torch process group: every backward is local, one all-reduce a step.

torch's DistributedDataParallel is not used on purpose: its reducer fires in the first backward, which is silently
wrong when forwards run ahead of backwards or when a step holds micro-batches of two kinds. Summing once, after the
last backward, is right in every order; and since a loss is a share of the global mean already, the sum is the
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.trainers.backends.base import Edge, backward, flatten_gradients, scatter_gradients


class DdpBackend:
    """Whole weights on every rank of ``group`` (None: the default group, which must be initialised)."""

    def __init__(self, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None) -> None:
        self.device = torch.device(device)
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def prepare(self, module: nn.Module) -> None:
        """Move the module to the device and copy the weights and buffers of rank 0 to all."""
        module.to(self.device)
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, group=self.group, group_src=0)

    def backward(self, loss: Tensor | None, edges: Sequence[Edge] = ()) -> None:
        """Accumulate locally."""
        backward(loss, edges)

    def reduce(self, parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
        """Sum gradients and ``extra`` over the ranks in one all-reduce.

        ``extra`` travels as float32 behind the gradients. A rank's own numbers stay exact with one rank.
        """
        flat = flatten_gradients(parameters)
        if self.world_size == 1:
            scatter_gradients(flat, parameters)
            return extra
        message = torch.cat([flat, extra.to(flat)])
        dist.all_reduce(message, group=self.group)
        scatter_gradients(message[: flat.numel()], parameters)
        return message[flat.numel() :].double().cpu()

    def exchange(self, message: Any) -> list[Any]:
        """Every rank's message, in rank order."""
        if self.world_size == 1:
            return [message]
        messages: list[Any] = [None] * self.world_size
        dist.all_gather_object(messages, message, group=self.group)
        return messages
