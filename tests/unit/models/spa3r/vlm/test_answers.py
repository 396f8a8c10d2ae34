"""Greedy answers behind one prefix against a plain loop that reads everything anew for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.errors import ModelError
from models.spa3r.vlm.answers import answer, generate_text, read_prefix
from models.spa3r.vlm.packing import Packed
from tests.support.spa3_vlm import PAD, batch_of, blocks, small_vlm

GRIDS = [(2, 3), (3, 2)]
FRONT = [7, 8, *blocks(GRIDS)]
QUESTIONS = [[11, 12, 13], [21], [31, 32, 33, 34, 35], [11, 12]]
SCENE_COLUMNS = ("visual", "grids", "latents")


def plain(model: Any, ids: list[int], grids: list[tuple[int, int]], limit: int, stop: set[int]) -> list[int]:
    """No cache, no batch, no padding."""
    out: list[int] = []
    while len(out) < limit:
        row = Packed(ids=ids + out, supervised=[False] * (len(ids) + len(out)), segments=[0] * (len(ids) + len(out)))
        token = int(model.logits(model.hidden(batch_of([row], [grids])))[0, -1].argmax())
        if token in stop:
            break
        out.append(token)
    return out


def scene_of(grids: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    batch = batch_of([Packed(ids=blocks(grids), supervised=[False], segments=[0] * len(blocks(grids)))], [grids])
    return {name: batch[name] for name in SCENE_COLUMNS}


@torch.no_grad()
def test_answers_are_those_of_reading_everything_anew() -> None:
    model = small_vlm(seed=4, awake=True)
    torch.nn.init.normal_(model.language.lm_head.weight, std=0.5)
    prompts = [FRONT + question for question in QUESTIONS]
    free = [plain(model, prompt, GRIDS, 6, set()) for prompt in prompts]
    assert len({tuple(found) for found in free}) > 1, "the questions are told apart"
    stop = {free[0][2]}
    expected = [plain(model, prompt, GRIDS, 6, stop) for prompt in prompts]
    scene = scene_of(GRIDS)
    for size in (0, 3, 1):
        found = generate_text(model, prompts, scene, max_new_tokens=6, stop=stop, batch_size=size)
        assert found == expected
    assert any(len(found) < 6 for found in expected)


@torch.no_grad()
def test_a_scene_is_read_once_for_all_its_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vlm(seed=4, awake=True)
    read: list[int] = []
    forward = model.adapter.forward

    def counted(*given: torch.Tensor) -> torch.Tensor:
        read.append(len(given[0]))
        return forward(*given)

    monkeypatch.setattr(model.adapter, "forward", counted)
    prefix = read_prefix(model, FRONT, scene_of(GRIDS))
    first = answer(model, prefix, QUESTIONS, max_new_tokens=3, stop=[])
    again = answer(model, prefix, QUESTIONS[::-1], max_new_tokens=3, stop=[], batch_size=2)
    assert read == [1]
    assert again == first[::-1], "the prefix is left as it was"
    assert prefix.cache.get_seq_length() == len(FRONT)
    assert prefix.end == 2 + 1 + 3 + 1 + 1 + 3 + 1, "two texts, and each image by its larger side between its ends"


@torch.no_grad()
def test_questions_without_pictures() -> None:
    model = small_vlm(seed=4)
    torch.nn.init.normal_(model.language.lm_head.weight, std=0.5)
    prompts = [[1, 2, 3, 4], [5, 6]]
    found = generate_text(model, prompts, {}, max_new_tokens=4, stop=[])
    assert found == [plain(model, prompt, [], 4, set()) for prompt in prompts], "nothing is shared, and no prefix read"
    assert generate_text(model, [], {}, max_new_tokens=4, stop=[]) == []
    assert generate_text(model, prompts, {}, max_new_tokens=0, stop=[]) == [[], []]


def test_prompts_that_cannot_share_are_refused() -> None:
    model = small_vlm()
    with pytest.raises(ModelError, match="a question is text behind the shared prefix"):
        generate_text(model, [[1, PAD, 2], [3, PAD, 2]], scene_of([(1, 1)]), max_new_tokens=1, stop=[])
    with pytest.raises(ModelError, match=r"a scene has the columns visual, .*; got \['pixels'\]"):
        read_prefix(model, FRONT, {"pixels": torch.zeros(1)})
    with pytest.raises(ModelError, match="sample the scene: the text has 12 image tokens for 4 visual tokens"):
        read_prefix(model, FRONT, scene_of([(2, 2)]))
