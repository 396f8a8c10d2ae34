"""Which encoder families there are and what one input of each is."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

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
    "vggt_patches": InputKind.IMAGE,
    "qwen2_5_vl": InputKind.IMAGE,
    "vggt": InputKind.VIEWS,
    "siglip2_text": InputKind.TEXT,
    "clip_text": InputKind.TEXT,
    "pooled": InputKind.RECORD,
    "projection": InputKind.RECORD,
    "uniugg_vae": InputKind.RECORD,
    "uniugg_reconstruction": InputKind.RECORD,
    "spa3r": InputKind.RECORD,
}

#: Families of our own networks -> class. Of pictures it is made as ``cls(weights, *, arch, seed, height, width,
#: dtype)``; of records, and of view sets, as ``cls(upstream, codec, *, weights, arch, seed, dtype)``.
CLASSES: Mapping[str, str] = {
    "uniugg_vit": "models.encoders.uniugg:UniuggViT",
    "mast3r": "models.encoders.uniugg:Mast3rViT",
    "uniugg_vae": "models.encoders.uniugg:UniuggPosterior",
    "uniugg_reconstruction": "models.encoders.uniugg:UniuggReconstruction",
    "qwen2_5_vl": "models.encoders.qwen:QwenVision",
    "vggt_patches": "models.encoders.vggt.frozen:VggtPatches",
    "vggt": "models.encoders.vggt.frozen:VggtViews",
    "spa3r": "models.spa3r.frozen:Spa3rLatents",
}


def family_class(family: str) -> Any:
    """The class of a family of :data:`CLASSES`; ModelError for one that is not in it."""
    if family not in CLASSES:
        raise ModelError(f"encoder family {family!r} has no class of its own; there are {sorted(CLASSES)}")
    module, attribute = CLASSES[family].split(":")
    return getattr(importlib.import_module(module), attribute)


def input_kind(family: str) -> InputKind:
    """What one input of ``family`` is; ModelError lists the families."""
    if family not in INPUT_KINDS:
        raise ModelError(f"unknown encoder family {family!r}; there are {sorted(INPUT_KINDS)}")
    return INPUT_KINDS[family]
