"""Settings of a recipe that are its encoders' own: written there when a configuration is loaded.

What encodes reads ``encoders.*`` only, so that a feature is the same whichever recipe asks for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from configs.schema import EncoderConfig, RunConfig

AUTO = "auto"
QK_NORM = "qk_norm"

#: Family -> keys of ``arch`` that hold with stored weights too: what is left out, or what the weights must have.
OPTIONS: Mapping[str, frozenset[str]] = {
    family: frozenset({QK_NORM, "depth_map"}) for family in ("vggt_patches", "vggt")
}


def resolve(config: RunConfig) -> RunConfig:
    """``config`` with ``recipe.spa3r.qk_norm_global`` as ``arch.qk_norm`` of every VGGT, unless that says its own."""
    wanted = config.recipe.spa3r.qk_norm_global
    if wanted == AUTO:
        return config
    encoders = {name: _with_norm(encoder, wanted) for name, encoder in config.encoders.items()}
    return dataclasses.replace(config, encoders=encoders)


def _with_norm(encoder: EncoderConfig, wanted: str) -> EncoderConfig:
    if QK_NORM not in OPTIONS.get(encoder.family, ()):
        return encoder
    return dataclasses.replace(encoder, arch={QK_NORM: wanted, **encoder.arch})
