"""Which language model an adapter of Spa3-VLM was trained behind: what is written down, and how two are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.encoders.weights import RANDOM
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


def check_base(start: str, module: Spa3VLM, own: Mapping[str, Any], llm: str) -> None:
    """WeightsError unless the adapter of folder ``start`` was trained behind the run's language model.

    That is the one that its run began with, or what that run has made of it. A part that says nothing of its base is
    checked by width alone.

    Args:
        start: ``model.init.adapter``.
        module: of the run.
        own: its :func:`base_of`.
        llm: ``model.init.llm``, "random" without.
    """
    described = describe_pretrained(start)
    settings, base = described["settings"], described.get(BASE) or {}
    sizes = {"width": module.width, "latent_channels": module.latent_channels}
    other = {key: settings.get(key) for key in sizes if settings.get(key) != sizes[key]}
    if other:
        raise WeightsError(
            f"model.init.adapter={start} is for another base: it has {other}, the run's language model and latents "
            f"have { {key: sizes[key] for key in other} }; leave it out, or name the adapter of a run of this size"
        )
    fit = [own, {} if llm == RANDOM else describe_pretrained(llm).get(BASE) or {}]
    if base and own and base["sha256"] not in [found.get("sha256") for found in fit]:
        raise WeightsError(
            f"model.init.adapter={start} is for another base: it was trained behind {_said(base)}; the run's language "
            f"model is {_said(own)}. Begin with the same one (model.init.language, model.init.llm, or the same seed "
            "where it is random), or leave the adapter out"
        )


def _said(base: Mapping[str, Any]) -> str:
    return f"{base['from']} ({base['layers']} layers, width {base['width']}, sha256 {base['sha256'][:16]}...)"
