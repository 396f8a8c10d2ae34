"""Activation checkpointing: blocks keep their inputs only and run forward again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". The non-reentrant form, which works with several
backward passes in flight and with sharded parameters.
"""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from configs import ConfigError
from models.spec import RoleSpec


def checkpoint_activations(module: nn.Module, role: RoleSpec) -> int:
    """Make the blocks that ``role.checkpointed`` names (by class) recompute; returns how many there are.

    Names of parameters stay as they are. ConfigError when the model has no such block.
    """
    blocks = [child for child in module.modules() if type(child).__name__ in role.checkpointed]
    if not blocks:
        raise ConfigError(
            f"trainer.activation_checkpointing=true: role {role.name!r} has no blocks to recompute "
            f"(it names {list(role.checkpointed)}); set it to false"
        )
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)
