"""Judging Spa3R on held-out rooms: features at views that it has not seen, beside what copying and averaging give.

All predictions are compared patch by patch, by cosine. The baselines know what the model knows: the features of the
context. *Copying* takes the same patch of the nearest context view, by VGGT's own cameras; the *scene mean* is the
context's mean feature. Depth is in VGGT's unit, read by the probe, beside the mean depth of the training split and of
the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.recipes.base import Built, LossTally, Recipe, every_batch, kept_rows, row
from actors.recipes.pictures import Album
from actors.recipes.spa3r_pictures import Shown, draw_field
from models.encoders.vggt.poses import extrinsics_intrinsics
from models.metrics.means import Means
from models.spa3r.losses import resize_features
from models.spa3r.model import GEO, Spa3R
from models.spa3r.spec import COLUMNS, VIEW_SET, pick, rows_of
from services.contracts import PlanSample, Split
from services.errors import DataError
from services.streams.inputs import JUDGE
from services.telemetry import events

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

EXAMPLES = 4
MODEL, COPY, SCENE = "model", "nearest context view", "scene mean"
MEAN_DEPTH, CONTEXT_DEPTH = "mean depth", "mean depth of the context"
SURVEYED = 512
"""Training view sets that the mean depth is taken of."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A batch as it is judged: T target views of B sets, features flat over n patches."""

    truth: Mapping[str, Tensor]
    """Target -> (B, T, n, C)."""
    guesses: Mapping[str, Mapping[str, Tensor]]
    """Target -> who predicts -> the same shape, or one that broadcasts to it."""
    depth: Tensor | None
    """(B, T, n), VGGT's."""
    depths: Mapping[str, Tensor]
    """Who predicts -> (B, T, n), or a shape that broadcasts to it."""
    contexts: int
    """Context views of a set."""
    targets: Tensor
    """Places (B, T) of the target views."""


@torch.no_grad()
def look(module: Spa3R, batch: Mapping[str, Any], names: Sequence[str]) -> Seen:
    """Predictions of the model and of the baselines at the target views of a batch whose samples all count."""
    tokens, roles = batch["tokens"][:, :, -1], batch["roles"].bool()
    grid = (tokens.shape[2], tokens.shape[3])
    context, targets = rows_of(~roles), rows_of(roles)
    features = tokens.flatten(2, 3).float()
    known = pick(features, context)
    if "context_tokens" in batch:
        known = batch["context_tokens"][:, :, -1].flatten(2, 3).float()
    field_ = module(known, pick(batch["pose"], targets), grid)
    nearest = nearest_context(batch["pose"].float(), context, targets, tuple(batch["size"][0].tolist()))
    truth, guesses = {}, {}
    for name in names:
        if name == GEO:
            seen, true = known, pick(features, targets)
        else:
            column = batch[COLUMNS[name]]
            seen = resize_features(pick(column, context)[:, :, -1], grid).float()
            true = resize_features(pick(column, targets)[:, :, -1], grid).float()
        truth[name] = true
        guesses[name] = {
            MODEL: field_.predicted[name].float(),
            COPY: pick(seen, nearest),
            SCENE: seen.mean((1, 2), keepdim=True),
        }
    depth, depths = None, {}
    if field_.depth is not None:
        depth = pick(batch["depth"], targets).flatten(2).float()
        context_depth = pick(batch["depth"], context).float()
        depths = {MODEL: field_.depth.float(), CONTEXT_DEPTH: context_depth.mean((1, 2, 3))[:, None, None]}
    return Seen(truth=truth, guesses=guesses, depth=depth, depths=depths, contexts=context.shape[1], targets=targets)


def nearest_context(pose: Tensor, context: Tensor, targets: Tensor, size: tuple[int, ...]) -> Tensor:
    """For each target view (B, T) the place among the context views (B, T) of the one that looks most alike.

    By VGGT's cameras (B, V, 9): the distance of the centres, in units of the set's largest, plus the angle between the
    optical axes in half turns, so that both count alike.
    """
    world_to_camera, _ = extrinsics_intrinsics(pose, (size[0], size[1]))
    rotation, translation = world_to_camera[..., :3], world_to_camera[..., 3]
    centres = -(rotation.mT @ translation[..., None])[..., 0]
    axes = F.normalize(rotation[..., 2, :], dim=-1)
    apart = torch.cdist(pick(centres, targets), pick(centres, context))
    spread = torch.cdist(centres, centres).flatten(1).max(1).values.clamp(min=1e-6)
    cosine = (pick(axes, targets) @ pick(axes, context).mT).clamp(-1, 1)
    return (apart / spread[:, None, None] + cosine.acos() / torch.pi).argmin(-1)


@dataclass(kw_only=True)
class FieldScores:
    """Cosines and depth errors over view sets, as means; by the number of context views too."""

    means: Means = field(default_factory=Means)
    by_context: dict[int, Means] = field(default_factory=dict)
    sets: dict[int, int] = field(default_factory=dict)

    def update(self, seen: Seen, mean_depth: float | None) -> None:
        """Add a batch."""
        found: dict[str, Tensor] = {}
        for name, true in seen.truth.items():
            for who, guess in seen.guesses[name].items():
                cosine = F.cosine_similarity(guess.expand_as(true), true, dim=-1)
                found[f"{name}/{who}"] = cosine.flatten(1).mean(1)
        if seen.depth is not None:
            depths = dict(seen.depths)
            if mean_depth is not None:
                depths[MEAN_DEPTH] = torch.full_like(seen.depth, mean_depth)
            for who, guess in depths.items():
                error = (guess.expand_as(seen.depth) - seen.depth).abs() / seen.depth.clamp(min=1e-6)
                found[f"depth/{who}"] = error.flatten(1).mean(1)
        for means in (self.means, self.by_context.setdefault(seen.contexts, Means())):
            means.update(found)
        self.sets[seen.contexts] = self.sets.get(seen.contexts, 0) + len(next(iter(found.values())))

    def rows(self) -> dict[str, dict[str, Any]]:
        """The metrics of an evaluation."""
        found = self.means.compute()
        metrics = {}
        for name in [key.split("/")[0] for key in found if key.endswith(f"/{MODEL}") and not key.startswith("depth/")]:
            mine, copied, mean = (found[f"{name}/{who}"] for who in (MODEL, COPY, SCENE))
            metrics[f"{name}/cosine"] = row(mine, copied, COPY, "higher", **{SCENE: mean})
        if f"depth/{MODEL}" in found:
            also = {CONTEXT_DEPTH: found[f"depth/{CONTEXT_DEPTH}"]}
            baseline = found.get(f"depth/{MEAN_DEPTH}")
            metrics["depth_probe/abs_rel"] = row(found[f"depth/{MODEL}"], baseline, MEAN_DEPTH, "lower", **also)
        return metrics

    def table(self, album: Album) -> None:
        """Cosines by the number of context views."""
        if len(self.by_context) < 2:
            return
        computed = {contexts: means.compute() for contexts, means in sorted(self.by_context.items())}
        columns = [key for key in next(iter(computed.values())) if key.split("/")[0] != "depth"]
        album.table(
            "By the number of context views",
            "Cosine at unseen views. Sets with more views also stretch further, so the baselines belong beside it.",
            ["context views", "view sets", *columns],
            [[contexts, self.sets[contexts], *(found[key] for key in columns)] for contexts, found in computed.items()],
        )


def judge(recipe: Recipe, built: Built, feed: Feed, folder: Path, *, split: Split, device: str) -> dict[str, Any]:
    """Judge the model on every view set of ``split``; pictures and tables go into ``folder`` for the report."""
    module = built.module
    assert isinstance(module, Spa3R), "the recipe makes a Spa3R"
    names = recipe.config.recipe.spa3r.predict
    album, scores, tally = Album(folder), FieldScores(), LossTally(weights=recipe.loss_weights(built.spec.name))
    with closing(feed.for_role(JUDGE)) as judged:
        mean_depth = _mean_depth(judged) if recipe.config.recipe.spa3r.depth_probe else None
        shown: list[Shown] = []
        with events.span("evaluate", split=split.value):
            for batch, samples in every_batch(judged, split, VIEW_SET):
                kept, own = counted(batch, samples, device)
                if not own:
                    continue
                seen = look(module, kept, names)
                scores.update(seen, mean_depth)
                tally.update(module, built.spec, kept, {})
                shown += Shown.of(kept, seen, own)[: EXAMPLES - len(shown)]
    if not scores.sets:
        raise DataError(
            f"the {split.value} split has no view set that can be read; check the data with `loom3d data check`, and "
            "recipe.view_set.views against the number of views of its scenes"
        )
    for example in shown:
        draw_field(album, example)
    scores.table(album)
    album.save()
    losses = {name: row(value, None, "", "lower") for name, value in tally.compute().items()}
    return {"samples": sum(scores.sets.values()), "metrics": scores.rows() | losses}


def counted(
    batch: Mapping[str, Any], samples: Sequence[PlanSample], device: str
) -> tuple[dict[str, Any], list[PlanSample]]:
    """The samples of a batch that count, on ``device``."""
    keep = batch["weight"] > 0
    kept = kept_rows(batch, keep)
    on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kept.items()}
    return on_device, [sample for sample, wanted in zip(samples, keep.tolist(), strict=True) if wanted]


def _mean_depth(feed: Feed) -> float:
    """Mean of VGGT's depth over the first training view sets."""
    total, count = 0.0, 0
    seen = 0
    for batch, samples in every_batch(feed, Split.TRAIN, VIEW_SET):
        kept, _ = counted(batch, samples, "cpu")
        total += float(kept["depth"].double().sum())
        count += kept["depth"].numel()
        seen += len(kept["depth"])
        if seen >= SURVEYED:
            break
    return total / max(1, count)
