"""Fully sharded data parallel (torch's ``fully_shard``): weights, gradients and moments lie in parts on the ranks.

Every block that the role names is gathered by itself, the rest together. Each backward reduces and scatters at once,
which is right in every order of forwards and backwards and of kinds of micro-batch. Zhao et al. 2023, "PyTorch FSDP".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from actors.trainers.backends.ddp import DdpBackend
from actors.trainers.optim import gradient_norm
from actors.trainers.tensors import fill
from models.spec import RoleSpec


class Fsdp2Backend(DdpBackend):
    """Weights in parts over ``group`` (None: the default group, which must be initialised)."""

    sharded = True

    def __init__(
        self,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
        *,
        reshard_after_forward: bool = True,
    ) -> None:
        super().__init__(device, group)
        self._reshard = reshard_after_forward

    def _place(self, module: nn.Module, role: RoleSpec, weights: Mapping[str, Tensor]) -> nn.Module:
        """Give every rank the weights of rank 0, then keep this rank's part of each; on meta they are cut first."""
        self._share(module)
        mesh = self._mesh()
        # Inner blocks first: what a block has sharded is no longer its parent's to shard.
        for child in reversed(list(module.modules())):
            if type(child).__name__ in role.checkpointed and child is not module:
                fully_shard(child, mesh=mesh, reshard_after_forward=self._reshard)
        fully_shard(module, mesh=mesh, reshard_after_forward=self._reshard)
        for child in module.modules():
            if isinstance(child, FSDPModule):
                # Losses are shares of the global mean already: the sum over the ranks is the gradient. A plain sum,
                # because gloo has no operation that scales as it adds.
                child.set_gradient_divide_factor(1.0)
                child.set_force_sum_reduction_for_comms(True)
        fill(module, weights, self.device)
        return module

    def _mesh(self) -> DeviceMesh:
        if self.group is None:
            self._over = init_device_mesh(self.device.type, (self.world_size,))
        else:
            self._over = DeviceMesh.from_group(self.group, self.device.type)
        return self._over

    def close(self) -> None:
        """As others do; the mesh forgets the groups too, for torch keeps meshes in its caches."""
        if "_over" in self.__dict__:
            getattr(self._over, "_pg_registry", {}).clear()
            del self._over
        super().close()

    def reduce(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Sum ``extra``; the gradients were summed by every backward. Returns that sum, and the norm."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size > 1:
            message = extra.to(self.device)
            dist.all_reduce(message, group=self.group)
            extra = message.cpu()
        return extra, gradient_norm(self._clipped, self._unclipped)
