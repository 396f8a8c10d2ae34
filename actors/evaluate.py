"""Judging a trained run on held-out data: its best weights, loaded; its recipe's metrics, written down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors import beside
from actors.recipes import Built, Recipe, open_recipe
from actors.trainers.adapters import save_updates
from actors.trainers.checkpoint import load_weights
from actors.trainers.feed import Feed
from actors.trainers.lora import has_lora
from actors.trainers.roles import adapt, best_checkpoint, deciding_settings, read_settings
from actors.trainers.tensors import fill
from configs import ConfigError, RunConfig
from configs.roles import role_config
from models.encoders.uniugg import READS
from models.pretrained import CONFIG, describe_pretrained, save_pretrained
from services.contracts import Split
from services.errors import ResumeError
from services.streams.plan import EpochPlan
from services.telemetry import events
from services.telemetry.progress import counting

TRAINED_BY = "trained_by"
"""Key of a part's config.json: which run wrote it, and from which step."""


def load_trained(
    recipe: Recipe, feed: Feed, folder: Path, *, plan: EpochPlan | None = None
) -> tuple[dict[str, Built], int]:
    """Every role of a run folder with its best weights (the moving average where the run kept one), and their step.

    ``plan`` is that of the training, by default of the feed's training split. ResumeError when the folder holds no
    trained model, or one of other settings or data.
    """
    plan = feed.plan(Split.TRAIN) if plan is None else plan
    trained: dict[str, Built] = {}
    step = 0
    for role in recipe.roles:
        settings = read_settings(folder, role)
        found = best_checkpoint(feed.config, folder, plan, role)
        if found is None or settings is None:
            raise ResumeError(
                f"{folder} holds no trained model (role {role}); train it first with `loom3d train name={folder.name}`"
            )
        if found.manifest["plan"] != plan.digest:
            raise ResumeError(
                f"{found.folder} was trained on other data, or with another quarantine list (the plan's digest "
                "changed): restore data.sources as they were, with the files that they name; sources may be added"
            )
        built = recipe.rebuild(role, settings)
        built = replace(built, module=adapt(feed.config, role, built))
        fill(built.module, built.weights or {})
        load_weights(built.module, found, averaged=True)
        built.module.eval()
        trained[role], step = built, found.step
    return trained, step


def evaluate(
    feed: Feed,
    folder: Path,
    *,
    split: Split | str = Split.TEST,
    device: str = "cpu",
    plan: EpochPlan | None = None,
) -> dict[str, Any]:
    """Evaluate the model of ``folder`` on ``split``; writes evaluation.json, which it returns.

    The parts that other runs can start from are saved first, below ``weights/``. With ``plan``, that of a training that
    is over, the parts of its best step that are there stay as they are: others may have started from them.
    """
    split = Split(split)
    recipe = open_recipe(feed.config)
    trained, step = load_trained(recipe, feed, folder, plan=plan)
    if not (plan is not None and has_parts(recipe, trained, folder, step)):
        recipe.complete(trained, feed)
        save_parts(recipe, trained, folder, step)
    for built in trained.values():
        built.module.to(device)
    with events.span("evaluation", split=split.value):
        found = recipe.evaluate(trained, feed, folder, split=split, device=device)
    judged = {"split": split.value, "step": step, beside.JUDGED_BY: beside.judged_by(feed.config), **found}
    evaluation = beside.add_scores(feed.config, folder, judged)
    _write_json(folder / beside.EVALUATION, evaluation)
    return evaluation


def evaluate_run(
    run: str, overrides: Sequence[str], *, file: str | None = None, split: Split | str = Split.TEST
) -> tuple[Path, dict[str, Any]]:
    """Judge a finished run again and write its report anew; returns the report, and what evaluation.json now holds.

    Everything runs in this process. A run that its recipe compares it with is judged alike first. Parts that other runs
    may have started from are not written again.

    Args:
        run: its folder or name; "" for the run that ``overrides`` describe.
        overrides: keys may change how the run is judged (``evaluate.*``, ``generate.*``), and on which data, but
            nothing that decided what was trained: ConfigError names it. Sources may be added (a benchmark, say), those
            that it was trained on must stay as they were.
        file: a saved configuration that describes the run, as ``--config``.
        split: train | val | test.
    """
    import torch

    from actors.parts import open_run
    from actors.preflight.missing import missing_files
    from actors.report import write_report
    from services.data.leakage import refuse_leaks
    from services.data.sources import open_sources
    from services.features.client import FeatureClient
    from services.features.encode import pin_weights
    from services.features.sink import open_store
    from services.streams.targets import class_names

    folder, config = open_run(run, overrides, file)
    _, saved = open_run(str(folder))
    check_unchanged(saved, config)
    absent = list(missing_files(config))
    if absent:
        raise ConfigError("; ".join(absent))
    beside.judge_first(
        config, folder, overrides, Split(split), lambda place, keys: evaluate_run(place, keys, split=split)
    )
    config = pin_weights(config)
    store = open_store(config)
    with counting("", config.logger.progress) as show:
        manifests = open_sources(config, progress=show)
    refuse_leaks(config, manifests)
    with (
        closing(FeatureClient(config, store)) as client,
        closing(Feed.open(config, manifests, client, store)) as feed,
    ):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        known = {name: manifests[name] for name in saved.data.sources}
        _check_classes(folder, class_names(known), class_names(manifests))
        plan = EpochPlan(saved, known, quarantine=feed.quarantine)
        evaluation = evaluate(feed, folder, split=split, device=device, plan=plan)
    return write_report(folder), evaluation


def check_unchanged(saved: RunConfig, config: RunConfig) -> None:
    """ConfigError with the keys, if ``config`` would have trained another model than ``saved`` on the same data."""
    then, now = deciding_settings(saved), deciding_settings(config)
    differing = [
        f"{key}={now.get(key)!r} (trained with {then.get(key)!r})"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{'; '.join(differing)}: this decided what was trained, and cannot be changed for an evaluation. Leave it "
            "out, or train another run with it"
        )


def _check_classes(folder: Path, then: Sequence[str], now: Sequence[str]) -> None:
    """ConfigError if sources that were added give other numbers to the classes that a role has learnt to name."""
    roles = [json.loads(path.read_text()) for path in sorted((folder / "models").glob("*.json"))]
    if any(settings.get("classes") for settings in roles) and tuple(then) != tuple(now):
        raise ConfigError(
            f"data.sources: with the sources that were added there are {len(now)} semantic classes, the run was "
            f"trained with {len(then)}, which would be mistaken for each other; judge it on its own sources"
        )


def has_parts(recipe: Recipe, trained: Mapping[str, Built], folder: Path, step: int) -> bool:
    """Whether :func:`save_parts` has already written all parts of this step of the run."""
    found = []
    for role, built in trained.items():
        for name in recipe.parts(role, built.module, built.settings):
            place = folder / "weights" / name
            described = describe_pretrained(place) if (place / CONFIG).is_file() else {}
            found.append(described.get(TRAINED_BY) == _provenance(recipe, folder, step))
    return all(found)


def _provenance(recipe: Recipe, folder: Path, step: int) -> dict[str, Any]:
    return {"recipe": recipe.config.recipe.name, "run": folder.name, "step": step}


def save_parts(recipe: Recipe, trained: Mapping[str, Built], folder: Path, step: int) -> list[Path]:
    """Write the trained parts below ``<folder>/weights``; returns their folders.

    Low-rank updates are merged into what is written, and lie alone in ``<part>-adapter`` beside it.
    """
    written = []
    for role, built in trained.items():
        for name, part in recipe.parts(role, built.module, built.settings).items():
            target = folder / "weights" / name
            extra: dict[str, Any] = {TRAINED_BY: _provenance(recipe, folder, step), **part.about}
            tensors = None
            if part.reads:
                extra[READS] = part.reads
            if has_lora(part.module):
                peft = role_config(recipe.config, role).peft
                tensors, described = save_updates(target, part.module, built.spec, peft)
                extra |= described
            save_pretrained(part.module, target, part.model, part.settings, tensors=tensors, extra=extra)
            written.append(target)
    return written


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)
