"""Judging what the spatial decoder reads out of two views' tokens: points, matches, colours; for P1 and P2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actors.recipes.base import Built, LossTally, Recipe, every_batch, kept_rows, row, to_kept
from actors.recipes.pictures import Album, colour_depth, hstack
from actors.recipes.uniugg_video import judge_videos
from models.metrics.depth import DepthMetrics
from models.metrics.images import psnr
from models.metrics.matching import MatchingMetrics
from models.metrics.means import Means
from models.metrics.pointmap import PointmapMetrics, plane_points, token_cosine
from models.uniugg.latent import LatentModel, pair_tokens
from models.uniugg.losses_points import pair_targets
from models.uniugg.pretraining import PAIR, EncoderPretraining
from models.uniugg.vae import SpatialVae
from services.contracts import Split
from services.errors import DataError
from services.telemetry import events

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

EXAMPLES = 4
ORIGINALS, NOT_FINETUNED = "originals, first decoder", "reconstructions, first decoder"
MEAN_ORIGINAL = "mean token"
PLANE, UNTRAINED, CHANCE, MEAN_COLOUR = "mean-depth plane", "untrained network", "chance", "mean colour"
POSED_PLANE = "mean-depth plane, true pose given"

Views = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


@dataclass(kw_only=True)
class PairScores:
    """Scores of predicted pairs against posed depth, as sums."""

    points: tuple[PointmapMetrics, PointmapMetrics] = field(
        default_factory=lambda: (PointmapMetrics(), PointmapMetrics())
    )
    depth: DepthMetrics = field(default_factory=DepthMetrics)
    matches: MatchingMetrics = field(default_factory=MatchingMetrics)
    means: Means = field(default_factory=Means)

    def update(self, views: Views, batch: Mapping[str, Any]) -> None:
        """Add a batch of kept samples of kind ``pair``; depth is judged in metres, without any alignment."""
        targets = pair_targets(batch["depth"], batch["K"], batch["pose"])
        for place, view in enumerate(views):
            self.points[place].update(view["pts3d"], targets.points[:, place], targets.valid[:, place])
        self.depth.update(views[0]["pts3d"][..., 2].clamp_min(1e-3), batch["depth"][:, 0], align=False)
        if "desc" in views[0]:
            self.matches.update(views[0]["desc"], views[1]["desc"], batch["matches"], batch["match_valid"])
        if "rgb" in views[0]:
            rgb = torch.stack([view["rgb"] for view in views], dim=1).flatten(0, 1).movedim(-1, 1)
            self.means.update({"psnr": psnr(rgb, pictures(batch["image"]))})

    def compute(self) -> dict[str, float]:
        """``view1/error`` and ``view2/error`` (metres), ``depth/abs_rel``, ``matches/accuracy``, ``psnr``, ..."""
        found: dict[str, float] = {}
        for place, points in enumerate(self.points, start=1):
            found |= {f"view{place}/{name}": value for name, value in points.compute().items()}
        found |= {f"depth/{name}": value for name, value in self.depth.compute().items()}
        found |= {f"matches/{name}": value for name, value in self.matches.compute().items()}
        return found | self.means.compute()


def pictures(image: Tensor) -> Tensor:
    """Bytes (B, V, H, W, 3) -> float32 (B * V, 3, H, W) in [0, 1]."""
    return image.flatten(0, 1).movedim(-1, 1).float() / 255


@dataclass(kw_only=True)
class TrainingMeans:
    """What is known of the training split without looking at a view: its mean depth and its mean colour."""

    depth: float
    colour: Tensor
    """(3,) in [0, 1]."""

    @classmethod
    def measure(cls, feed: Feed) -> TrainingMeans:
        """Over all pairs of the training split. DataError when no depth is known."""
        depth_sum, pixels, colours, images = 0.0, 0, torch.zeros(3, dtype=torch.float64), 0
        for batch, _ in every_batch(feed, Split.TRAIN, PAIR):
            kept = kept_rows(batch, batch["weight"] > 0)
            valid = torch.isfinite(kept["depth"]) & (kept["depth"] > 0)
            depth_sum += float(torch.where(valid, kept["depth"], 0.0).double().sum())
            pixels += int(valid.sum())
            colours += pictures(kept["image"]).double().mean((2, 3)).sum(0)
            images += 2 * len(kept["weight"])
        if not pixels:
            raise DataError("the pairs of the training split have no known depth; check them with `loom3d data check`")
        return cls(depth=depth_sum / pixels, colour=(colours / images).float())

    def views(self, batch: Mapping[str, Any], *, posed: bool) -> Views:
        """The plane of mean depth before each camera, painted in the mean colour.

        Who has not looked at the views does not know how the camera moved: to it both cameras stand in one place.
        ``posed`` tells it the true pose, which no trained network is told.
        """
        height, width = batch["depth"].shape[-2:]
        eye = torch.eye(4, dtype=torch.float64).expand(len(batch["K"]), 4, 4)
        to_first = torch.linalg.inv(batch["pose"][:, 0].double()) @ batch["pose"][:, 1].double() if posed else eye
        return tuple(  # type: ignore[return-value]
            {
                "pts3d": plane_points(self.depth, batch["K"][:, place], pose.float(), height, width),
                "rgb": self.colour.expand(len(eye), height, width, 3),
            }
            for place, pose in enumerate((eye, to_first))
        )


def judge_encoder(
    recipe: Recipe, built: Built, feed: Feed, folder: Path, *, split: Split, device: str
) -> dict[str, Any]:
    """P1 on ``split``: beside the network before training, the plane of mean depth, chance, and the mean colour."""
    untrained = recipe.rebuild(built.spec.name, built.settings).module.eval().to(device)
    assert isinstance(built.module, EncoderPretraining), "the recipe makes this model"
    assert isinstance(untrained, EncoderPretraining), "the recipe makes this model"
    with events.span("survey"):
        means = TrainingMeans.measure(feed)
    scores = {name: PairScores() for name in ("trained", UNTRAINED, PLANE, POSED_PLANE)}
    cosine = {name: Means() for name in ("trained", UNTRAINED)}
    losses = {name: LossTally(weights=recipe.loss_weights(built.spec.name)) for name in ("trained", UNTRAINED)}
    album, samples, shown = Album(folder), 0, _shown(feed, split)
    for number, batch in enumerate(_limited(feed, split)):
        kept = to_kept(batch, device)
        for name, module in (("trained", built.module), (UNTRAINED, untrained)):
            losses[name].update(module, built.spec, kept, {})
            with torch.no_grad():
                out = module(kept["image"], pairs=True)
            assert out.views is not None, "pairs were asked for"
            scores[name].update(out.views, kept)
            teacher = kept["teacher_tokens"][:, :, -1].float()
            cosine[name].update({"cosine": token_cosine(out.tokens, teacher)})
            if name == "trained" and number in shown:
                draw_pair(album, kept, out.views)
        for name in (PLANE, POSED_PLANE):
            scores[name].update(means.views(kept, posed=name == POSED_PLANE), kept)
        samples += len(kept["weight"])
    _require(samples, split)
    album.save()
    found = {name: score.compute() for name, score in scores.items()}
    metrics = {"loss": loss_row(losses["trained"], losses[UNTRAINED])}
    metrics |= {
        f"points/{view}_error": row(
            found["trained"][f"{view}/error"],
            found[PLANE][f"{view}/error"],
            PLANE,
            "lower",
            **{name: found[name][f"{view}/error"] for name in beside},
        )
        for view, beside in (("view1", (UNTRAINED,)), ("view2", (POSED_PLANE, UNTRAINED)))
    }
    metrics["depth/abs_rel"] = _beside(found, "depth/abs_rel", "lower")
    if "matches/accuracy" in found["trained"]:
        metrics["matches/accuracy"] = row(
            found["trained"]["matches/accuracy"],
            found["trained"]["matches/chance"],
            CHANCE,
            "higher",
            **{UNTRAINED: found[UNTRAINED]["matches/accuracy"]},
        )
    if "psnr" in found["trained"]:
        metrics["rgb/psnr"] = row(
            found["trained"]["psnr"],
            found[PLANE]["psnr"],
            MEAN_COLOUR,
            "higher",
            **{UNTRAINED: found[UNTRAINED]["psnr"]},
        )
    metrics["tokens/cosine"] = row(
        cosine["trained"].compute()["cosine"], cosine[UNTRAINED].compute()["cosine"], UNTRAINED, "higher"
    )
    metrics |= judge_videos({"trained": built.module, UNTRAINED: untrained}, feed, split=split, device=device)
    return {"samples": samples, "metrics": metrics}


def judge_latents(
    recipe: Recipe, built: Built, feed: Feed, folder: Path, *, split: Split, device: str
) -> dict[str, Any]:
    """P2 on ``split``: reconstructions (of the posterior's mean) read by the trained decoder.

    Beside them: originals and reconstructions read by the decoder that the run began with (the first phase's), and a
    token that is the mean of all tokens.
    """
    module = built.module
    assert isinstance(module, LatentModel), "the recipe makes this model"
    first = recipe.rebuild(built.spec.name, built.settings).module
    assert isinstance(first, LatentModel), "the recipe makes this model"
    first.eval().to(device)
    scores = {name: PairScores() for name in ("trained", ORIGINALS, NOT_FINETUNED)}
    losses = {name: LossTally(weights=recipe.loss_weights(built.spec.name)) for name in ("trained", UNTRAINED)}
    first.vae.token_mean.copy_(module.vae.token_mean)  # statistics of the data, not something learnt
    first.vae.token_std.copy_(module.vae.token_std)
    cosine, album, samples, shown = Means(), Album(folder), 0, _shown(feed, split)
    for number, batch in enumerate(_limited(feed, split)):
        kept = to_kept(batch, device)
        tokens = pair_tokens(kept).float()
        for name, model in (("trained", module), (UNTRAINED, first)):
            losses[name].update(model, built.spec, kept, {})
        with torch.no_grad():
            rebuilt = _reconstruct(module.vae, tokens)
            untrained = _reconstruct(first.vae, tokens)
            views = module.spatial_decoder(*rebuilt.unbind(1))
            scores["trained"].update(views, kept)
            scores[ORIGINALS].update(first.spatial_decoder(*tokens.unbind(1)), kept)
            scores[NOT_FINETUNED].update(first.spatial_decoder(*rebuilt.unbind(1)), kept)
        cosine.update(
            {
                "trained": token_cosine(rebuilt, tokens),
                UNTRAINED: token_cosine(untrained, tokens),
                "baseline": token_cosine(module.vae.token_mean.expand_as(tokens), tokens),
            }
        )
        if number in shown:
            draw_pair(album, kept, views)
        samples += len(kept["weight"])
    _require(samples, split)
    album.save()
    found, cosines = {name: score.compute() for name, score in scores.items()}, cosine.compute()
    metrics = {
        "loss": loss_row(losses["trained"], losses[UNTRAINED]),
        "tokens/cosine": row(
            cosines["trained"], cosines["baseline"], MEAN_ORIGINAL, "higher", **{UNTRAINED: cosines[UNTRAINED]}
        ),
    }
    for name, key, better in (
        ("points/view1_error", "view1/error", "lower"),
        ("points/view2_error", "view2/error", "lower"),
        ("depth/abs_rel", "depth/abs_rel", "lower"),
        ("rgb/psnr", "psnr", "higher"),
    ):
        if key in found["trained"]:
            metrics[name] = row(
                found["trained"][key],
                found[NOT_FINETUNED][key],
                NOT_FINETUNED,
                better,
                **{ORIGINALS: found[ORIGINALS][key]},
            )
    return {"samples": samples, "metrics": metrics}


def _reconstruct(vae: SpatialVae, tokens: Tensor) -> Tensor:
    """Tokens (B, 2, h, w, C) through the mean of their posterior and back."""
    return vae.decode(vae.encode(tokens.flatten(0, 1)).mean).unflatten(0, (-1, 2))


def loss_row(trained: LossTally, untrained: LossTally) -> dict[str, Any]:
    """The whole loss beside that of the network before training."""
    return row(trained.compute()["loss"], untrained.compute()["loss"], UNTRAINED, "lower")


def _limited(feed: Feed, split: Split) -> Iterator[dict[str, Any]]:
    """Batches of pairs of the split that hold a sample, at most ``evaluate.samples`` samples (0: all)."""
    limit, seen = feed.config.evaluate.samples, 0
    for batch, samples in every_batch(feed, split, PAIR):
        if not (batch["weight"] > 0).any():
            continue
        yield batch
        seen += len(samples)
        if limit and seen >= limit:
            return


def _shown(feed: Feed, split: Split) -> frozenset[int]:
    """Numbers of the batches whose first pair is drawn, spread evenly over what is judged."""
    plan = feed.plan(split, complete=True)
    batches = plan.steps_per_epoch
    if feed.config.evaluate.samples:
        batches = min(batches, -(-feed.config.evaluate.samples // plan.micro_batch))
    return frozenset(int(number) for number in np.linspace(0, batches - 1, min(EXAMPLES, batches)))


def _require(samples: int, split: Split) -> None:
    if not samples:
        raise DataError(
            f"the {split.value} split has no pair that can be read; look at `loom3d data pairs` and `loom3d data check`"
        )


def _beside(found: Mapping[str, Mapping[str, float]], name: str, better: str) -> dict[str, Any]:
    return row(found["trained"][name], found[PLANE][name], PLANE, better, **{UNTRAINED: found[UNTRAINED][name]})


def draw_pair(album: Album, batch: Mapping[str, Any], views: Views) -> None:
    """The first pair: pictures, predicted colours, depth along each view's axis as truth and as predicted."""
    to_second = (torch.linalg.inv(batch["pose"][0, 1].double()) @ batch["pose"][0, 0].double()).cpu()
    rows_of = []
    for place, view in enumerate(views):
        points = view["pts3d"][0].detach().double().cpu()
        if place == 1:  # view 2's points stand in view 1's frame; its own depth is along its own axis
            points = points @ to_second[:3, :3].T + to_second[:3, 3]
        true = batch["depth"][0, place].cpu().numpy()
        low, high = _range(true)
        tiles = [batch["image"][0, place].cpu().numpy()]
        if "rgb" in view:
            tiles.append((view["rgb"][0].detach().cpu().numpy() * 255).round().astype(np.uint8))
        known = np.where(np.isfinite(true) & (true > 0), true, 0)
        rows_of.append(
            hstack([*tiles, colour_depth(known, low, high), colour_depth(points[..., 2].numpy(), low, high)])
        )
    album.add(
        np.concatenate(rows_of),
        f"Pair {batch['id'][0]}",
        "view 1 above, view 2 below: picture, predicted colours, measured depth, predicted depth",
    )


def _range(depth: np.ndarray) -> tuple[float, float]:
    known = depth[np.isfinite(depth) & (depth > 0)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
