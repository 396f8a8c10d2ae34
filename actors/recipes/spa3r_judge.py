"""Judging Spa3R on held-out rooms: features at views that it has not seen, beside what copying and averaging give.

All predictions are compared patch by patch, by cosine. The baselines know what the model knows: the features of the
context. *Copying* takes the same patch of the nearest context view, by VGGT's own cameras; the *scene mean* is the
context's mean feature. Two more say what can be known without the scene: the *mean of training views* is that of each
patch, and *another scene's context* is the model itself, asked for the same cameras with latents that know nothing of
them (VGGT's cameras tell something of the pictures that they are of, at random weights most). Depth is in VGGT's unit,
read by the probe, beside the mean depth of the training split, of each patch in it, and of the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.recipes.base import Built, LossTally, Recipe, every_batch, kept_rows, row
from actors.recipes.pictures import Album
from actors.recipes.samples import load_samples, spread
from actors.recipes.spa3r_pictures import Shown, draw_field
from models.encoders.vggt.poses import extrinsics_intrinsics
from models.metrics.means import Means
from models.spa3r.losses import resize_features
from models.spa3r.model import GEO, Spa3R
from models.spa3r.spec import COLUMNS, VIEW_SET, pick, rows_of
from services.contracts import PlanSample, Role, Split
from services.errors import DataError
from services.streams.inputs import JUDGE
from services.streams.permutation import key64
from services.telemetry import events

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

EXAMPLES = 4
MODEL, COPY, SCENE = "model", "nearest context view", "scene mean"
TYPICAL, STRANGER = "mean of training views", "another scene's context"
MEAN_DEPTH, CONTEXT_DEPTH = "mean depth", "mean depth of the context"
PATCH_DEPTH = "mean depth map"
SURVEYED = 512
"""Training view sets that means are taken of."""
CURVE = "By the number of context views"


@dataclass(frozen=True, kw_only=True)
class Typical:
    """What is known of any view without having seen its scene: means over training view sets."""

    features: Mapping[str, Tensor]
    """Target -> (n, C), by patch."""
    depth: Tensor | None
    """(n,), by patch; None without a probe."""


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
def look(
    module: Spa3R,
    batch: Mapping[str, Any],
    names: Sequence[str],
    *,
    typical: Typical | None = None,
    strangers: Sequence[int | None] = (),
) -> Seen:
    """Predictions of the model and of the baselines at the target views of a batch whose samples all count.

    Args:
        module: the model.
        batch: B view sets.
        names: what is predicted.
        typical: adds the means of training views to the baselines.
        strangers: for each set the place in the batch of one of another scene, whose latents are asked for the same
            cameras; NaN stands where there is none. () leaves this out.
    """
    tokens, roles = batch["tokens"][:, :, -1], batch["roles"].bool()
    grid = (tokens.shape[2], tokens.shape[3])
    context, targets = rows_of(~roles), rows_of(roles)
    features = tokens.flatten(2, 3).float()
    known = pick(features, context)
    if "context_tokens" in batch:
        known = batch["context_tokens"][:, :, -1].flatten(2, 3).float()
    cameras = pick(batch["pose"], targets)
    latents = module.encode(known, grid)
    field_ = module.read(latents, module.decode(latents, cameras, grid))
    swapped = _with_strangers(module, latents, cameras, grid, strangers) if strangers else {}
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
            **({TYPICAL: typical.features[name].to(true)[None, None]} if typical else {}),
            **({STRANGER: swapped[name]} if swapped else {}),
        }
    depth, depths = None, {}
    if field_.depth is not None:
        depth = pick(batch["depth"], targets).flatten(2).float()
        context_depth = pick(batch["depth"], context).float()
        depths = {MODEL: field_.depth.float(), CONTEXT_DEPTH: context_depth.mean((1, 2, 3))[:, None, None]}
        if typical is not None and typical.depth is not None:
            by_patch = typical.depth.to(depth)
            depths |= {MEAN_DEPTH: by_patch.mean()[None, None, None], PATCH_DEPTH: by_patch[None, None]}
    return Seen(truth=truth, guesses=guesses, depth=depth, depths=depths, contexts=context.shape[1], targets=targets)


def _with_strangers(
    module: Spa3R, latents: Tensor, cameras: Tensor, grid: tuple[int, int], strangers: Sequence[int | None]
) -> dict[str, Tensor]:
    """Target -> predictions (B, T, n, C) at own cameras from other sets' latents; NaN where there are none."""
    places = torch.tensor([place or 0 for place in strangers], device=latents.device)
    others = latents[places]
    predicted = module.read(others, module.decode(others, cameras, grid)).predicted
    missing = torch.tensor([place is None for place in strangers], device=latents.device)
    return {
        name: values.float().masked_fill(missing[:, None, None, None], torch.nan) for name, values in predicted.items()
    }


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
    """Cosines and depth errors over view sets, as means."""

    means: Means = field(default_factory=Means)
    sets: int = 0

    def update(self, seen: Seen) -> None:
        """Add a batch."""
        found: dict[str, Tensor] = {}
        for name, true in seen.truth.items():
            for who, guess in seen.guesses[name].items():
                cosine = F.cosine_similarity(guess.expand_as(true), true, dim=-1)
                found[f"{name}/{who}"] = cosine.flatten(1).mean(1)
        if seen.depth is not None:
            for who, guess in seen.depths.items():
                error = (guess.expand_as(seen.depth) - seen.depth).abs() / seen.depth.clamp(min=1e-6)
                found[f"depth/{who}"] = error.flatten(1).mean(1)
        self.means.update(found)
        self.sets += len(next(iter(found.values())))

    def cosines(self) -> dict[str, float]:
        """``<target>/<who predicts>`` -> mean cosine."""
        return {key: value for key, value in self.means.compute().items() if not key.startswith("depth/")}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The metrics of an evaluation."""
        found, cosines = self.means.compute(), self.cosines()
        metrics = {}
        for name in [key.split("/")[0] for key in cosines if key.endswith(f"/{MODEL}")]:
            mine, copied = found[f"{name}/{MODEL}"], found[f"{name}/{COPY}"]
            others = (SCENE, TYPICAL, STRANGER)
            also = {who: cosines[f"{name}/{who}"] for who in others if f"{name}/{who}" in cosines}
            metrics[f"{name}/cosine"] = row(mine, copied, COPY, "higher", **also)
        if f"depth/{MODEL}" in found:
            beside = [who for who in (PATCH_DEPTH, CONTEXT_DEPTH) if f"depth/{who}" in found]
            also = {who: found[f"depth/{who}"] for who in beside}
            baseline = found.get(f"depth/{MEAN_DEPTH}")
            metrics["depth_probe/abs_rel"] = row(found[f"depth/{MODEL}"], baseline, MEAN_DEPTH, "lower", **also)
        return metrics


def judge(recipe: Recipe, built: Built, feed: Feed, folder: Path, *, split: Split, device: str) -> dict[str, Any]:
    """Judge the model on every view set of ``split``; pictures and tables go into ``folder`` for the report."""
    module = built.module
    assert isinstance(module, Spa3R), "the recipe makes a Spa3R"
    names = recipe.config.recipe.spa3r.predict
    album, scores, tally = Album(folder), FieldScores(), LossTally(weights=recipe.loss_weights(built.spec.name))
    with closing(feed.for_role(JUDGE)) as judged:
        typical = survey(judged, names, depth=recipe.config.recipe.spa3r.depth_probe)
        shown, sets = list[Shown](), list[PlanSample]()
        with events.span("evaluate", split=split.value):
            for batch, samples in every_batch(judged, split, VIEW_SET):
                kept, own = counted(batch, samples, device)
                if not own:
                    continue
                seen = look(module, kept, names, typical=typical, strangers=strangers_of(own))
                scores.update(seen)
                tally.update(module, built.spec, kept, {})
                shown += Shown.of(kept, seen, own)[: EXAMPLES - len(shown)]
                sets += own
        if not scores.sets:
            raise DataError(
                f"the {split.value} split has no view set that can be read; check the data with `loom3d data check`, "
                "and recipe.view_set.views against the number of views of its scenes"
            )
        with events.span("context_curve", split=split.value):
            curve = context_curve(module, judged, names, sets, split=split, device=device)
    for example in shown:
        draw_field(album, example)
    metrics = scores.rows() | curve_rows(curve, names)
    draw_curve(album, curve)
    album.save()
    losses = {name: row(value, None, "", "lower") for name, value in tally.compute().items()}
    return {"samples": scores.sets, "metrics": metrics | losses}


def strangers_of(samples: Sequence[PlanSample]) -> list[int | None]:
    """For each sample the place of the next one, in a circle, that is of another scene; None where there is none."""
    scenes = [(sample.source, sample.item) for sample in samples]
    count = len(scenes)
    circles = [[(place + step) % count for step in range(1, count)] for place in range(count)]
    return [next((other for other in circle if scenes[other] != scenes[place]), None)
            for place, circle in enumerate(circles)]  # fmt: skip


# -- more context views ----------------------------------------------------------------------------------------


def nested_sets(sample: PlanSample) -> list[PlanSample]:
    """A set with its first context view alone, with two of them, and so on up to all; the targets are always all.

    In which order the others join is drawn by the sample's id, so that not the earliest always comes first.
    """
    context = [view for view in sample.views if view.role != Role.TARGET]
    order = np.random.default_rng(key64("context curve", sample.id)).permutation(len(context) - 1)
    joined = [context[0], *(context[1 + place] for place in order)]
    return [
        replace(
            sample, views=tuple(view for view in sample.views if view.role == Role.TARGET or view in joined[:count])
        )
        for count in range(1, len(context) + 1)
    ]


def context_curve(
    module: Spa3R, judged: Feed, names: Sequence[str], found: Sequence[PlanSample], *, split: Split, device: str
) -> dict[int, FieldScores]:
    """Number of context views -> scores at the same unseen views of the same sets, the largest of ``found``.

    At most ``evaluate.samples`` sets. VGGT reads each set anew, so that the context knows nothing of the views that
    were left out; nothing is trained.
    """
    most = max((len(sample.views) for sample in found), default=0)
    sets = spread([sample for sample in found if len(sample.views) == most], judged.config.evaluate.samples)
    curve: dict[int, FieldScores] = {}
    for chosen in zip(*(nested_sets(sample) for sample in sets), strict=True):
        scores = FieldScores()
        for batch, samples in load_samples(judged, chosen, split=split, batch_size=judged.config.trainer.micro_batch):
            kept, own = counted(batch, samples, device)
            if own:
                scores.update(look(module, kept, names))
        if scores.sets:
            curve[sum(view.role != Role.TARGET for view in chosen[0].views)] = scores
    return curve


def curve_rows(curve: Mapping[int, FieldScores], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What all context views are worth beside one, as metrics."""
    if len(curve) < 2:
        return {}
    least, most = curve[min(curve)].cosines(), curve[max(curve)].cosines()
    views = f"with {max(curve)} context views"
    return {
        f"{name}/cosine {views}": row(
            most[f"{name}/{MODEL}"], least[f"{name}/{MODEL}"], "with 1 context view", "higher"
        )
        for name in names
    }


def draw_curve(album: Album, curve: Mapping[int, FieldScores]) -> None:
    """A table of cosines by the number of context views."""
    if len(curve) < 2:
        return
    computed = {count: scores.cosines() for count, scores in sorted(curve.items())}
    columns = list(next(iter(computed.values())))
    album.table(
        CURVE,
        "Cosine at the same unseen views of the same sets; context views join one by one. Copying has more to choose "
        "from too.",
        ["context views", "view sets", *columns],
        [[count, curve[count].sets, *(found[key] for key in columns)] for count, found in computed.items()],
    )


def counted(
    batch: Mapping[str, Any], samples: Sequence[PlanSample], device: str
) -> tuple[dict[str, Any], list[PlanSample]]:
    """The samples of a batch that count, on ``device``."""
    keep = batch["weight"] > 0
    kept = kept_rows(batch, keep)
    on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kept.items()}
    return on_device, [sample for sample, wanted in zip(samples, keep.tolist(), strict=True) if wanted]


def survey(feed: Feed, names: Sequence[str], *, depth: bool) -> Typical:
    """Means over the first training view sets, by patch: of the features at all views, and of the depth."""
    sums: dict[str, Tensor] = {}
    views, seen = 0, 0
    for batch, samples in every_batch(feed, Split.TRAIN, VIEW_SET):
        kept, _ = counted(batch, samples, "cpu")
        grid = (kept["tokens"].shape[3], kept["tokens"].shape[4])
        for name in names:
            column = kept["tokens" if name == GEO else COLUMNS[name]]
            features = resize_features(column[:, :, -1], grid).double()
            sums[name] = sums.get(name, 0.0) + features.sum((0, 1))
        if depth:
            sums["depth"] = sums.get("depth", 0.0) + kept["depth"].double().flatten(2).sum((0, 1))
        views += kept["tokens"].shape[0] * kept["tokens"].shape[1]
        seen += len(kept["tokens"])
        if seen >= SURVEYED:
            break
    means = {name: (summed / max(1, views)).float() for name, summed in sums.items()}
    return Typical(depth=means.pop("depth", None), features=means)
