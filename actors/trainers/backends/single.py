"""One process, no communication: the backend of inline runs and the oracle of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actors.trainers.backends.base import Edge, backward, flatten_gradients, scatter_gradients


class SingleBackend:
    """Weights and gradients in one place."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(self, module: nn.Module) -> None:
        """Put the module where it is trained."""
        module.to(self.device)

    def backward(self, loss: Tensor | None, edges: Sequence[Edge] = ()) -> None:
        """Accumulate the gradient of a loss and of what came back on edges."""
        backward(loss, edges)

    def reduce(self, parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
        """Complete the gradients; returns ``extra`` summed over ranks. Nobody else here.

        A parameter that took no part gets a zero gradient, as it would among several ranks.
        """
        scatter_gradients(flatten_gradients(parameters), parameters)
        return extra

    def exchange(self, message: Any) -> list[Any]:
        """Every rank's message, in rank order."""
        return [message]
