"""Batches of fake columns: what decides shapes is real and small, the rest has shapes only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from models.spec import TensorSpec

PROMPT_TOKENS = 32
"""Tokens of a generation's prompt beside its placeholders."""

ANSWERED = 0.5
"""Share of a conversation's text that is answers."""

CAMERA_NUMBERS = 9
"""Of a camera as VGGT gives it."""

_REAL = 4096
"""Columns of at most so many numbers a sample, cameras for one, are real."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of ragged columns."""

    views: int
    """Pictures of a conversation or an item."""
    tokens: int
    """Of a conversation."""
    set_views: int = 2
    """Views of a view set."""
    set_contexts: int = 1
    """Those of them that are context."""
    frame: tuple[int, int] = (0, 0)
    """Rows and columns of the merged tokens of a picture, where it is a block by its own grid."""
    set_tokens: int = 0
    """Tokens of the geometry of all pictures of a conversation, where their number is open."""
    packed: int = 1
    """Conversations of one sample."""


def fake_batch(
    kind: str, columns: Mapping[str, TensorSpec], samples: int, lengths: Lengths, module: nn.Module
) -> dict[str, Any]:
    """A collated micro-batch of ``samples`` for ``module``, which was built in a fake mode (or is real: so is this)."""
    modes = [p.fake_mode for p in module.parameters() if isinstance(p, FakeTensor)]
    batch: dict[str, Any] = {
        "kind": kind,
        "id": [f"sample {number}" for number in range(samples)],
        "weight": torch.ones(samples),
        "draw": torch.arange(samples),
    }
    for name, spec in columns.items():
        if name in ("input_ids", "supervised", "segments"):
            continue
        views = _rows(name, lengths) if "grids" in columns else lengths.views
        if kind == "view_set":
            views = lengths.set_contexts if name == "context_tokens" else lengths.set_views
        shape = (samples, *(views if axis is None else axis for axis in spec.shape))
        dtype = getattr(torch, spec.dtype)
        if modes and math.prod(shape[1:]) > _REAL:
            with modes[0]:
                batch[name] = torch.zeros(shape, dtype=dtype)
        else:
            batch[name] = _plausible(name, shape, dtype)
        if None in spec.shape:
            batch[f"{name}_lengths"] = torch.full((samples, 1), views)
        if name == "grids":
            batch[name] = torch.tensor(lengths.frame).expand(shape).contiguous()
    if "roles" in columns:
        batch["roles"][:, lengths.set_contexts :] = True
    if "input_ids" in columns:
        batch |= _text(kind, batch, samples, lengths, module)
    return batch


def _plausible(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Cameras that exist, and zeros; a depth is 1 m."""
    if name == "pose" and shape[-1] == CAMERA_NUMBERS:
        # VGGT's encoding: no translation, the unit quaternion with its scalar last, fields of view of a radian.
        one = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1], dtype=dtype)
        return one.expand(shape).contiguous()
    if name in ("K", "pose"):
        return torch.eye(shape[-1], dtype=dtype).expand(shape).contiguous()
    return torch.ones(shape, dtype=dtype) if name == "depth" else torch.zeros(shape, dtype=dtype)


def _text(
    kind: str, batch: Mapping[str, Any], samples: int, lengths: Lengths, module: nn.Module
) -> dict[str, torch.Tensor]:
    """Token ids with as many placeholders as the columns have patch tokens, and which are supervised."""
    if "grids" in batch:
        return _packed(batch, samples, lengths, module)
    tokens = batch["tokens"].shape[1:-1]
    patches, rays = math.prod(tokens), 0
    length = lengths.tokens
    if kind == "generation":
        rays = patches
        length = PROMPT_TOKENS + patches + rays
    length = max(length, patches + rays + 2)
    marks: Any = module  # a model that reads text knows its placeholders
    ids = torch.zeros((samples, length), dtype=torch.int64)
    ids[:, :patches] = marks.image_token_id
    ids[:, patches : patches + rays] = marks.ray_token_id
    supervised = torch.zeros((samples, length), dtype=torch.bool)
    if kind != "generation":
        supervised[:, length - max(1, int(ANSWERED * (length - patches))) :] = True
    return {"input_ids": ids, "supervised": supervised}


def _rows(name: str, lengths: Lengths) -> int:
    """Length of a ragged column of a conversation whose pictures have grids of their own."""
    return {"grids": lengths.views, "visual": lengths.views * math.prod(lengths.frame)}.get(name, lengths.set_tokens)


def _packed(batch: Mapping[str, Any], samples: int, lengths: Lengths, module: nn.Module) -> dict[str, torch.Tensor]:
    """Token ids of conversations behind one prefix of pictures, as long together as one conversation may be."""
    marks: Any = module
    pictures = batch["visual"].shape[1]
    if getattr(marks.adapter, "appends", False):
        pictures += batch["latents"].shape[1]
    text = max(lengths.tokens - pictures, 2 * lengths.packed)
    ids = torch.zeros((samples, pictures + text), dtype=torch.int64)
    ids[:, :pictures] = marks.image_token_id
    segments = torch.zeros_like(ids)
    segments[:, pictures:] = 1 + torch.arange(text) * lengths.packed // text
    if lengths.packed == 1:
        segments.zero_()
    supervised = torch.zeros(ids.shape, dtype=torch.bool)
    for part in torch.arange(pictures, pictures + text).tensor_split(lengths.packed):
        supervised[:, part[-max(1, int(ANSWERED * len(part))) :]] = True
    return {"input_ids": ids, "supervised": supervised, "segments": segments}
