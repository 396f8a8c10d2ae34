"""Which encoder families there are and what one input of each is."""

from __future__ import annotations

from collections.abc import Mapping

from models.encoders.base import InputKind
from models.errors import ModelError

#: Family of ``encoders.<name>.family`` -> what one input is.
INPUT_KINDS: Mapping[str, InputKind] = {
    "dinov2": InputKind.IMAGE,
    "dinov3": InputKind.IMAGE,
    "radio": InputKind.IMAGE,
    "siglip2": InputKind.IMAGE,
    "clip": InputKind.IMAGE,
    "uniugg_vit": InputKind.IMAGE,
    "mast3r": InputKind.IMAGE,
    "siglip2_text": InputKind.TEXT,
    "clip_text": InputKind.TEXT,
    "pooled": InputKind.RECORD,
    "projection": InputKind.RECORD,
    "uniugg_vae": InputKind.RECORD,
    "uniugg_reconstruction": InputKind.RECORD,
}


def input_kind(family: str) -> InputKind:
    """What one input of ``family`` is; ModelError lists the families."""
    if family not in INPUT_KINDS:
        raise ModelError(f"unknown encoder family {family!r}; there are {sorted(INPUT_KINDS)}")
    return INPUT_KINDS[family]
