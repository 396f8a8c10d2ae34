"""Judging a trained probe on a held-out split, beside what one gets without looking at the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.recipes.base import Built, every_batch, kept_rows, row
from actors.recipes.probe import ProbeRecipe, Tally
from models.metrics.depth import DepthMetrics
from models.metrics.knn import knn_classify
from models.metrics.segmentation import SegmentationMetrics
from models.probe.losses import IGNORE
from models.probe.model import Probe
from services.contracts import PlanSample, Split
from services.data.images import load_image
from services.errors import DataError
from services.telemetry import events

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

EXAMPLES = 6
MEAN_DEPTH, MEAN_DEPTH_MAP, MAJORITY_CLASS = "mean depth", "mean depth map", "majority class"
_LOWER = ("loss", "abs_rel")


@dataclass(kw_only=True)
class Survey:
    """What a pass over a split found: features for k-NN, and what the trivial baselines predict."""

    features: list[Tensor] = field(default_factory=list)
    """L2-normalised summary of each view, (D,)."""
    scenes: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    """Index of the scene type of each view; -1 where it has none."""
    depth_sum: Tensor | float = 0.0
    depth_count: Tensor | float = 0.0
    label_counts: Tensor | float = 0.0

    def add(self, batch: Mapping[str, Any], samples: Sequence[PlanSample], classes: int) -> None:
        """Add the samples of a batch whose weight is above 0."""
        keep = batch["weight"] > 0
        kept = [sample for sample, chosen in zip(samples, keep.tolist(), strict=True) if chosen]
        batch = kept_rows(batch, keep)
        self.features += list(F.normalize(batch["summary"].float().flatten(1), dim=-1))
        self.scenes += [f"{sample.source}/{sample.item}" for sample in kept]
        self.types += batch["scene_type"].tolist()
        valid = torch.isfinite(batch["depth"]) & (batch["depth"] > 0)
        self.depth_sum = self.depth_sum + torch.where(valid, batch["depth"], 0.0).double().sum(0)
        self.depth_count = self.depth_count + valid.double().sum(0)
        labels = batch["labels"][batch["labels"] != IGNORE]
        self.label_counts = self.label_counts + torch.bincount(labels, minlength=max(1, classes))

    def mean_depth(self) -> dict[str, Tensor]:
        """Depth predicted without features, each (H, W): one number everywhere, and a mean of its own for each pixel.

        Empty without depth. Where a pixel was never known, the map has the mean over all.
        """
        total, count = torch.as_tensor(self.depth_sum), torch.as_tensor(self.depth_count)
        if not count.sum():
            return {}
        mean = total.sum() / count.sum()
        return {
            MEAN_DEPTH: mean.expand_as(total),
            MEAN_DEPTH_MAP: torch.where(count > 0, total / count.clamp(min=1), mean),
        }

    def majority_class(self) -> int | None:
        """The class with most pixels; None without labels."""
        counts = torch.as_tensor(self.label_counts)
        return int(counts.argmax()) if counts.sum() else None

    def by_scene(self) -> tuple[Tensor, Tensor]:
        """Features (scenes, D), each the normalised mean over its views, and types (scenes,)."""
        members: dict[str, list[int]] = {}
        for index, scene in enumerate(self.scenes):
            members.setdefault(scene, []).append(index)
        means = [torch.stack([self.features[i] for i in group]).mean(0) for group in members.values()]
        types = [self.types[group[0]] for group in members.values()]
        return F.normalize(torch.stack(means), dim=-1), torch.tensor(types)

    def by_view(self) -> tuple[Tensor, Tensor]:
        """Features (views, D) and types (views,)."""
        return torch.stack(self.features), torch.tensor(self.types)


def evaluate(
    recipe: ProbeRecipe, built: Built, feed: Feed, folder: Path, *, split: Split, device: str
) -> dict[str, Any]:
    """Evaluate the heads on ``split``; writes examples.npz into ``folder``.

    Each metric stands beside a trivial baseline of the training split: its mean depth (aligned by median as the
    predictions are), its majority class, its majority room type. For depth the mean of each pixel stands there too:
    stronger, since it knows that floors are near and the middle of a picture is far.
    """
    module, role = built.module, built.spec
    assert isinstance(module, Probe), "the recipe makes a probe"
    classes = len(feed.targets.classes)
    with events.span("survey"):
        bank = _survey(feed, classes)
    queries, tally = Survey(), Tally(classes, recipe.loss_weights(role.name))
    mean_depth, majority = bank.mean_depth(), bank.majority_class()
    baseline_depth = {name: DepthMetrics() for name in mean_depth}
    baseline_classes = SegmentationMetrics(max(1, classes), ignore=IGNORE)
    examples = _Examples(feed, module, split)
    with events.span("evaluate", split=split.value):
        for batch, samples in every_batch(feed, split):
            queries.add(batch, samples, classes)
            on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            predicted = tally.update(module, role, on_device)
            kept = kept_rows(batch, batch["weight"] > 0)
            for name, depth in mean_depth.items():
                baseline_depth[name].update(depth.expand_as(kept["depth"]), kept["depth"])
            if majority is not None:
                baseline_classes.update(torch.full_like(kept["labels"], majority), kept["labels"])
            examples.add(kept, predicted, [s for s, w in zip(samples, batch["weight"].tolist(), strict=True) if w > 0])
    if not tally.samples:
        raise DataError(
            f"the {split.value} split has no sample that can be read; check the data with `loom3d data check`"
        )
    baselines = {name: numbers.compute() for name, numbers in baseline_depth.items()}
    baselines[MAJORITY_CLASS] = baseline_classes.compute()
    metrics = _beside_baselines(tally.compute(), baselines) | _knn(bank, queries, len(feed.targets.scene_types))
    examples.save(folder / "examples.npz", feed.targets.classes)
    return {"samples": tally.samples, "metrics": metrics}


def _survey(feed: Feed, classes: int) -> Survey:
    """A pass over the training split: k-NN's bank and the baselines' predictions."""
    bank = Survey()
    for batch, samples in every_batch(feed, Split.TRAIN):
        bank.add(batch, samples, classes)
    return bank


def _beside_baselines(
    numbers: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """``<head>/<metric>`` -> value, baseline, its name, and which way is better. Losses have no baseline.

    The first baseline that has the metric stands beside it, further ones under ``also``.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, value in numbers.items():
        metric = name.split("/")[-1]
        found = {source: row[metric] for source, row in baselines.items() if "/" in name and metric in row}
        if not found:
            continue
        first, *others = found
        rows[name] = row(value, found[first], first, "lower" if metric in _LOWER else "higher")
        if others:
            rows[name]["also"] = {source: found[source] for source in others}
    return rows


def _knn(bank: Survey, queries: Survey, classes: int) -> dict[str, dict[str, Any]]:
    """Top-1 of the room type by view and by scene; neighbours come from the training split only."""
    rows = {}
    for name, (features, labels), (asked, true) in (
        ("view", bank.by_view(), queries.by_view()),
        ("scene", bank.by_scene(), queries.by_scene()),
    ):
        known, answerable = labels != IGNORE, true != IGNORE
        if not known.any() or not answerable.any():
            continue
        predicted = knn_classify(asked[answerable], features[known], labels[known], classes)
        majority = int(torch.bincount(labels[known]).argmax())
        truth = true[answerable]
        rows[f"knn/{name}_top1"] = row(
            float((predicted == truth).double().mean()),
            float((truth == majority).double().mean()),
            "majority room type",
            "higher",
        )
    return rows


class _Examples:
    """Predictions beside truth for a few samples, spread evenly over the split."""

    def __init__(self, feed: Feed, module: Probe, split: Split) -> None:
        self._feed, self._module = feed, module
        total = feed.plan(split).samples
        self._wanted = {int(i) for i in np.linspace(0, max(0, total - 1), min(EXAMPLES, max(1, total)))}
        self._seen = 0
        self._columns: dict[str, list[np.ndarray]] = {}
        self._ids: list[str] = []
        self._tokens: list[Tensor] = []

    def add(self, batch: Mapping[str, Tensor], predicted: Mapping[str, Tensor], samples: Sequence[PlanSample]) -> None:
        """Keep the wanted ones of these samples."""
        for place, sample in enumerate(samples):
            if self._seen in self._wanted:
                columns = {
                    "image": self._image(sample),
                    "depth_true": batch["depth"][place].numpy().copy(),
                    "depth_linear": predicted["depth_linear"][place].cpu().numpy(),
                    "depth_dpt": predicted["depth_dpt"][place].cpu().numpy(),
                    "seg_true": batch["labels"][place].numpy().astype(np.int32),
                    "seg_pred": predicted["segmentation"][place].cpu().numpy().astype(np.int32),
                }
                for name, value in columns.items():
                    self._columns.setdefault(name, []).append(value)
                self._ids.append(sample.id)
                self._tokens.append(batch["tokens"][place, -1].float().clone())
            self._seen += 1

    def save(self, path: Path, classes: Sequence[str]) -> None:
        """Write the archive; nothing where no sample was kept."""
        if not self._ids:
            return
        arrays = {name: np.stack(values) for name, values in self._columns.items()}
        arrays |= {
            "pca": principal_colours(torch.stack(self._tokens)),
            "ids": np.array(self._ids),
            "classes": np.array([name or f"class {i}" for i, name in enumerate(classes)]),
        }
        np.savez_compressed(path, allow_pickle=False, **arrays)

    def _image(self, sample: PlanSample) -> np.ndarray:
        """(H, W, 3) uint8: what the encoder saw, before normalisation."""
        from PIL import Image

        from models.encoders.preprocess import crop_box

        encoder = self._feed.config.encoders[self._feed.config.recipe.features]
        (view,) = self._feed.manifests[sample.source].views(sample.item, [sample.views[0].index])
        image = load_image(view.image)
        box = crop_box(image.shape[:2], encoder.height, encoder.width)
        resized = Image.fromarray(image).resize((encoder.width, encoder.height), Image.Resampling.BICUBIC, box=box)
        return np.asarray(resized)


def principal_colours(tokens: Tensor) -> np.ndarray:
    """First three principal components of patch tokens (N, h, w, C), over all N images, as uint8 (N, h, w, 3).

    The 1st and 99th percentile of each component become 0 and 255.
    """
    flat = tokens.flatten(0, 2).double()
    flat = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[:3]
    # The sign of a component is arbitrary; fixing it makes pictures of one model comparable.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    values = flat @ (axes * largest.sign()).T
    if values.shape[1] < 3:
        values = F.pad(values, (0, 3 - values.shape[1]))
    low, high = values.quantile(0.01, dim=0), values.quantile(0.99, dim=0)
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).view(*tokens.shape[:3], 3).numpy()
