"""Spa3R as a trainer sees it: one role, micro-batches of view sets; and its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.spa3r.losses import TARGET_VIEWS, FieldObjective, field_counts, field_sums, resize_features
from models.spa3r.model import CLIP, GEO, SEM, Spa3R
from models.spa3r.transformer import BLOCK
from models.spec import Batch, ModelSpec, RoleSpec, StepOutput

VIEW_SET = "view_set"
COLUMNS: Mapping[str, str] = {SEM: "semantic", CLIP: "clip"}
"""Target -> the column that holds it, (B, V, 1, h', w', C); ``geo`` is the column ``tokens`` itself."""


def step(module: nn.Module, batch: Batch, received: Mapping[str, Tensor], *, objective: FieldObjective) -> StepOutput:
    """Forward and loss sums of one micro-batch of view sets.

    The context is read, and the cameras of the views that are compared are decoded; views never attend to each other,
    so the others need not be.
    """
    assert not received, "the pre-training has no edges"
    tokens, roles = _checked(batch)
    grid = (tokens.shape[2], tokens.shape[3])
    features = tokens.flatten(2, 3)
    views = compared_views(roles, objective)
    context = batch.get("context_tokens")
    context = pick(features, rows_of(~roles)) if context is None else context[:, :, -1].flatten(2, 3)
    field = module(context, pick(batch["pose"], views), grid)
    targets = {GEO: pick(features, views)} if GEO in objective.targets else {}
    for name, column in COLUMNS.items():
        if name in objective.targets:
            targets[name] = resize_features(pick(_column(batch, column), views)[:, :, -1], grid)
    depth = pick(_column(batch, "depth"), views).flatten(2) if objective.depth_probe else None
    return StepOutput(sums=field_sums(field, targets, depth, batch["weight"], objective))


def counts(batch: Batch, *, objective: FieldObjective) -> dict[str, float]:
    """Patches of every term of a batch."""
    tokens, roles = _checked(batch)
    views = compared_views(roles, objective).shape[1]
    return field_counts(batch["weight"], views, tokens.shape[2] * tokens.shape[3], objective)


def compared_views(roles: Tensor, objective: FieldObjective) -> Tensor:
    """Indices (B, V') of the views that are decoded and compared, of ``roles`` (B, V), True for a target."""
    if objective.loss_views == TARGET_VIEWS:
        return rows_of(roles)
    return torch.arange(roles.shape[1], device=roles.device).expand(roles.shape)


def rows_of(chosen: Tensor) -> Tensor:
    """Indices (B, k) of the True entries of (B, V), of which every row has k >= 1. ModelError otherwise."""
    counted = chosen.sum(1)
    found = sorted(set(counted.tolist()))
    if len(found) != 1 or found[0] < 1:
        raise ModelError(
            f"every view set of a micro-batch needs as many views of each role, and at least one; got {found}; check "
            "the views of the plan and recipe.spa3r.mask_ratio"
        )
    return chosen.nonzero()[:, 1].unflatten(0, (len(chosen), -1))


def pick(column: Tensor, views: Tensor) -> Tensor:
    """The views (B, k) of a column (B, V, ...) -> (B, k, ...)."""
    samples = torch.arange(len(column), device=column.device)[:, None]
    return column[samples, views.to(column.device)]


def _checked(batch: Batch) -> tuple[Tensor, Tensor]:
    """Features (B, V, h, w, C) of the last layer and roles (B, V)."""
    if batch["kind"] != VIEW_SET:
        raise ModelError(
            f"spa3r_pretrain takes micro-batches of {VIEW_SET}, got {batch['kind']!r}; check recipe.quotas"
        )
    tokens, roles = batch["tokens"], batch["roles"].bool()
    if tokens.shape[:2] != roles.shape or roles.shape[1] < 2:
        raise ModelError(
            f"a view set has at least two views with a role each, got tokens {tuple(tokens.shape)} and roles "
            f"{tuple(roles.shape)}"
        )
    if roles[:, 0].any():
        raise ModelError("the first view of a set is always context: it is the frame of VGGT's poses")
    return tokens[:, :, -1], roles


def _column(batch: Batch, name: str) -> Tensor:
    if name not in batch:
        raise ModelError(f"the batch has no column {name!r}, which the objective needs; it has {sorted(batch)}")
    column: Tensor = batch[name]
    return column


TRAINER = RoleSpec(
    name="trainer",
    step=step,  # type: ignore[arg-type]  # takes its objective, which a recipe binds
    counts=counts,  # type: ignore[arg-type]
    kinds=(VIEW_SET,),
    no_decay=("bias", "norm", "query_embed", "register_tokens"),
    unclipped=("depth_prob.*",),
    lora_targets=("qkv", "proj", "fc1", "fc2"),
    checkpointed=(BLOCK,),
)

SIZES: Mapping[str, Mapping[str, Any]] = {
    "base": {
        "channels": 2048, "width": 768, "heads": 12, "encoder_layers": 6, "decoder_layers": 6, "queries": 256,
        "targets": {GEO: 2048, SEM: 1024},
    },
    "small": {
        "channels": 768, "width": 384, "heads": 6, "encoder_layers": 4, "decoder_layers": 4, "queries": 64,
        "targets": {GEO: 768, SEM: 384},
    },
    "tiny": {
        "channels": 128, "width": 96, "heads": 3, "encoder_layers": 2, "decoder_layers": 2, "queries": 16,
        "targets": {GEO: 128, SEM: 64},
    },
}  # fmt: skip
_SHARED: Mapping[str, Any] = {
    "registers": 4, "mlp_ratio": 4.0, "camera": "prope", "depth_probe": True, "rope_base": 100.0,
}  # fmt: skip


def _size(size: str) -> ModelSpec:
    # Channels and targets follow from the encoders of a run; what stands here is what the size is meant for.
    return ModelSpec(
        name=f"spa3r-{size}",
        build=Spa3R,
        defaults={**_SHARED, **SIZES[size]},
        roles=(TRAINER,),
        doc="Latents of a scene from a few views' features, and the features that they predict at other cameras.",
    )


SPA3R_BASE, SPA3R_SMALL, SPA3R_TINY = (_size(size) for size in SIZES)
