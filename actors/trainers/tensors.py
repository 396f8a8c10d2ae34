"""Which tensors of a module are trained and saved; tensors that are spread over ranks, made whole and spread again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name, in a fixed order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module: trained parameters and persistent buffers; frozen weights are not saved.

    The tensors are the module's own, so they can be written to; those of a sharded module are DTensors. A weight that
    has several names (tied embeddings) is there once.
    """
    names = trainable(module).keys()
    state = module.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if name in names or not isinstance(t, nn.Parameter)}


def whole(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Copies on CPU of whole tensors. Collective where there are DTensors: every rank names the same ones.

    With ``keep`` false a rank takes part and keeps nothing, so that ranks of one machine do not each hold a copy.
    """
    state = {}
    for name, tensor in tensors.items():
        found = local(tensor, full=True)
        if keep:
            state[name] = found.detach().cpu().contiguous().clone()
    return state


def local(tensor: Tensor, *, full: bool = False) -> Tensor:
    """A plain tensor: this rank's part of a DTensor (``full``: all of it, collective); a plain one as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor() if full else tensor.to_local()
    return tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into ``target``; of a DTensor each rank takes its part. ``value`` is equal on all ranks."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        # src_data_rank=None: every rank has the value already, so nothing is sent.
        target.copy_(
            distribute_tensor(value.to(mesh.device_type, target.dtype), mesh, target.placements, src_data_rank=None)
        )
    else:
        target.copy_(value)
