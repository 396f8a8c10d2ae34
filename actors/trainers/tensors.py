"""Which tensors of a module are trained and saved; tensors that are spread over ranks, made whole and spread again."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.errors import WeightsError

#: Elements of the buffer in which ZeRO collects gradients before it sums them over the ranks.
_BUCKET = 10**8

#: Bytes of a tensor from which on it is worth asking the allocator for what it has freed.
_WORTH = 2**20


def bucket_elements(trained: int) -> int:
    """Elements of ZeRO's buffer of gradients, when ``trained`` parameters have some."""
    return max(1, min(trained, _BUCKET))


def count(tensors: Iterable[Tensor]) -> int:
    """Elements of tensors, whole also where stage 3 of ZeRO holds parts."""
    return sum(int(getattr(tensor, "ds_numel", tensor.numel())) for tensor in tensors)


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
        target.copy_(distribute_tensor(value.to(mesh.device_type), mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(value)


@dataclass(frozen=True)
class OnMeta:
    """A parameter or buffer that has no memory yet, and every place of the module that holds it (tied weights)."""

    name: str
    """Its first name, as in ``weights`` of :meth:`actors.trainers.backends.base.Backend.prepare`."""
    tensor: Tensor
    homes: tuple[tuple[nn.Module, str], ...]

    def replace(self, value: Tensor) -> Tensor:
        """Put ``value`` in all places; what it is there (a parameter stays one, trained or frozen as it was)."""
        parameter = isinstance(self.tensor, nn.Parameter)
        made = nn.Parameter(value, requires_grad=self.tensor.requires_grad) if parameter else value
        for owner, attribute in self.homes:
            setattr(owner, attribute, made)
        return made


def on_meta(module: nn.Module) -> Iterator[OnMeta]:
    """What of a module lies on the meta device, each once, in the module's order."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[int, tuple[str, Tensor]] = {}
    for path, owner in module.named_modules():
        for attribute, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and tensor.is_meta:
                first.setdefault(id(tensor), (f"{path}.{attribute}" if path else attribute, tensor))
                homes.setdefault(id(tensor), []).append((owner, attribute))
    for key, (name, tensor) in first.items():
        yield OnMeta(name, tensor, tuple(homes[key]))


def stored_value(found: OnMeta, weights: Mapping[str, Tensor]) -> Tensor:
    """The value of ``found`` among stored weights, where an adapted layer has its old name.

    WeightsError where there is none, or one of another shape.
    """
    name = found.name.replace(".base_layer.", ".")
    if name not in weights:
        raise WeightsError(f"{name} was built without memory, and the weights that it starts from do not hold it")
    value = weights[name]
    if value.shape != found.tensor.shape:
        raise WeightsError(f"{name}: expected {tuple(found.tensor.shape)}, got {tuple(value.shape)} in the weights")
    return value


def fill(module: nn.Module, weights: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
    """:func:`filled` for all that a module holds on meta."""
    for found in on_meta(module):
        filled(found, weights, torch.device(device))
        give_back(found.tensor.nbytes)


@torch.no_grad()
def filled(found: OnMeta, weights: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Make what lies on meta on ``device``, with its stored value; of a DTensor this rank's part alone."""
    made = found.replace(torch.empty_like(found.tensor, device=device, requires_grad=False))
    assign(made, stored_value(found, weights))
    return made


def give_back(freed: int) -> None:
    """After a tensor of ``freed`` bytes was cut: the system gets back what of it the allocator would keep.

    glibc serves what has up to 32 MiB from its heap, once something of that size was freed. Whole tensors that come and
    go between parts that stay leave gaps there that the next ones do not fit in, a quarter of a model in the end.
    """
    trim = _trim()
    if trim is not None and freed >= _WORTH:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], object] | None:
    """The function ``malloc_trim`` of glibc, which returns every free page; None where the C library is another."""
    found: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
