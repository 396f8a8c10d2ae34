"""What a trainer sees of a model: roles, the edges between them, and per role one step function.

A *role* is a part of a model that one worker group trains. A model of one role has no edges. The same
description serves a run in one process, where edges are function calls, and a split run, where they are messages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Any]
"""Collated columns by name; tensors have the samples first.

Always there: ``kind`` (str, the kind of the micro-batch), ``id`` (list of str), ``weight`` float32 (B,), 0 for a
broken sample or a filler, and ``draw`` int64 (B,), the key of the random draws of each sample at this step
(see :mod:`models.draws`).
"""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape of one sample's tensor and its dtype. None marks an axis that is ragged."""

    shape: tuple[int | None, ...]
    dtype: str
    exact: bool = False
    """Whether a cache must give it back bit for bit, as cameras and depths in metres: a lossy codec leaves it alone."""


@dataclass(frozen=True, kw_only=True)
class EdgeTensor:
    """One named tensor that crosses an edge; ``gradient`` says whether one returns."""

    name: str
    spec: TensorSpec
    gradient: bool = True


@dataclass(frozen=True, kw_only=True)
class EdgeSpec:
    """An ordered list of tensors from role ``source`` to role ``target``, for micro-batches of ``kinds``."""

    source: str
    target: str
    tensors: tuple[EdgeTensor, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one micro-batch gave: loss terms as **sums** over this rank's elements, and what leaves on the edges.

    The trainer divides each sum by the count over the global batch of the whole step, so that the gradient does
    not depend on how the batch is split over micro-batches and ranks.
    """

    sums: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """How one role is trained."""

    name: str
    step: Callable[[nn.Module, Batch, Mapping[str, Tensor]], StepOutput]
    """(module, batch, tensors received) -> sums of the loss terms and the tensors sent.

    It calls the module itself, once, and never a child of it: what shards weights hooks that call. In every
    micro-batch every trained parameter takes part in the forward pass, with weight zero where the kind does not use it.
    A sample of weight 0 adds nothing to any sum.
    """
    counts: Callable[[Batch], dict[str, float]]
    """Elements per loss term of a batch, from its targets and ``weight`` column alone: known before any forward."""
    kinds: tuple[str, ...] = ()
    """Kinds of micro-batch that this role takes part in; () is all of them."""
    no_decay: tuple[str, ...] = ("bias", "norm")
    """Substrings of parameter names that get no weight decay."""
    unclipped: tuple[str, ...] = ()
    """Globs of parameters (of a probe) whose gradient is neither part of the norm that is clipped nor scaled by it."""
    lora_targets: tuple[str, ...] = ()
    """Last parts of the names of the layers that get a low-rank update, where a run asks for such."""
    heads: tuple[str, ...] = ()
    """Globs of the parameters that are trained whole beside low-rank updates: new layers beside a pretrained network.

    () are all children of the module that hold no update.
    """
    checkpointed: tuple[str, ...] = ()
    """Class names of the blocks that activation checkpointing wraps, and that FSDP2 shards one by one."""

    def bind(self, **settings: Any) -> RoleSpec:
        """The same role with keyword arguments (an objective's weights, ...) given to ``step`` and ``counts``."""
        return replace(
            self, step=functools.partial(self.step, **settings), counts=functools.partial(self.counts, **settings)
        )

    def takes_part(self, kind: str) -> bool:
        """Whether this role has work in micro-batches of ``kind``."""
        return not self.kinds or kind in self.kinds


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A named model: how to build it, its roles and edges, and where published weights go."""

    name: str
    build: Callable[..., nn.Module]
    """Returns a module; of a model of several roles, one child a role. Works under ``torch.device("meta")``."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``build`` for this size; ``models.build(name, **overrides)`` puts overrides on top."""
    roles: tuple[RoleSpec, ...] = ()
    edges: tuple[EdgeSpec, ...] = ()
    to_published: Callable[[nn.Module], dict[str, str]] | None = None
    """Our parameter name -> published name; None where they are the same."""
    doc: str = ""

    def role(self, name: str) -> RoleSpec:
        """The role called ``name``; KeyError lists the names there are."""
        for role in self.roles:
            if role.name == name:
                return role
        raise KeyError(f"{self.name} has no role {name!r}; it has {[r.name for r in self.roles]}")
