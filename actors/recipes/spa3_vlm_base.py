"""Which language model an adapter of Spa3-VLM was trained behind: what is written down, and how two are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.pretrained import describe_pretrained
from models.spa3r.vlm.model import Spa3VLM
from models.spa3r.vlm.qwen import HEAD, TEXT
from services.errors import WeightsError

BASE = "base"
"""Key of a role's settings and of a part's config.json: the language model that the run began with."""
_TABLES = (f"language.{TEXT}embed_tokens.", f"language.{HEAD}")
_SAMPLED = 32
"""Values of a weight that tell it from another's."""


def base_of(module: Spa3VLM, weights: Mapping[str, Tensor] | None, began: str) -> dict[str, Any]:
    """``sha256`` of some values of every weight of the language model, its ``layers`` and ``width``, where it is
    ``from``; {} where there are no values yet (a plan's).

    Tables of the vocabulary do not count, which may have grown. Values count as bfloat16, so that a model is the same
    in every precision that it is stored in.

    Args:
        module: as it is before training.
        weights: where the values lie of what is on meta.
        began: "random", or what ``model.init`` names.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if not name.startswith("language.") or name.startswith(_TABLES):
            continue
        value = (weights or {}).get(name) if parameter.is_meta else parameter
        if value is None or isinstance(value, FakeTensor):
            return {}
        digest.update(f"{name}\0{tuple(value.shape)}\0".encode() + _some(value))
    text = module.language.config.text_config
    return {"sha256": digest.hexdigest(), "layers": int(text.num_hidden_layers), "width": module.width, "from": began}


def _some(weight: Tensor) -> bytes:
    flat = weight.detach().flatten()
    chosen = torch.linspace(0, flat.numel() - 1, min(_SAMPLED, flat.numel()), dtype=torch.float64).long()
    return flat[chosen.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


def check_base(
    name: str, place: str | Path, module: Spa3VLM, bases: Sequence[Mapping[str, Any]], *, remedy: str
) -> None:
    """WeightsError unless the adapter of folder ``place`` was trained behind the run's language model.

    A part that says nothing of its base, or a language model of which nothing is known, is checked by width alone.

    Args:
        name: of the adapter in messages.
        place: its folder.
        module: of the run.
        bases: :func:`base_of` what the run began with; then of what else will do, such as a run that it goes on from.
            {} where that is not known.
        remedy: what to do.
    """
    described = describe_pretrained(place)
    settings, base = described["settings"], described.get(BASE) or {}
    sizes = {"width": module.width, "latent_channels": module.latent_channels}
    other = {key: settings.get(key) for key in sizes if settings.get(key) != sizes[key]}
    if other:
        raise WeightsError(
            f"{name} is an adapter for another base: it has {other}, the run's language model and latents have "
            f"{ {key: sizes[key] for key in other} }; {remedy}"
        )
    known = [found for found in bases if found]
    if base and known and base["sha256"] not in [found["sha256"] for found in known]:
        raise WeightsError(
            f"{name} is an adapter for another base: it was trained behind {_said(base)}; the run's language model is "
            f"{_said(known[0])}; {remedy}"
        )


def _said(base: Mapping[str, Any]) -> str:
    return f"{base['from']} ({base['layers']} layers, width {base['width']}, sha256 {base['sha256'][:16]}...)"
