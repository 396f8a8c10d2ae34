"""Several questions of one video behind one visual prefix: which token sees which, and where each stands.

``segments`` (B, L) says what a token belongs to: 0 the shared prefix, k >= 1 question k with its answer, -1 padding.
A question sees the prefix and itself, and its positions begin where the prefix ends, as if it stood there alone: the
numbers are those of separate samples, while the prefix is computed once.

Positions are Qwen2.5-VL's M-RoPE (Bai et al. 2025, section 2.1): text counts on in all three axes; a frame of gh x gw
merged tokens stands at one time, its rows and columns count from there, and what follows begins after its larger side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import ModelError

PREFIX, PADDING = 0, -1
DENSE_MASKS = ("sdpa", "eager")
"""Attention implementations of transformers that take a mask of tokens by tokens."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One sample: token ids, which are supervised, and what each belongs to; three lists of one length."""

    ids: list[int]
    supervised: list[bool]
    segments: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def pack(prefix: Sequence[int], questions: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Packed:
    """Questions (ids and which are supervised, answers with them) of one video behind its ``prefix``.

    ModelError without a question, and for an empty one.
    """
    if not questions or any(not len(ids) or len(ids) != len(marks) for ids, marks in questions):
        lengths = [(len(ids), len(marks)) for ids, marks in questions]
        raise ModelError(f"each question needs tokens, and a mark for each; got (tokens, marks) {lengths}")
    return Packed(
        ids=[*prefix, *(token for ids, _ in questions for token in ids)],
        supervised=[*[False] * len(prefix), *(bool(mark) for _, marks in questions for mark in marks)],
        segments=[*[PREFIX] * len(prefix), *(k for k, (ids, _) in enumerate(questions, 1) for _ in ids)],
    )


def pack_samples(samples: Sequence[tuple[Sequence[int], Sequence[bool]]], image_token_id: int) -> Packed:
    """Whole samples (ids and which are supervised) about one video as one, behind what they all begin with.

    ModelError when they do not begin with the same images.
    """
    if not samples:
        raise ModelError("there is no sample to pack")
    rows = [list(ids) for ids, _ in samples]
    asked = [list(marks).index(True) if any(marks) else len(marks) for _, marks in samples]
    common = min(shared_start(rows), *asked) if len(rows) > 1 else min(len(rows[0]) - 1, asked[0])
    if any(image_token_id in row[common:] for row in rows):
        raise ModelError(
            f"the {len(rows)} samples share their first {common} tokens and have images behind these: only questions "
            "about the same frames can be packed"
        )
    return pack(rows[0][:common], [(ids[common:], marks[common:]) for ids, marks in samples])


def unpack(packed: Packed) -> list[Packed]:
    """The same questions as samples of their own, each with the whole prefix; the inverse of :func:`pack`."""
    front = packed.segments.count(PREFIX)
    samples = []
    for question in range(1, max(packed.segments, default=0) + 1):
        places = [i for i, segment in enumerate(packed.segments) if segment in (PREFIX, question)]
        samples.append(
            Packed(
                ids=[packed.ids[i] for i in places],
                supervised=[packed.supervised[i] for i in places],
                segments=[PREFIX] * front + [1] * (len(places) - front),
            )
        )
    return samples


def shared_start(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with; at least one of each row is left over."""
    shortest = min(rows, key=len)
    common = next((i for i, token in enumerate(shortest) if any(row[i] != token for row in rows)), len(shortest))
    return max(0, min(common, len(shortest) - 1))


def is_packed(segments: Tensor) -> bool:
    """Whether any sample has more than one question, so that a causal mask would let one see another."""
    return bool((segments > 1).any())


def block_mask(segments: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """Which key each query sees, (B, 1, L, L): the past of the prefix and of its own question.

    Boolean (True: seen) for ``sdpa``, 0 and a very small number in ``dtype`` for ``eager``. Padding sees itself, since
    a softmax over nothing is not a number. ModelError for an implementation that takes no such mask.
    """
    if attention not in DENSE_MASKS:
        raise ModelError(
            f"attention={attention!r} takes no mask of tokens by tokens, which packed questions need; "
            f"use one of {', '.join(DENSE_MASKS)}, or a question a sample"
        )
    length = segments.shape[1]
    order = torch.arange(length, device=segments.device)
    same = segments[:, :, None] == segments[:, None, :]
    prefix = (segments == PREFIX)[:, None, :] & (segments != PADDING)[:, :, None]
    seen = (order[:, None] >= order[None, :]) & (same | prefix)
    if attention == "sdpa":
        return seen[:, None]
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _starts(segments: Tensor) -> Tensor:
    """(B, L) bool: the first token of each run of one segment."""
    first = torch.ones_like(segments[:, :1], dtype=torch.bool)
    return torch.cat([first, segments[:, 1:] != segments[:, :-1]], dim=1)


def predictors(segments: Tensor) -> Tensor:
    """(B, L) index of the token whose state predicts each token; -1 where there is none (the first, and padding).

    It is the token before; for a question's first token the last of the prefix.
    """
    before = torch.arange(segments.shape[1], device=segments.device) - 1
    front = (segments == PREFIX).sum(1, keepdim=True) - 1
    source = torch.where(_starts(segments) & (segments > PREFIX), front, before)
    return torch.where(segments == PADDING, -1, source)


def mrope_positions(image: Tensor, segments: Tensor, grids: Tensor, frames: Tensor | None = None) -> Tensor:
    """M-RoPE positions (3, B, L): time, row, column.

    Args:
        image: (B, L) bool, tokens that are a place for a visual token.
        segments: (B, L), see the module.
        grids: (B, F, 2) rows and columns of merged tokens of each frame, in order.
        frames: (B,) how many of the grids a sample has; None for all.

    Placeholders beyond those of all frames (appended latents) count on as text does.
    """
    grids = _existing(grids, frames, image)
    sizes, longest = grids.prod(-1), grids.amax(-1)
    ends = sizes.cumsum(1)
    rank = image.long().cumsum(1) - 1
    frame = torch.searchsorted(ends, rank.contiguous(), right=True)
    inside = image & (frame < grids.shape[1])
    frame = frame.clamp_max(grids.shape[1] - 1)
    local = rank - (ends - sizes).gather(1, frame)
    columns = grids[..., 1].gather(1, frame).clamp_min(1)
    last = local == sizes.gather(1, frame) - 1
    advance = torch.where(inside, torch.where(last, longest.gather(1, frame), 0), 1)
    base = _restarting(advance, segments)
    row = torch.where(inside, local.div(columns, rounding_mode="floor"), 0)
    column = torch.where(inside, local.remainder(columns), 0)
    return torch.where(segments == PADDING, 0, torch.stack([base, base + row, base + column]))


def _existing(grids: Tensor, frames: Tensor | None, image: Tensor) -> Tensor:
    """Grids with those beyond a sample's own as 0 x 0, and at least one of them."""
    if frames is not None:
        there = torch.arange(grids.shape[1], device=grids.device) < frames.reshape(-1, 1)
        grids = torch.where(there[..., None], grids, 0)
    return torch.cat([grids.long(), image.new_zeros(len(image), 1, 2, dtype=torch.long)], dim=1)


def _restarting(advance: Tensor, segments: Tensor) -> Tensor:
    """Sum of ``advance`` (B, L) before each token, along the prefix and its own segment alone."""
    before = advance.cumsum(1) - advance
    start = torch.where(_starts(segments), before, 0).cummax(1).values
    prefix = torch.where(segments == PREFIX, advance, 0).sum(1, keepdim=True)
    return torch.where(segments == PREFIX, before, before - start + prefix)
