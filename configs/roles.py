"""The roles that a recipe trains, and the configuration as one of them sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from configs.schema import RoleOverrides, RunConfig

#: Roles that a recipe trains, each a worker group of ``cluster.roles``.
ROLES: Mapping[str, tuple[str, ...]] = {
    "probe": ("trainer",),
    "uniugg_encoder": ("trainer",),
    "uniugg_vae": ("trainer",),
    "uniugg_align": ("llm",),
    "uniugg_joint": ("llm", "diffusion"),
    "uniugg_finetune": ("llm", "diffusion"),
    "uniugg_direct": ("llm",),
    "spa3r_pretrain": ("trainer",),
    "spa3_vlm": ("vlm",),
}

#: Settings of ``trainer`` that all roles of a run share: they decide the steps, or are read by the driver.
SHARED_TRAINER = frozenset(
    {"steps", "micro_batch", "accumulation", "checkpoint_every", "keep_checkpoints", "validate_every", "log_every",
     "resume", "max_skipped_steps", "lookahead_steps", "best_metric", "best_mode"}
)  # fmt: skip


def role_config(config: RunConfig, role: str) -> RunConfig:
    """``config`` with ``roles.<role>`` applied to ``trainer``, ``backend`` and ``peft``. Roles not named share all."""
    given = config.roles.get(role, RoleOverrides())
    backend = dataclasses.replace(config.backend, name=given.backend or config.backend.name)
    peft = dataclasses.replace(
        config.peft, method=given.peft or config.peft.method, targets=given.targets or config.peft.targets
    )
    trainer = dataclasses.replace(config.trainer, **given.trainer)
    return dataclasses.replace(config, backend=backend, peft=peft, trainer=trainer)
