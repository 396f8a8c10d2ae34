"""What a role that learns heads on frozen features adds to the loop: building, calibrating, and judging a probe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from configs import ConfigError
from configs.schema import RunConfig
from models.metrics.depth import DepthMetrics
from models.metrics.segmentation import SegmentationMetrics
from models.probe.losses import IGNORE
from models.probe.model import Probe
from models.registry import build, spec
from models.spec import RoleSpec

DEPTH_HEADS = ("depth_linear", "depth_dpt")
TERMS = (*DEPTH_HEADS, "segmentation")
CALIBRATION_SAMPLES = 64
"""Training samples that the feature statistics are measured on."""


def loss_weights(config: RunConfig) -> dict[str, float]:
    """Weight of each loss term: ``recipe.losses``, 1 where it says nothing. ConfigError for a term there is not."""
    unknown = sorted(set(config.recipe.losses) - set(TERMS))
    if unknown:
        raise ConfigError(f"recipe.losses has {unknown[0]!r}; the terms of recipe probe are {', '.join(TERMS)}")
    return {term: config.recipe.losses.get(term, 1.0) for term in TERMS}


def model_settings(config: RunConfig, batch: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """Arguments of the model's builder that follow from a batch of features and the data, under the config's own."""
    tokens, summary = batch["tokens"], batch["summary"]
    return {
        "channels": tokens.shape[-1],
        "layers": tokens.shape[1],
        "summaries": summary.shape[1],
        "summary_channels": summary.shape[2],
        "classes": max(1, classes),
        **config.model.overrides,
    }


def build_probe(name: str, settings: Mapping[str, Any], seed: int) -> tuple[Probe, RoleSpec]:
    """The model with weights that depend on the seed alone, and its role."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(name, **settings)
    if not isinstance(module, Probe):
        raise ConfigError(f"model.name={name}: recipe probe trains a probe-* model")
    return module, spec(name).roles[0]


def calibrate(module: Probe, batches: Iterable[Mapping[str, Any]]) -> None:
    """Measure the feature statistics on training batches; samples of weight 0 are left out."""
    kept = (rows(batch, batch["weight"] > 0) for batch in batches)
    module.calibrate((b["tokens"].clone(), b["summary"].clone(), b["depth"]) for b in kept if len(b["depth"]))


def rows(batch: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
    """The tensors of a batch at the samples where ``keep`` (B,) is true."""
    return {name: value[keep] for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}


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
    def update(self, module: nn.Module, role: RoleSpec, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Add a batch; returns the predictions for its samples of weight above 0: depths in metres, class ids."""
        batch = rows(batch, batch["weight"] > 0)
        if not len(batch["weight"]):
            return {}
        for term, value in role.step(module, batch, {}).sums.items():
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
