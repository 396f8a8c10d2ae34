"""Answers of several questions about the same views: equal to the plain loop without a cache, the views read once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models
from models.uniugg.answers import generate_text, shared_prefix
from models.uniugg.llm import UniuggLLM

IMAGE = 261
VIEWS = torch.randn(2, 2, 3, 96, generator=torch.Generator().manual_seed(2))
BEGINNING = [5, 6, *[IMAGE] * 6, 7, *[IMAGE] * 6, 8]


@pytest.fixture(scope="module")
def llm() -> UniuggLLM:
    torch.manual_seed(0)
    module = models.build("uniugg-llm-tiny")
    assert isinstance(module, UniuggLLM)
    with torch.no_grad():  # far from uniform, so that greedy answers differ and are no tie
        module.language.get_input_embeddings().weight.mul_(20.0)
    return module.eval()


def plainly(llm: UniuggLLM, question: list[int], tokens: torch.Tensor | None, limit: int, stop: set[int]) -> list[int]:
    """Every token from a forward pass over everything before it."""
    answer: list[int] = []
    while len(answer) < limit:
        batch: dict[str, Any] = {
            "kind": "conversation", "weight": torch.ones(1), "input_ids": torch.tensor([[*question, *answer]]),
        }  # fmt: skip
        if tokens is not None:
            batch["tokens"] = tokens[None, :, None]
        with torch.no_grad():
            hidden = llm.hidden(llm.embed(batch, "metres"), batch["input_ids"])
            token = int(llm.logits(hidden[:, -1]).argmax())
        if token in stop:
            break
        answer.append(token)
    return answer


QUESTIONS = [[*BEGINNING, 20, 21, 22, 23, 24], [*BEGINNING, 30], [*BEGINNING, 20, 41, 42]]


def test_equal_to_the_loop_without_a_cache(llm: UniuggLLM):
    want = [plainly(llm, question, VIEWS, 7, set()) for question in QUESTIONS]
    assert generate_text(llm, QUESTIONS, VIEWS, max_new_tokens=7, stop=[]) == want
    assert len({tuple(answer) for answer in want}) == 3, "the questions tell the answers apart"


def test_an_answer_ends_where_its_stop_token_comes_and_others_go_on(llm: UniuggLLM):
    full = [plainly(llm, question, VIEWS, 7, set()) for question in QUESTIONS]
    stop = {full[0][2]}
    want = [plainly(llm, question, VIEWS, 7, stop) for question in QUESTIONS]
    assert generate_text(llm, QUESTIONS, VIEWS, max_new_tokens=7, stop=stop) == want
    assert len(want[0]) <= 2
    assert max(map(len, want)) > len(want[0])


def test_the_views_are_read_once(llm: UniuggLLM):
    lengths: list[tuple[int, int]] = []
    handle = llm.language.base_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    generate_text(llm, QUESTIONS, VIEWS, max_new_tokens=3, stop=[])
    handle.remove()
    assert lengths == [(1, len(BEGINNING)), (3, 5), (3, 1), (3, 1)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_some_at_a_time_are_answered_alike_and_the_views_still_read_once(llm: UniuggLLM, size: int):
    want = generate_text(llm, QUESTIONS, VIEWS, max_new_tokens=5, stop=[])
    lengths: list[int] = []
    handle = llm.language.base_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = generate_text(llm, QUESTIONS, VIEWS, max_new_tokens=5, stop=[], batch_size=size)
    handle.remove()
    assert found == want
    assert lengths.count(len(BEGINNING)) == 1


@pytest.mark.parametrize(
    "questions",
    [
        [[*BEGINNING, 20]],
        [[9, *BEGINNING, 20], [10, *BEGINNING, 21, 22]],
        [[*BEGINNING, 20], [*BEGINNING, 20]],
    ],
    ids=["one", "nothing shared", "the same twice"],
)
def test_whatever_is_shared(llm: UniuggLLM, questions: list[list[int]]):
    want = [plainly(llm, question, VIEWS, 4, set()) for question in questions]
    assert generate_text(llm, questions, VIEWS, max_new_tokens=4, stop=[]) == want


def test_text_alone_and_nothing_at_all(llm: UniuggLLM):
    questions = [[5, 6, 20], [5, 6, 30, 31]]
    want = [plainly(llm, question, None, 4, set()) for question in questions]
    assert generate_text(llm, questions, None, max_new_tokens=4, stop=[]) == want
    assert generate_text(llm, [], None, max_new_tokens=4, stop=[]) == []


def test_the_shared_beginning_leaves_a_token_of_each():
    assert shared_prefix([[1, 2, 3], [1, 2]]) == 1
    assert shared_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert shared_prefix([[2], [1]]) == 0
