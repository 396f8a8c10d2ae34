"""Judging Spa3-VLM: cross-entropy and answers, each beside what the model was before, and beside guessing blindly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actors.recipes.base import Built, Recipe
from actors.recipes.pictures import Album
from actors.recipes.uniugg_answers import Asked, judge_answers
from actors.recipes.uniugg_judge import BEFORE, TRAINED, Losses, before_training, conversations, loss_rows
from models.spa3r.vlm.answers import VISUAL_COLUMNS, generate_text
from models.spa3r.vlm.model import Spa3VLM, supervised_tokens
from services.contracts import Split
from services.errors import DataError
from services.streams.frames import FrameTexts
from services.streams.inputs import JUDGE
from services.telemetry import events

if TYPE_CHECKING:
    from actors.trainers.feed import Feed


def judge(
    recipe: Recipe, trained: Mapping[str, Built], feed: Feed, folder: Path, *, split: Split, device: str
) -> dict[str, Any]:
    """Judge the role on ``split``: ``{"samples": n, "metrics": ...}``; tables of answers go into ``folder``."""
    roles = {TRAINED: dict(trained), BEFORE: before_training(recipe, trained, device)}
    losses = {name: Losses(recipe, found) for name, found in roles.items()}
    models = {name: found[recipe.roles[0]].module for name, found in roles.items()}
    album = Album(folder)
    with closing(feed.for_role(JUDGE)) as judged, events.span("conversations", split=split.value):
        samples, metrics = conversations(losses, models, judged, split, device, guessed=_guessed)
        metrics |= judge_answers(models, judged, album, split=split, device=device, reader=FrameReader(judged))
    if not samples:
        raise DataError(
            f"the {split.value} split has no conversation that can be read; look at `loom3d data show` and "
            "`loom3d data check`"
        )
    album.save()
    return {"samples": samples, "metrics": {**loss_rows(losses), **metrics}}


@torch.no_grad()
def _guessed(module: nn.Module, batch: Mapping[str, Any]) -> tuple[int, int]:
    """(how many supervised tokens are the likeliest after what stands before them, how many there are)."""
    assert isinstance(module, Spa3VLM), "the recipe makes this model"
    hidden = module.hidden(batch)
    rows, source, target = supervised_tokens(batch)
    likeliest = module.logits(hidden[rows, source]).argmax(-1)
    return int((likeliest == batch["input_ids"][rows, target]).sum()), len(rows)


class FrameReader:
    """How Spa3-VLM is asked: a block for each frame, by its grid; the frames are read once for all questions."""

    def __init__(self, judge: Feed) -> None:
        assert isinstance(judge.texts, FrameTexts), "the recipe declares frames"
        self._config, self._frames = judge.config, judge.texts
        self.texts = judge.texts.columns

    def prompt(self, one: Asked, batch: Mapping[str, Any]) -> list[int]:
        """Token ids up to where the answer begins. DataError when they are too many."""
        number = int(batch["grids_lengths"][0, 0])
        counts = [int(rows * columns) for rows, columns in batch["grids"][0, :number].tolist()]
        if counts and self._frames.appended:
            counts[-1] += batch[self._frames.appended].shape[1]
        ids: list[int] = self.texts.question(one.prompt, counts)["input_ids"].data.tolist()
        return ids

    def generate(
        self,
        module: nn.Module,
        prompts: Sequence[Sequence[int]],
        batch: Mapping[str, Any],
        *,
        max_new_tokens: int,
        device: str,
    ) -> list[list[int]]:
        """Token ids, at most ``max_new_tokens``, of answers about the pictures of the only sample of a batch."""
        assert isinstance(module, Spa3VLM), "the recipe makes this model"
        scene = {}
        if int(batch["grids_lengths"][0, 0]):
            scene = {name: batch[name].to(device) for name in VISUAL_COLUMNS if name in batch}
        return generate_text(
            module,
            prompts,
            scene,
            max_new_tokens=max_new_tokens,
            stop=(self.texts.end_of_turn,),
            batch_size=self._config.generate.batch_size,
        )
