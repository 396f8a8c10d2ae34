"""Training steps without memory: tensors that have shapes only, beside small ones that decide what is computed.

Networks, features and pictures are fake tensors (shapes and a device, no memory; unlike those on the meta device,
autocast acts on them). Where the result decides a shape or a branch - placeholders among token ids, which samples
count, keys of draws - the tensors are real and small, and operations on real tensors alone are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_INDEXED = frozenset({aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default})


class _RealControl(TorchDispatchMode):
    """Computes operations on real tensors; a real mask that indexes a fake tensor becomes the places it selects."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            if func in _INDEXED:
                args = (args[0], _places(args[1]), *args[2:])
            return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices with the places of a mask's true elements instead of the mask: their number is known."""
    found: list[Tensor | None] = []
    with _disable_current_modes():
        for index in indices:
            if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
                found += index.nonzero(as_tuple=True)
            else:
                found.append(index)
    return found


class _OnceDrawn(TorchDispatchMode):
    """Initialisers that draw again what lies outside their bounds ask whether any does: without numbers, none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False
        return func(*args, **(kwargs or {}))


@contextmanager
def building() -> Iterator[None]:
    """Within it networks are built without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), _OnceDrawn():
        yield


@contextmanager
def stepping(module: nn.Module) -> Iterator[None]:
    """Within it a step of ``module`` runs on the fake and real tensors of a batch; of a real module as ever."""
    modes = {p.fake_mode for p in module.parameters() if isinstance(p, FakeTensor)}
    if not modes:
        yield
        return
    (mode,) = modes
    with mode, _RealControl():
        yield
