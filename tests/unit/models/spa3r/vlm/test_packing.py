"""Packing: what each token sees and where it stands, against brute force and transformers' own positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ModelError
from models.spa3r.vlm.packing import (
    Packed,
    block_mask,
    is_packed,
    mrope_positions,
    pack,
    pack_samples,
    predictors,
    shared_start,
    unpack,
)
from tests.support.spa3_vlm import PAD, batch_of, blocks, sample, small_vlm

SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, -1], [0, 0, 0, 1, -1, -1, -1, -1]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_token_sees_the_prefix_and_its_own_question(attention: str) -> None:
    mask = block_mask(SEGMENTS, attention, torch.float32)
    seen = mask if attention == "sdpa" else mask == 0
    assert seen.shape == (2, 1, 8, 8)
    for b in range(2):
        for i in range(8):
            for j in range(8):
                mine, other = int(SEGMENTS[b, i]), int(SEGMENTS[b, j])
                want = j <= i and (other == mine or (other == 0 and mine > 0))
                assert bool(seen[b, 0, i, j]) == want, (b, i, j)
    assert is_packed(SEGMENTS)
    assert not is_packed(SEGMENTS[1:])


def test_attention_without_such_masks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'flash_attention_2' takes no mask of tokens by tokens.*sdpa, eager"):
        block_mask(SEGMENTS, "flash_attention_2", torch.float32)


def test_what_predicts_a_token() -> None:
    assert predictors(SEGMENTS).tolist() == [[-1, 0, 1, 2, 3, 1, 5, -1], [-1, 0, 1, 2, -1, -1, -1, -1]]
    assert predictors(torch.tensor([[1, 1, 2]])).tolist() == [[-1, 0, -1]], "nothing stands before a question"


GRIDS = [[(2, 3), (3, 2)], [(1, 4)], [], [(3, 3), (1, 1), (2, 5)]]


def test_positions_are_those_of_transformers() -> None:
    model = small_vlm()
    samples = [sample(grids, seed=number) for number, grids in enumerate(GRIDS)]
    batch = batch_of(samples, GRIDS)
    mine = model.positions(batch)
    for row, grids in enumerate(GRIDS):
        ids = torch.tensor([samples[row].ids])
        frames = torch.tensor([[1, 2 * r, 2 * c] for r, c in grids]).reshape(-1, 3)
        theirs, _ = model.language.model.get_rope_index(ids, (ids == PAD).int(), image_grid_thw=frames)
        assert torch.equal(mine[:, row, : len(samples[row])], theirs[:, 0])
        assert not mine[:, row, len(samples[row]) :].any()


def test_every_question_stands_where_it_would_alone() -> None:
    model = small_vlm()
    packed = sample(GRIDS[0], questions=4)
    alone = unpack(packed)
    together = model.positions(batch_of([packed], [GRIDS[0]]))[:, 0]
    apart = model.positions(batch_of(alone, [GRIDS[0]] * 4))
    segments = torch.tensor(packed.segments)
    for number, one in enumerate(alone):
        mine = together[:, (segments == 0) | (segments == number + 1)]
        assert torch.equal(mine, apart[:, number, : len(one)])


def test_placeholders_beyond_the_frames_count_on_as_text() -> None:
    image, segments = torch.tensor([[0, 1, 1, 1, 1, 0]]).bool(), torch.zeros(1, 6, dtype=torch.long)
    positions = mrope_positions(image, segments, torch.tensor([[[1, 2]]]))
    assert positions[:, 0].tolist() == [[0, 1, 1, 3, 4, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


@given(
    prefix=st.lists(st.integers(0, 9), max_size=6),
    questions=st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=4), min_size=1),
)
def test_packing_is_undone(prefix: list[int], questions: list[list[tuple[int, bool]]]) -> None:
    packed = pack(prefix, [([t for t, _ in q], [m for _, m in q]) for q in questions])
    assert len(packed) == len(packed.supervised) == len(packed.segments) == len(prefix) + sum(map(len, questions))
    for one, question in zip(unpack(packed), questions, strict=True):
        assert one.ids == [*prefix, *(token for token, _ in question)]
        assert one.supervised == [*[False] * len(prefix), *(mark for _, mark in question)]


def test_whole_samples_share_what_they_begin_with() -> None:
    front = [1, *blocks([(1, 2)]), 5]
    samples = [([*front, 6, 9], [False] * len(front) + [False, True]), ([*front, 7], [False] * len(front) + [True])]
    packed = pack_samples(samples, PAD)
    assert packed.segments == [0] * len(front) + [1, 1, 2]
    assert [(one.ids, one.supervised) for one in unpack(packed)] == samples
    same = pack_samples([([1, 2, 3], [False, True, True]), ([1, 2, 3], [False, True, True])], PAD)
    assert same == Packed(ids=[1, 2, 3, 2, 3], supervised=[False, True, True, True, True], segments=[0, 1, 1, 2, 2]), (
        "an answer is never shared"
    )
    assert shared_start([[1, 2], [1, 2]]) == 1
    with pytest.raises(ModelError, match="only questions about the same frames"):
        pack_samples([([1, PAD, 3], [False] * 3), ([2, PAD, 3], [False] * 3)], PAD)
    with pytest.raises(ModelError, match="each question needs tokens"):
        pack([1], [([], [])])
    with pytest.raises(ModelError, match="no sample to pack"):
        pack_samples([], PAD)
