"""Answers of the language model: several questions about the same views in one batch, the views read once.

What all questions begin with (system message, views) goes through the model once; its keys and values are shared.
What is left of each is padded on the right, then tokens are added greedily, each question at its own position. Many
questions are answered some at a time, from copies of the shared keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from models.uniugg.llm import CONVERSATION, UniuggLLM


def shared_prefix(questions: Sequence[Sequence[int]]) -> int:
    """Tokens that all questions begin with; at least one of each is left, which the first answer follows."""
    shortest = min(questions, key=len)
    common = next(
        (place for place, token in enumerate(shortest) if any(question[place] != token for question in questions)),
        len(shortest),
    )
    return min(common, len(shortest) - 1)


@torch.no_grad()
def generate_text(
    llm: UniuggLLM,
    questions: Sequence[Sequence[int]],
    tokens: Tensor | None,
    *,
    max_new_tokens: int,
    stop: Collection[int],
    batch_size: int = 0,
) -> list[list[int]]:
    """Greedy answers to questions about the same views.

    Args:
        llm: in eval mode.
        questions: token ids with placeholders for the patch tokens, up to where the answer begins.
        tokens: (V, h, w, C) patch tokens of the views, in the order of the placeholders; None without views.
        max_new_tokens: longest answer.
        stop: tokens that end an answer; they are not part of it.
        batch_size: questions at once, each of which holds keys and values of its own; 0 takes all.
    """
    from transformers import DynamicCache

    if not questions:
        return []
    device = next(llm.parameters()).device
    common = shared_prefix(questions)
    cache: Any = DynamicCache(config=llm.language.config)
    size = batch_size or len(questions)
    answers: list[list[int]] = []
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        rows, lengths = _padded(part, device)
        shared, rest = _embed(llm, rows, tokens, common, part)
        if common and not start:
            llm.language.base_model(inputs_embeds=shared, past_key_values=cache, use_cache=True)
        last, mask, grown = _read(llm, rest, lengths, common, copy.deepcopy(cache))
        answers += _decode(llm, last, mask, lengths, grown, max_new_tokens, frozenset(stop))
    return answers


def _read(llm: UniuggLLM, rest: Tensor, lengths: Tensor, common: int, cache: Any) -> tuple[Tensor, Tensor, Any]:
    """What follows the shared beginning (B, L - common, width) goes through the model.

    Returns the states (B, width) that predict the first token of each answer, which positions are there (B, L), and
    the keys and values of all of them.
    """
    number, width = rest.shape[:2]
    if common:
        cache.batch_repeat_interleave(number)
    left, span = lengths - common, torch.arange(width, device=rest.device)
    mask = torch.cat(
        [torch.ones(number, common, dtype=torch.long, device=rest.device), (span < left[:, None]).long()], 1
    )
    states = llm.language.base_model(
        inputs_embeds=rest,
        attention_mask=mask,
        position_ids=(common + span).expand(number, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return states[torch.arange(number, device=rest.device), left - 1], mask, cache


def _decode(
    llm: UniuggLLM, last: Tensor, mask: Tensor, lengths: Tensor, cache: Any, limit: int, stop: frozenset[int]
) -> list[list[int]]:
    """Add tokens until every answer has ended. ``last`` (B, width) is the state that predicts the first."""
    answers: list[list[int]] = [[] for _ in range(len(last))]
    going = [True] * len(last)
    for index in range(limit):
        chosen = llm.logits(last).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            going[row] = going[row] and token not in stop
            if going[row]:
                answers[row].append(token)
        if not any(going) or index + 1 == limit:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        last = llm.language.base_model(
            inputs_embeds=llm.language.get_input_embeddings()(chosen[:, None]),
            attention_mask=mask,
            position_ids=(lengths + index)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return answers


def _padded(questions: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, L) padded with 0 on the right, and their lengths (B,)."""
    lengths = torch.tensor([len(question) for question in questions], device=device)
    rows = torch.zeros(len(questions), int(lengths.max()), dtype=torch.long, device=device)
    for row, question in zip(rows, questions, strict=True):
        row[: len(question)] = torch.tensor(list(question), device=device)
    return rows, lengths


def _embed(
    llm: UniuggLLM, rows: Tensor, tokens: Tensor | None, common: int, questions: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Embeddings of the shared beginning (1, common, width) and of what follows (B, L - common, width).

    Views are projected once where all of them stand in the shared beginning.
    """
    if tokens is None or not any(llm.image_token_id in list(question)[common:] for question in questions):
        shared = llm.embed(_batch(rows[:1, :common], tokens), "metres")
        return shared, llm.embed(_batch(rows[:, common:], None), "metres")
    whole = llm.embed(_batch(rows, tokens), "metres")
    return whole[:1, :common], whole[:, common:]


def _batch(rows: Tensor, tokens: Tensor | None) -> dict[str, Any]:
    batch: dict[str, Any] = {
        "kind": CONVERSATION,
        "input_ids": rows,
        "weight": torch.ones(len(rows), device=rows.device),
    }
    if tokens is not None:
        batch["tokens"] = tokens[None, :, None].expand(len(rows), -1, -1, -1, -1, -1)
    return batch
