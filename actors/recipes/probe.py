"""The recipe ``probe``: heads on frozen features, as papers judge encoders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actors.recipes.base import Built, Facts, Part, Recipe, kept_rows, seeded
from configs import ConfigError
from models.metrics.depth import DepthMetrics
from models.metrics.segmentation import SegmentationMetrics
from models.probe.losses import IGNORE
from models.probe.model import Probe
from models.registry import build, spec
from models.spec import RoleSpec
from services.contracts import Split

if TYPE_CHECKING:
    from actors.trainers.feed import Feed
    from services.streams.plan import EpochPlan

DEPTH_HEADS = ("depth_linear", "depth_dpt")
TERMS = (*DEPTH_HEADS, "segmentation")
CALIBRATION_SAMPLES = 64
"""Training samples that the feature statistics are measured on."""


class ProbeRecipe(Recipe):
    """One role that learns three heads on the features of ``recipe.features``."""

    def terms(self, role: str) -> tuple[str, ...]:  # noqa: ARG002, D102
        return TERMS

    def describe(self, role: str, facts: Facts) -> dict[str, Any]:  # noqa: ARG002
        """Arguments of the model's builder that follow from features and data, under the config's own."""
        outputs = facts.outputs(self.config.recipe.features)
        layers, _, _, channels = outputs["tokens"].shape
        summaries, summary_channels = outputs["summary"].shape
        return {
            "channels": channels,
            "layers": layers,
            "summaries": summaries,
            "summary_channels": summary_channels,
            "classes": max(1, facts.classes),
            **self.config.model.overrides,
        }

    def build(self, role: str, feed: Feed, plan: EpochPlan) -> Built:
        """The heads for this run's features and classes, standardisation measured on the plan's first samples.

        Every rank reads the same global samples, so the statistics do not depend on the number of ranks.
        """
        per_step = plan.micro_batch * len(plan.kinds)
        steps = max(1, min(plan.steps_per_epoch, CALIBRATION_SAMPLES // per_step))
        with closing(feed.load(plan, stop=steps)) as loader:
            batches = [_kept(micro.batch) for step in loader for micro in step.micro_batches]
        built = self.rebuild(role, self.describe(role, Facts.of(feed)))
        assert isinstance(built.module, Probe), "rebuild makes a probe"
        calibrate(built.module, batches)
        return built

    def rebuild(self, role: str, settings: Mapping[str, Any]) -> Built:  # noqa: ARG002, D102
        module, spec = build_probe(self.config.model.name, settings, self.config.seed)
        return Built(module=module, spec=spec, settings=settings)

    def parts(self, role: str, module: nn.Module, settings: Mapping[str, Any]) -> Mapping[str, Part]:  # noqa: ARG002
        """``heads``: all three, with the statistics of the features."""
        return {"heads": Part(module=module, model=self.config.model.name, settings=settings)}

    def tally(self, role: str, feed: Feed) -> Tally:  # noqa: D102
        return Tally(len(feed.targets.classes), self.loss_weights(role))

    def evaluate(  # noqa: D102
        self, trained: Mapping[str, Built], feed: Feed, folder: Path, *, split: Split, device: str
    ) -> dict[str, Any]:
        from actors.recipes.probe_evaluation import evaluate

        return evaluate(self, trained[self.roles[0]], feed, folder, split=split, device=device)


def _kept(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of its own memory: the loader uses its buffers again."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}


def build_probe(name: str, settings: Mapping[str, Any], seed: int) -> tuple[Probe, RoleSpec]:
    """The model with weights that depend on the seed alone, and its role."""
    with seeded(seed):
        module = build(name, **settings)
    if not isinstance(module, Probe):
        raise ConfigError(f"model.name={name}: recipe probe trains a probe-* model")
    return module, spec(name).roles[0]


def calibrate(module: Probe, batches: Iterable[Mapping[str, Any]]) -> None:
    """Measure the feature statistics on training batches; samples of weight 0 are left out."""
    kept = (kept_rows(batch, batch["weight"] > 0) for batch in batches)
    module.calibrate((b["tokens"].clone(), b["summary"].clone(), b["depth"]) for b in kept if len(b["depth"]))


class Tally:
    """Losses and metrics of the heads over a split, as sums that add up over ranks."""

    def __init__(self, classes: int, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self.sums = dict.fromkeys(weights, 0.0)
        self.counts = dict.fromkeys(weights, 0.0)
        self.depth = {head: DepthMetrics() for head in DEPTH_HEADS}
        self.segmentation = SegmentationMetrics(max(1, classes), ignore=IGNORE)
        self.samples = 0

    @torch.no_grad()
    def update(
        self, module: nn.Module, role: RoleSpec, batch: Mapping[str, Any], received: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Add a batch; returns the predictions for its samples of weight above 0: depths in metres, class ids."""
        batch = kept_rows(batch, batch["weight"] > 0)
        if not len(batch["weight"]):
            return {}
        for term, value in role.step(module, batch, received or {}).sums.items():
            self.sums[term] += float(value)
        for term, count in role.counts(batch).items():
            self.counts[term] += count
        height, width = batch["depth"].shape[-2:]
        raw = module(batch["tokens"], batch["summary"], (height, width))
        predicted = {head: raw[head].exp() for head in DEPTH_HEADS}
        predicted["segmentation"] = raw["segmentation"].argmax(1)
        for head in DEPTH_HEADS:
            self.depth[head].update(predicted[head], batch["depth"])
        self.segmentation.update(predicted["segmentation"], batch["labels"])
        self.samples += len(batch["weight"])
        return predicted

    def merge(self, other: Tally) -> None:
        """Add what another rank saw."""
        for term in self.sums:
            self.sums[term] += other.sums[term]
            self.counts[term] += other.counts[term]
        for head in DEPTH_HEADS:
            self.depth[head].merge(other.depth[head])
        self.segmentation.merge(other.segmentation)
        self.samples += other.samples

    def compute(self) -> dict[str, float]:
        """``loss`` and ``loss/<term>``, ``<head>/abs_rel``, ``<head>/delta1``, ``segmentation/miou`` ..."""
        terms = {term: self.sums[term] / self.counts[term] for term in self.sums if self.counts[term]}
        numbers = {"loss": math.fsum(self.weights[term] * value for term, value in terms.items())}
        numbers |= {f"loss/{term}": value for term, value in terms.items()}
        for head in DEPTH_HEADS:
            numbers |= {f"{head}/{name}": value for name, value in self.depth[head].compute().items()}
        return numbers | {f"segmentation/{name}": value for name, value in self.segmentation.compute().items()}
