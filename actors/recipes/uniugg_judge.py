"""Judging UniUGG's third phase: losses, answers to questions, and imagined views, each beside its baselines.

``evaluate.samples`` limits how many pairs, conversations and questions are judged, each evenly spread over the split.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actors.recipes.base import Built, LossTally, Recipe, row, to_kept
from actors.recipes.pictures import Album
from actors.recipes.samples import load_samples, planned
from actors.recipes.uniugg_answers import TokenReader, judge_answers
from actors.recipes.uniugg_views import TRAINED, ViewJudge
from actors.trainers.tensors import fill
from configs import ConfigError
from models.errors import WeightsError
from models.uniugg.llm import CONVERSATION, GENERATION, UniuggLLM, predicted
from models.uniugg.pipeline import Pipeline
from models.uniugg.unified import LLM
from services.contracts import Split
from services.errors import DataError
from services.streams.inputs import JUDGE
from services.telemetry import events

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

_log = logging.getLogger("loom3d")

BEFORE = "before training"
"""The roles as the run began with them: at random, or as an earlier run left them."""
TERMS: Mapping[str, str] = {"ce": "text/ce", "noise": "diffusion/noise_mse", "token_regression": "tokens/regression"}
"""Loss term -> name of the metric: the mean over supervised tokens, latent elements, target tokens."""


def evaluate(
    recipe: Recipe, trained: Mapping[str, Built], feed: Feed, folder: Path, *, split: Split, device: str
) -> dict[str, Any]:
    """Judge the roles on ``split``: ``{"samples": n, "metrics": ...}``; pictures and tables go into ``folder``.

    Roles before this run's training are judged on the same samples with the same draws.
    """
    roles = {TRAINED: dict(trained), BEFORE: before_training(recipe, trained, device)}
    losses = {name: Losses(recipe, found) for name, found in roles.items()}
    album, samples = Album(folder), 0
    metrics: dict[str, dict[str, Any]] = {}
    with closing(feed.for_role(JUDGE)) as judge:
        if GENERATION in judge.inputs:
            with events.span("generation", split=split.value):
                found, pairs = _generation(roles, losses, judge, album, folder, split, device)
            metrics, samples = metrics | found, samples + pairs
        if CONVERSATION in judge.inputs:
            with events.span("conversations", split=split.value):
                models = {name: found[LLM].module for name, found in roles.items()}
                scale = judge.config.recipe.uniugg.translation_scale
                guessed = functools.partial(_guessed, translation_scale=scale)
                seen, accuracy = conversations(losses, models, judge, split, device, guessed=guessed)
                samples, metrics = samples + seen, metrics | accuracy
                reader = TokenReader(judge)
                metrics |= judge_answers(models, judge, album, split=split, device=device, reader=reader)
    if not samples:
        raise DataError(
            f"the {split.value} split has no sample that can be read; look at `loom3d data pairs` and "
            "`loom3d data check`"
        )
    album.save()
    return {"samples": samples, "metrics": {**loss_rows(losses), **metrics}}


class Losses:
    """Loss terms of all roles of a recipe on the same micro-batches, in one process."""

    def __init__(self, recipe: Recipe, roles: Mapping[str, Built]) -> None:
        self._roles = roles
        self._tallies = {role: LossTally(weights=recipe.loss_weights(role)) for role in roles}

    def update(self, batch: Mapping[str, Any]) -> None:
        """Add a batch; what one role sends, the next receives."""
        received: Mapping[str, Tensor] = {}
        for role, built in self._roles.items():
            if built.spec.takes_part(batch["kind"]):
                received = self._tallies[role].update(built.module, built.spec, batch, received)

    def compute(self) -> dict[str, float]:
        """Term -> mean."""
        found: dict[str, float] = {}
        for tally in self._tallies.values():
            found |= {name.removeprefix("loss/"): value for name, value in tally.compute().items() if name != "loss"}
        return found


def before_training(recipe: Recipe, trained: Mapping[str, Built], device: str) -> dict[str, Built]:
    """The roles as the run began with them."""
    found = {}
    for role, built in trained.items():
        before = recipe.rebuild(role, built.settings)
        fill(before.module, before.weights or {})
        found[role] = replace(before, module=before.module.eval().to(device))
    return found


def loss_rows(losses: Mapping[str, Losses]) -> dict[str, dict[str, Any]]:
    """Each term beside what it was before training, as rows of an evaluation."""
    values, before = losses[TRAINED].compute(), losses[BEFORE].compute()
    return {TERMS[term]: row(value, before[term], BEFORE, "lower") for term, value in values.items()}


def conversations(
    losses: Mapping[str, Losses],
    models: Mapping[str, nn.Module],
    judge: Feed,
    split: Split,
    device: str,
    *,
    guessed: Callable[[nn.Module, Mapping[str, Any]], tuple[int, int]],
) -> tuple[int, dict[str, dict[str, Any]]]:
    """What is answered in the split, questions and captions alike, token by token with the true tokens before it.

    Adds the cross-entropy to ``losses``; returns the samples, and the share of tokens that are guessed first, which
    ``guessed`` counts, among how many.
    """
    limit, size, seen = judge.config.evaluate.samples, judge.config.trainer.micro_batch, 0
    chosen = planned(judge, split, CONVERSATION, limit)
    right, tokens = dict.fromkeys(models, 0), 0
    for batch, _ in load_samples(judge, chosen, split=split, batch_size=size):
        kept = to_kept(batch, device)
        seen += len(kept["weight"])
        if not len(kept["weight"]):
            continue
        for tally in losses.values():
            tally.update(kept)
        asked = 0
        for name, module in models.items():
            found, asked = guessed(module, kept)
            right[name] += found
        tokens += asked
    if not tokens:
        return seen, {}
    share = {name: count / tokens for name, count in right.items()}
    return seen, {"text/token_accuracy": row(share[TRAINED], share[BEFORE], BEFORE, "higher")}


@torch.no_grad()
def _guessed(module: nn.Module, batch: Mapping[str, Any], translation_scale: str) -> tuple[int, int]:
    """(how many supervised tokens are the likeliest after what stands before them, how many there are)."""
    assert isinstance(module, UniuggLLM), "the llm role is a UniUGG LLM"
    asked = predicted(batch)
    hidden = module.hidden(module.embed(batch, translation_scale), batch["input_ids"])
    likeliest = module.logits(hidden[:, :-1][asked]).argmax(-1)
    return int((likeliest == batch["input_ids"][:, 1:][asked]).sum()), int(asked.sum())


def _generation(
    roles: Mapping[str, Mapping[str, Built]],
    losses: Mapping[str, Losses],
    judge: Feed,
    album: Album,
    folder: Path,
    split: Split,
    device: str,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Losses of pairs, and imagined views where the parts are there that draw them; metrics and number of pairs."""
    config = judge.config
    chosen, views, seen = planned(judge, split, GENERATION, config.evaluate.samples), None, 0
    parts = decoding_parts(judge, folder, device)
    for batch, _ in load_samples(judge, chosen, split=split, batch_size=config.generate.batch_size):
        kept = to_kept(batch, device)
        if not len(kept["weight"]):
            continue
        for tally in losses.values():
            tally.update(kept)
        if parts is not None:
            if views is None:
                views = ViewJudge(judge, _pipelines(roles, parts, judge, kept), device=device)
            views.update(kept)
        seen += len(kept["weight"])
    return (views.finish(album) if views is not None else {}), seen


def decoding_parts(judge: Feed, folder: Path, device: str) -> dict[str, nn.Module] | None:
    """VAE and spatial decoder behind the run's encoders; None, with a warning, where there are none.

    Of encoders that are not ours, or are random, nothing was ever trained that could turn tokens into a view.
    """
    from actors.parts import find_parts
    from models.pretrained import load_pretrained

    try:
        found = find_parts(judge.config, folder, without=("encoder", "llm", "diffusion"))
    except (WeightsError, ConfigError) as error:
        _log.warning("imagined views are not judged, only losses: %s", error)
        return None
    return {name: load_pretrained(place).eval().to(device) for name, place in found.items()}


def _pipelines(
    roles: Mapping[str, Mapping[str, Built]], parts: Mapping[str, nn.Module], judge: Feed, batch: Mapping[str, Any]
) -> dict[str, Pipeline]:
    """Trained, and before training: each with the same frozen parts."""
    vit = judge.config.encoders["vit"]
    return {
        name: Pipeline(
            {**parts, **{role: built.module for role, built in found.items()}},
            prompt=batch["input_ids"][0].tolist(),
            size=(vit.height, vit.width),
            translation_scale=judge.config.recipe.uniugg.translation_scale,
            sees=False,
        )
        for name, found in roles.items()
    }
