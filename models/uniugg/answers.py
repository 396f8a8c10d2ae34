"""Answers of the language model: several questions about the same views in one batch, the views read once.

What all questions begin with (system message, views) goes through the model once; its keys and values are shared.
What is left of each is padded on the right, then tokens are added greedily, each question at its own position.
"""

from __future__ import annotations

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
) -> list[list[int]]:
    """Greedy answers to questions about the same views.

    Args:
        llm: in eval mode.
        questions: token ids with placeholders for the patch tokens, up to where the answer begins.
        tokens: (V, h, w, C) patch tokens of the views, in the order of the placeholders; None without views.
        max_new_tokens: longest answer.
        stop: tokens that end an answer; they are not part of it.
    """
    from transformers import DynamicCache

    if not questions:
        return []
    device = next(llm.parameters()).device
    common = shared_prefix(questions)
    rows, lengths = _padded(questions, device)
    embeds = _embed(llm, rows, tokens, common, questions)
    cache: Any = DynamicCache(config=llm.language.config)
    mask = torch.ones(len(rows), common, dtype=torch.long, device=device)
    if common:
        llm.language.base_model(inputs_embeds=embeds[0], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    left = lengths - common
    span = torch.arange(rows.shape[1] - common, device=device)
    mask = torch.cat([mask, (span < left[:, None]).long()], dim=1)
    states = llm.language.base_model(
        inputs_embeds=embeds[1],
        attention_mask=mask,
        position_ids=(common + span).expand(len(rows), -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    last = states[torch.arange(len(rows), device=device), left - 1]
    return _decode(llm, last, mask, lengths, cache, max_new_tokens, frozenset(stop))


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
