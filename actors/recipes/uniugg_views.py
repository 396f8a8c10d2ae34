"""Imagined views against true ones: pictures, depth and points, beside what needs no model, by how far the camera went.

Of each view there are two pictures: ``rgb`` is what the colour head draws, ``projected`` the imagined point cloud as
the target camera sees it. Baselines answer without imagining: as though the camera had not moved (the reference's
picture and measured depth), or with what is known of the training split (its mean picture, a plane at its mean depth).
Beside them stand the view before training, and what the decoder makes of the target's own features: the best that
could be imagined with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actors.recipes.base import row
from actors.recipes.pictures import Album, colour_depth, hstack
from actors.recipes.samples import planned
from models.geometry.poses import relative, rotation_angle
from models.geometry.projection import transform, unproject
from models.metrics.depth import frame_scores, valid_depth
from models.metrics.generation import GenerationMetrics, Judges, load_judges
from models.metrics.means import Means, view_groups
from models.metrics.pointmap import plane_points, token_cosine
from models.metrics.points import cloud_batch
from models.uniugg.llm import GENERATION
from models.uniugg.pipeline import Imagined, Pipeline
from services.contracts import Split
from services.errors import DataError
from services.streams.permutation import key64

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

TRAINED = "trained"
COPY, MEAN_PICTURE, PLANE = "copying the reference", "mean training picture", "mean-depth plane"
OWN, STILL = "the target's own features", "the reference's own features"
"""What the same decoder makes of the features that were to be imagined, and of those that are there already: what
copying gives somebody who does not know the reference's measured depth."""
RGB, PROJECTED = "rgb", "projected"
EXAMPLES_PER_BIN = 2
POINTS = 4096
"""Of each cloud at most so many points, on a regular grid of pixels, are compared: Chamfer takes seconds for all."""
SURVEY = 128
"""Pairs of the training split that its mean picture and mean depth are measured on."""


class TrainingViews:
    """The mean picture (H, W, 3) in [0, 1] of the training split, and its mean depth in metres."""

    def __init__(self, feed: Feed) -> None:
        pictures, views, depths, pixels = 0.0, 0, 0.0, 0
        for sample in planned(feed, Split.TRAIN, GENERATION, SURVEY):
            (record,) = feed.targets.get([sample])
            if isinstance(record, DataError):
                continue
            image, depth = record["image"].data, torch.from_numpy(np.array(record["depth"].data))
            pictures, views = pictures + image.astype(np.float64).sum(0) / 255, views + len(image)
            valid = valid_depth(depth)
            depths, pixels = depths + float(depth[valid].double().sum()), pixels + int(valid.sum())
        if not views or not pixels:
            raise DataError(
                "the training split has no pair with pictures and depth, which views are judged beside; look at "
                "`loom3d data pairs` and `loom3d data check`"
            )
        self.picture = torch.from_numpy(np.asarray(pictures) / views).float()
        self.depth = depths / pixels


class ViewJudge:
    """Imagines the target of each pair and adds up scores; :meth:`finish` gives the metrics, pictures and tables.

    Args:
        judge: the feed of the judge; ``generate`` and ``evaluate`` say how views are drawn and scored.
        pipelines: name -> the parts to imagine with; the first is judged, the others stand beside it.
        device: of the pipelines.
    """

    def __init__(self, judge: Feed, pipelines: Mapping[str, Pipeline], *, device: str) -> None:
        self._config, self._pipelines, self._device = judge.config, pipelines, device
        evaluate = judge.config.evaluate
        self._judges = load_judges(
            lpips_weights=evaluate.lpips_weights,
            inception_weights=evaluate.inception_weights,
            dinov2_weights=evaluate.dinov2_weights,
            device=device,
        )
        self._beside = Judges(lpips=self._judges.lpips)
        self._survey = TrainingViews(judge)
        # What is compared with published figures gets every score; what stands beside it, those of single pictures.
        self._images = GenerationMetrics(seed=evaluate.seed)
        self._others = GenerationMetrics(seed=evaluate.seed)
        self._means = Means()
        self._drawn: dict[str, int] = {}
        self._examples: list[tuple[np.ndarray, str]] = []

    # -- one batch -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, batch: Mapping[str, Any]) -> None:
        """Add pairs of kind ``generation``, all of which count, as the judge's feed reads them."""
        images = batch["image"].float() / 255
        groups = view_groups(batch["pose"], self._config.evaluate.angle_bins, self._config.evaluate.distance_bins)
        pose = relative(batch["pose"][:, 0].double(), batch["pose"][:, 1].double()).float()
        views = {name: self._imagine(pipeline, batch, pose) for name, pipeline in self._pipelines.items()}
        views[OWN], views[STILL] = self._own(batch, pose), self._still(batch)
        drawn = {name: self._project(view, images[:, 0]) for name, view in views.items()}
        pictures = {
            name: {RGB: view.target_colours.movedim(-1, 1).clamp(0, 1), PROJECTED: drawn[name][0]}
            for name, view in views.items()
        }
        copy = images[:, 0].movedim(-1, 1)
        mean = self._survey.picture.to(copy).movedim(-1, 0).expand_as(copy)
        true = images[:, 1].movedim(-1, 1)
        self._images.update(
            self._judges,
            {**pictures[TRAINED], COPY: copy},
            true,
            coverage={PROJECTED: drawn[TRAINED][1]},
            groups=groups,
        )
        others = {
            f"{name}/{kind}": shown for name in views if name != TRAINED for kind, shown in pictures[name].items()
        }
        self._others.update(self._beside, {**others, MEAN_PICTURE: mean}, true, groups=groups)
        self._geometry(batch, pose, views, groups)
        self._keep(batch, views[TRAINED], pictures[TRAINED], groups)

    def _imagine(self, pipeline: Pipeline, batch: Mapping[str, Any], pose: Tensor) -> Imagined:
        """The target view from the reference's tokens; a sample's draw depends on nothing but itself and the seed."""
        generate, seed = self._config.generate, self._config.evaluate.seed
        draw = torch.tensor([key64("judge", seed, name) >> 1 for name in batch["id"]], device=pose.device)
        return pipeline.imagine_tokens(
            batch["tokens"][:, 0],
            batch["K"][:, 1],
            pose,
            draw=draw,
            steps=generate.steps,
            guidance=generate.guidance,
            eta=generate.eta,
        )

    def _own(self, batch: Mapping[str, Any], pose: Tensor) -> Imagined:
        """The view decoded from what the model was to imagine: the mode of the target's latents, or its tokens."""
        pipeline = self._pipelines[TRAINED]
        target = batch["target_tokens"][:, 0].float()
        if pipeline.vae is not None:
            target = pipeline.vae.decode(batch["mean"].float())
        return pipeline.decode(batch["tokens"][:, 0].float(), target, batch["K"][:, 1], pose)

    def _still(self, batch: Mapping[str, Any]) -> Imagined:
        """The view decoded as if the camera had not moved."""
        seen = batch["tokens"][:, 0].float()
        here = torch.eye(4, device=seen.device).expand(len(seen), 4, 4)
        return self._pipelines[TRAINED].decode(seen, seen, batch["K"][:, 0], here)

    def _project(self, view: Imagined, reference: Tensor) -> tuple[Tensor, Tensor]:
        """The point cloud of each pair as the target camera sees it: pictures (B, 3, H, W), and coverage (B,)."""
        generate, pipeline = self._config.generate, self._pipelines[TRAINED]
        shown, share = [], []
        for place in range(len(view)):
            cloud = pipeline.point_cloud(
                view,
                place,
                confidence=generate.confidence,
                points=generate.points,
                reference=(reference[place] * 255).round().to(torch.uint8).cpu().numpy(),
            )
            rendered = pipeline.render(view, place, cloud, radius=generate.radius, fill=generate.fill)
            shown.append(rendered.image.movedim(-1, 0).clamp(0, 1))
            share.append(rendered.coverage)
        return torch.stack(shown), torch.tensor(share, dtype=torch.float64)

    def _geometry(
        self, batch: Mapping[str, Any], pose: Tensor, views: Mapping[str, Imagined], groups: Sequence[Sequence[str]]
    ) -> None:
        """Depth of the target view (metric, nothing aligned), and its points in the reference camera's frame."""
        depth, K = batch["depth"], batch["K"]
        true = depth[:, 1]
        known = valid_depth(depth)
        target = transform(unproject(true, K[:, 1]), pose)
        everywhere = torch.ones_like(known[:, 0])
        plane = plane_points(self._survey.depth, K[:, 1], pose, true.shape[1], true.shape[2])
        answers = {name: (view.depth, view.target_points, everywhere) for name, view in views.items()}
        answers[COPY] = (depth[:, 0], unproject(depth[:, 0], K[:, 0]), known[:, 0])
        answers[PLANE] = (torch.full_like(true, self._survey.depth), plane, everywhere)
        for name, (z, points, valid) in answers.items():
            scores = frame_scores(z, true, known=valid)
            scores |= cloud_batch(*(thinned(x) for x in (points, valid, target, known[:, 1])))
            self._means.update({f"{name}/{score}": value for score, value in scores.items()}, groups)
        cosine = {
            f"{name}/cosine": token_cosine(view.tokens, batch["target_tokens"][:, 0].float())
            for name, view in views.items()
        }
        cosine[f"{COPY}/cosine"] = token_cosine(batch["tokens"][:, 0].float(), batch["target_tokens"][:, 0].float())
        self._means.update(cosine, groups)

    # -- what came of it -------------------------------------------------------------------------------------

    def finish(self, album: Album) -> dict[str, dict[str, Any]]:
        """Metrics; pictures of some pairs and tables by bins of angle and distance go into the album."""
        for picture, title in self._examples:
            album.add(
                picture,
                title,
                "reference; imagined by the colour head; imagined point cloud; true target view; its measured depth; "
                "imagined depth",
            )
        pictures, others, means = self._images.compute(), self._others.compute(), self._means.compute()
        self._tables(album, pictures, means)
        metrics: dict[str, dict[str, Any]] = {}
        better = {"psnr": "higher", "ssim": "higher", "lpips": "lower", "fid": "lower", "kid": "lower"}
        for kind in (RGB, PROJECTED):
            for score, direction in {**better, "fd_dinov2": "lower"}.items():
                if f"{kind}/{score}" in pictures:
                    beside = {MEAN_PICTURE: f"{MEAN_PICTURE}/{score}"}
                    beside |= {name: f"{name}/{kind}/{score}" for name in self._names}
                    also = {name: others[key] for name, key in beside.items() if key in others}
                    metrics[f"{kind}/{score}"] = row(
                        pictures[f"{kind}/{score}"], pictures[f"{COPY}/{score}"], COPY, direction, **also
                    )
        metrics[f"{PROJECTED}/coverage"] = row(pictures[f"{PROJECTED}/coverage"], None, "", "higher")
        for metric, score, direction in (
            ("depth/abs_rel", "abs_rel", "lower"),
            ("depth/delta1", "delta1", "higher"),
            ("points/chamfer", "chamfer", "lower"),
            ("tokens/cosine", "cosine", "higher"),
        ):
            if f"{TRAINED}/{score}" in means:
                beside = {name: f"{name}/{score}" for name in (PLANE, *self._names)}
                also = {name: means[key] for name, key in beside.items() if key in means}
                metrics[metric] = row(
                    means[f"{TRAINED}/{score}"], means.get(f"{COPY}/{score}"), COPY, direction, **also
                )
        return metrics

    @property
    def _names(self) -> tuple[str, ...]:
        """What stands beside the judged pipeline."""
        return (*(name for name in self._pipelines if name != TRAINED), OWN, STILL)

    def _tables(self, album: Album, pictures: Mapping[str, float], means: Mapping[str, float]) -> None:
        """One table of the main scores, a row for each bin of angle and of distance that has pairs."""
        score = "lpips" if self._judges.lpips is not None else "psnr"
        columns = {
            f"{score}, colours": (pictures, f"{RGB}/{score}"),
            f"{score}, cloud": (pictures, f"{PROJECTED}/{score}"),
            f"{score}, {COPY}": (pictures, f"{COPY}/{score}"),
            "depth AbsRel": (means, f"{TRAINED}/abs_rel"),
            f"AbsRel, {COPY}": (means, f"{COPY}/abs_rel"),
            f"AbsRel, {PLANE}": (means, f"{PLANE}/abs_rel"),
            "Chamfer, m": (means, f"{TRAINED}/chamfer"),
            f"Chamfer, {COPY}": (means, f"{COPY}/chamfer"),
        }
        evaluate, rows = self._config.evaluate, []
        for quantity, edges, unit in (
            ("angle", evaluate.angle_bins, "degrees"),
            ("distance", evaluate.distance_bins, "m"),
        ):
            names = [f"{quantity}<={edge:g}" for edge in edges] + ([f"{quantity}>{edges[-1]:g}"] if edges else [])
            for name in names:
                count = self._images.means.count(f"{COPY}/psnr@{name}")
                if count:
                    values = [found.get(f"{key}@{name}", "") for found, key in columns.values()]
                    rows.append((f"{name} {unit}", count, *values))
        album.table(
            "Imagined views by how far the camera moved",
            "Means over the pairs of each bin; PSNR in dB, Chamfer distance in m. Copying takes the reference's "
            "picture and measured depth.",
            ("camera", "pairs", *columns),
            rows,
        )

    def _keep(
        self,
        batch: Mapping[str, Any],
        view: Imagined,
        pictures: Mapping[str, Tensor],
        groups: Sequence[Sequence[str]],
    ) -> None:
        """Draw the first pairs of each bin of the angle."""
        change = relative(batch["pose"][:, 0].double(), batch["pose"][:, 1].double())
        for place, (angle_bin, *_) in enumerate(groups):
            if self._drawn.get(angle_bin, 0) >= EXAMPLES_PER_BIN:
                continue
            self._drawn[angle_bin] = self._drawn.get(angle_bin, 0) + 1
            true = batch["depth"][place, 1].cpu().numpy()
            known = true[valid_depth(batch["depth"][place, 1]).cpu().numpy()]
            low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
            tiles = [batch["image"][place, 0].cpu().numpy()]
            tiles += [_bytes(pictures[kind][place]) for kind in (RGB, PROJECTED)]
            tiles += [batch["image"][place, 1].cpu().numpy(), colour_depth(true, low, high)]
            tiles.append(colour_depth(view.depth[place].cpu().numpy(), low, high))
            angle = float(rotation_angle(change[place, :3, :3]).rad2deg())
            distance = float(change[place, :3, 3].norm())
            self._examples.append(
                (hstack(tiles), f"{batch['id'][place]}: turned {angle:.0f} degrees, moved {distance:.2f} m")
            )


def thinned(values: Tensor) -> Tensor:
    """Maps (B, H, W, ...) at every n-th pixel, with the smallest n that leaves at most :data:`POINTS`."""
    stride = max(1, math.ceil(math.sqrt(values.shape[1] * values.shape[2] / POINTS)))
    return values[:, stride // 2 :: stride, stride // 2 :: stride]


def _bytes(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3)."""
    shown: np.ndarray = (picture.movedim(0, -1).cpu().numpy() * 255).round().astype(np.uint8)
    return shown
