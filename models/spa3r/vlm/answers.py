"""Greedy answers to questions about one scene: its frames are read once, for all questions, now and later.

The prefix (system message, frames) goes through the network once and leaves its keys and values. What is left of
each question is padded on the right and read behind a copy of them; then tokens are added, each question at its own
position, which begins where the prefix ends.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.errors import ModelError
from models.spa3r.vlm.model import Spa3VLM
from models.spa3r.vlm.packing import shared_start

VISUAL_COLUMNS = ("visual", "visual_lengths", "grids", "grids_lengths", "latents", "latents_lengths")


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What all questions about a scene begin with, read once."""

    ids: tuple[int, ...]
    cache: Any
    """Keys and values of the prefix, one row; never changed."""
    end: int
    """M-RoPE position at which a question begins."""


@torch.no_grad()
def read_prefix(model: Spa3VLM, ids: Sequence[int], scene: Mapping[str, Tensor]) -> Prefix:
    """Read the beginning that all questions share.

    Args:
        model: in eval mode.
        ids: tokens of the prefix, with a placeholder for each visual token; may be empty.
        scene: columns ``visual`` (1, N, C), ``grids`` (1, F, 2), ``latents`` (1, Q, D) of one sample; {} for text.
    """
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.language.config.get_text_config())
    if not ids:
        return Prefix(ids=(), cache=cache, end=0)
    device = model.language.get_input_embeddings().weight.device
    unknown = sorted(set(scene) - set(VISUAL_COLUMNS))
    if unknown:
        raise ModelError(f"a scene has the columns {', '.join(VISUAL_COLUMNS)}; got {unknown}")
    batch: dict[str, Any] = {name: column.to(device) for name, column in scene.items()}
    row = torch.tensor([list(ids)], device=device)
    batch |= {"id": ["the scene"], "input_ids": row, "segments": torch.zeros_like(row)}
    # One token more, to learn where a question begins.
    longer = {**batch, "input_ids": torch.cat([row, torch.zeros_like(row[:, :1])], dim=1)}
    longer["segments"] = torch.zeros_like(longer["input_ids"])
    model.hidden(batch, past=cache)
    return Prefix(ids=tuple(ids), cache=cache, end=int(model.positions(longer)[0, 0, -1]))


@torch.no_grad()
def answer(
    model: Spa3VLM,
    prefix: Prefix,
    questions: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Collection[int],
    batch_size: int = 0,
) -> list[list[int]]:
    """Token ids of the greedy answer to each question.

    Args:
        model: in eval mode.
        prefix: of the scene, from :func:`read_prefix`.
        questions: tokens behind the prefix, up to where the answer begins; without image tokens.
        max_new_tokens: longest answer.
        stop: tokens that end an answer; they are not part of it.
        batch_size: questions at once, each with a copy of the prefix's keys and values; 0 takes all.
    """
    if any(not len(question) or model.image_token_id in question for question in questions):
        raise ModelError("a question is text behind the shared prefix: at least one token, and no image token")
    size = batch_size or len(questions)
    answers: list[list[int]] = []
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        answers += _Reading(model, prefix, part).answers(max_new_tokens, frozenset(stop))
    return answers


def generate_text(
    model: Spa3VLM,
    questions: Sequence[Sequence[int]],
    scene: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    stop: Collection[int],
    batch_size: int = 0,
) -> list[list[int]]:
    """Greedy answers to whole prompts (prefix and question in one) about one scene; see :func:`answer`.

    ModelError when the prompts do not all begin with the same frames.
    """
    if not questions:
        return []
    common = shared_start(questions)
    prefix = read_prefix(model, list(questions[0])[:common], scene)
    rest = [list(question)[common:] for question in questions]
    return answer(model, prefix, rest, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size)


class _Reading:
    """Some questions behind one prefix, while they are answered."""

    def __init__(self, model: Spa3VLM, prefix: Prefix, questions: Sequence[Sequence[int]]) -> None:
        self.model, self.prefix = model, prefix
        self.embedding = model.language.get_input_embeddings()
        device = self.embedding.weight.device
        self.lengths = torch.tensor([len(question) for question in questions], device=device)
        self.rows = torch.zeros(len(questions), int(self.lengths.max()), dtype=torch.long, device=device)
        for row, question in zip(self.rows, questions, strict=True):
            row[: len(question)] = torch.tensor(list(question), device=device)
        self.cache = copy.deepcopy(prefix.cache)
        if prefix.ids:
            self.cache.batch_repeat_interleave(len(questions))

    def answers(self, limit: int, stop: frozenset[int]) -> list[list[int]]:
        """Add tokens until every answer has ended."""
        found: list[list[int]] = [[] for _ in range(len(self.rows))]
        going = [True] * len(found)
        last, mask = self._read()
        for index in range(limit):
            chosen = self.model.logits(last).argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                going[row] = going[row] and token not in stop
                if going[row]:
                    found[row].append(token)
            if not any(going) or index + 1 == limit:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            places = (self.prefix.end + self.lengths + index)[:, None]
            last = self._run(chosen[:, None], places, mask)[:, -1]
        return found

    def _read(self) -> tuple[Tensor, Tensor]:
        """States (B, width) that predict each answer's first token, and which positions are there (B, L)."""
        number, width = self.rows.shape
        span = torch.arange(width, device=self.rows.device)
        front = torch.ones(number, len(self.prefix.ids), dtype=torch.long, device=self.rows.device)
        mask = torch.cat([front, (span < self.lengths[:, None]).long()], dim=1)
        states = self._run(self.rows, (self.prefix.end + span).expand(number, -1), mask)
        return states[torch.arange(number, device=self.rows.device), self.lengths - 1], mask

    def _run(self, ids: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        positions = places[None].expand(3, -1, -1)
        return self.model.run(self.embedding(ids), positions, mask=mask, past=self.cache)
