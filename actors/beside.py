"""The run that another is always compared with: trained before it, found again where it is there, its scores beside.

Which run that is, a recipe says (:meth:`actors.recipes.Recipe.baseline`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import configs
from actors.recipes import open_recipe
from actors.recipes.base import Baseline
from actors.trainers.roles import deciding_settings
from configs import ConfigError, RunConfig
from services.contracts import Split

EVALUATION, JUDGED_BY = "evaluation.json", "judged_by"
"""File of a run's scores; its key with the digest of the settings that they depend on."""
_DESCRIBING = ("recipe", "size", "name", "recipe.name")
"""Overrides that say which run is meant."""

_log = logging.getLogger("loom3d")


def judged_by(config: RunConfig) -> str:
    """Digest of what the scores of a run depend on beside its weights: how it is judged, and on which data."""
    chosen = {name: dataclasses.asdict(getattr(config, name)) for name in ("evaluate", "generate", "data")}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()


def train_first(config: RunConfig, folder: Path, train: Callable[[RunConfig], object]) -> None:
    """Train and judge the run that the one in ``folder`` is compared with, unless it is there.

    ConfigError for one that was named, and is not there or is no run of this kind.
    """
    baseline = open_recipe(config).baseline(folder.name)
    if baseline is None:
        return
    place = folder.with_name(baseline.name)
    if baseline.config is None:
        _check_named(config, baseline, place)
        return
    if _is_there(baseline.config, place):
        _log.info("beside this run stands %s (%s), which is there", baseline.name, baseline.title)
        return
    _log.info("first %s (%s), which this run is compared with", baseline.name, baseline.title)
    train(baseline.config)


def judge_first(
    config: RunConfig, folder: Path, overrides: Sequence[str], split: Split, judge: Callable[[str, list[str]], object]
) -> None:
    """Have the run that the one in ``folder`` is compared with judged in the same way, unless it was.

    ``judge`` is given its folder and the overrides that say how.
    """
    baseline = open_recipe(config).baseline(folder.name)
    if baseline is None:
        return
    place = folder.with_name(baseline.name)
    found = _evaluation(place)
    if not found or (found["split"] == split and found.get(JUDGED_BY) == judged_by(config)):
        return  # one that was never judged is named by add_scores
    _log.info("first %s, which run %s is compared with", baseline.name, folder.name)
    apart = {*_DESCRIBING, *baseline.keys}
    judge(str(place), [text for text in overrides if text.partition("=")[0] not in apart])


def add_scores(config: RunConfig, folder: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The evaluation with the scores of the run it is compared with: in every metric's ``also``, under its name.

    ``beside`` says which run that is, or why it has no scores.
    """
    baseline = open_recipe(config).baseline(folder.name)
    if baseline is None:
        return evaluation
    told = {"run": baseline.name, "what": baseline.title}
    other = _evaluation(folder.with_name(baseline.name))
    reason = _not_comparable(evaluation, other)
    if reason:
        _log.warning("no scores of %s stand beside: %s", baseline.name, reason)
        return {**evaluation, "beside": {**told, "missing": reason}}
    metrics: dict[str, Any] = {}
    for name, row in evaluation["metrics"].items():
        found = other["metrics"].get(name)
        also = {**row.get("also", {}), **({baseline.name: found["value"]} if found else {})}
        metrics[name] = {**row, "also": also} if also else row
    return {**evaluation, "metrics": metrics, "beside": {**told, "step": other["step"]}}


def _not_comparable(evaluation: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why scores cannot stand beside each other; "" where they can."""
    if not other:
        return "it was not judged"
    for name in ("split", "samples"):
        if other.get(name) != evaluation.get(name):
            return f"it was judged on {name}={other.get(name)}, this run on {name}={evaluation.get(name)}"
    return ""


def _is_there(config: RunConfig, place: Path) -> bool:
    """Whether a run of this configuration was trained and judged as this one will be."""
    from services.features.encode import pin_weights

    found, saved = _evaluation(place), place / "config.yaml"
    if found.get("split") != Split.TEST or found.get(JUDGED_BY) != judged_by(config) or not saved.is_file():
        return False
    return deciding_settings(configs.load(file=saved)) == deciding_settings(pin_weights(config))


def _check_named(config: RunConfig, baseline: Baseline, place: Path) -> None:
    saved = place / "config.yaml"
    if not saved.is_file() or not _evaluation(place):
        raise ConfigError(
            f"the run {baseline.name!r} to compare with ({baseline.title}) is not there, or was not judged: {place} "
            f"has no {EVALUATION if saved.is_file() else saved.name}; train it first, or let this run train its own"
        )
    other = configs.load(file=saved)
    if other.recipe.name != config.recipe.name or open_recipe(other).baseline(place.name) is not None:
        raise ConfigError(
            f"the run {baseline.name!r} to compare with is of recipe {other.recipe.name} and no baseline "
            f"({baseline.title}) itself; name one that is"
        )


def _evaluation(place: Path) -> dict[str, Any]:
    path = place / EVALUATION
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
