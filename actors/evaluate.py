"""Judging a trained run on held-out data: its best weights, loaded; its recipe's metrics, written down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.recipes import Built, Recipe, open_recipe
from actors.trainers.checkpoint import load_weights
from actors.trainers.feed import Feed
from actors.trainers.roles import adapt, best_checkpoint, read_settings
from models.pretrained import save_pretrained
from services.contracts import Split
from services.errors import ResumeError
from services.telemetry import events


def load_trained(recipe: Recipe, feed: Feed, folder: Path) -> tuple[dict[str, Built], int]:
    """Every role of a run folder with its best weights (the moving average where the run kept one), and their step.

    ResumeError when the folder holds no trained model, or one of other settings.
    """
    trained: dict[str, Built] = {}
    step = 0
    for role in recipe.roles:
        settings = read_settings(folder, role)
        found = best_checkpoint(feed.config, folder, feed.plan(Split.TRAIN), role)
        if found is None or settings is None:
            raise ResumeError(
                f"{folder} holds no trained model (role {role}); train it first with `loom3d train name={folder.name}`"
            )
        built = recipe.rebuild(role, settings)
        built = replace(built, module=adapt(feed.config, role, built))
        load_weights(built.module, found, averaged=True)
        built.module.eval()
        trained[role], step = built, found.step
    return trained, step


def evaluate(feed: Feed, folder: Path, *, split: Split | str = Split.TEST, device: str = "cpu") -> dict[str, Any]:
    """Evaluate the model of ``folder`` on ``split``; writes evaluation.json, which it returns.

    The parts that other runs can start from are saved first, below ``weights/``.
    """
    split = Split(split)
    recipe = open_recipe(feed.config)
    trained, step = load_trained(recipe, feed, folder)
    recipe.complete(trained, feed)
    save_parts(recipe, trained, folder, step)
    for built in trained.values():
        built.module.to(device)
    with events.span("evaluation", split=split.value):
        found = recipe.evaluate(trained, feed, folder, split=split, device=device)
    evaluation = {"split": split.value, "step": step, **found}
    _write_json(folder / "evaluation.json", evaluation)
    return evaluation


def save_parts(recipe: Recipe, trained: Mapping[str, Built], folder: Path, step: int) -> list[Path]:
    """Write the trained parts below ``<folder>/weights``; returns their folders."""
    written = []
    for role, built in trained.items():
        for name, part in recipe.parts(role, built.module, built.settings).items():
            target = folder / "weights" / name
            provenance = {"recipe": recipe.config.recipe.name, "run": folder.name, "step": step}
            save_pretrained(part.module, target, part.model, part.settings, extra={"trained_by": provenance})
            written.append(target)
    return written


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)
