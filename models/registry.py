"""The table of models: a name, and where its :class:`ModelSpec` is defined.

The table is written out, so that a name can be searched for, and the modules behind it are imported only when a
model is asked for. A name is ``family-size``.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib

from torch import nn

from models.errors import ModelError
from models.spec import ModelSpec

_TABLE: dict[str, str] = {
    "mast3r-tiny": "models.encoders.mast3r.model:MAST3R_TINY",
    "mast3r-small": "models.encoders.mast3r.model:MAST3R_SMALL",
    "mast3r-large": "models.encoders.mast3r.model:MAST3R_LARGE",
    "vggt-tiny": "models.encoders.vggt.model:VGGT_TINY",
    "vggt-small": "models.encoders.vggt.model:VGGT_SMALL",
    "vggt-1b": "models.encoders.vggt.model:VGGT_1B",
    "probe-tiny": "models.probe.spec:PROBE_TINY",
    "probe-small": "models.probe.spec:PROBE_SMALL",
    "probe-base": "models.probe.spec:PROBE_BASE",
    "radio-tiny": "models.uniugg.encoder:RADIO_TINY",
    "radio-small": "models.uniugg.encoder:RADIO_SMALL",
    "radio-large": "models.uniugg.encoder:RADIO_LARGE",
    "spa3r-tiny": "models.spa3r.spec:SPA3R_TINY",
    "spa3r-small": "models.spa3r.spec:SPA3R_SMALL",
    "spa3r-base": "models.spa3r.spec:SPA3R_BASE",
    "spa3-vlm-tiny": "models.spa3r.vlm.spec:SPA3_VLM_TINY",
    "spa3-vlm-small": "models.spa3r.vlm.spec:SPA3_VLM_SMALL",
    "spa3-vlm-3b": "models.spa3r.vlm.spec:SPA3_VLM_3B",
    "spa3-vlm-7b": "models.spa3r.vlm.spec:SPA3_VLM_7B",
    "spa3-vlm-adapter-tiny": "models.spa3r.vlm.spec:ADAPTER_TINY",
    "spa3-vlm-adapter-small": "models.spa3r.vlm.spec:ADAPTER_SMALL",
    "spa3-vlm-adapter-3b": "models.spa3r.vlm.spec:ADAPTER_3B",
    "spa3-vlm-adapter-7b": "models.spa3r.vlm.spec:ADAPTER_7B",
    "uniugg-vit-tiny": "models.uniugg.encoder:VIT_TINY",
    "uniugg-vit-small": "models.uniugg.encoder:VIT_SMALL",
    "uniugg-vit-large": "models.uniugg.encoder:VIT_LARGE",
    "uniugg-spatial-decoder-tiny": "models.uniugg.spatial:SPATIAL_TINY",
    "uniugg-spatial-decoder-small": "models.uniugg.spatial:SPATIAL_SMALL",
    "uniugg-spatial-decoder-large": "models.uniugg.spatial:SPATIAL_LARGE",
    "uniugg-encoder-tiny": "models.uniugg.pretraining:ENCODER_TINY",
    "uniugg-encoder-small": "models.uniugg.pretraining:ENCODER_SMALL",
    "uniugg-encoder-large": "models.uniugg.pretraining:ENCODER_LARGE",
    "spatial-vae-tiny": "models.uniugg.vae:SPATIAL_VAE_TINY",
    "spatial-vae-small": "models.uniugg.vae:SPATIAL_VAE_SMALL",
    "spatial-vae-base": "models.uniugg.vae:SPATIAL_VAE_BASE",
    "uniugg-tiny": "models.uniugg.unified:UNIUGG_TINY",
    "uniugg-small": "models.uniugg.unified:UNIUGG_SMALL",
    "uniugg-3b": "models.uniugg.unified:UNIUGG_3B",
    "uniugg-llm-tiny": "models.uniugg.unified:UNIUGG_LLM_TINY",
    "uniugg-llm-small": "models.uniugg.unified:UNIUGG_LLM_SMALL",
    "uniugg-llm-3b": "models.uniugg.unified:UNIUGG_LLM_3B",
    "uniugg-unet-tiny": "models.uniugg.unified:UNIUGG_UNET_TINY",
    "uniugg-unet-small": "models.uniugg.unified:UNIUGG_UNET_SMALL",
    "uniugg-unet-3b": "models.uniugg.unified:UNIUGG_UNET_3B",
    "uniugg-latent-tiny": "models.uniugg.latent:LATENT_TINY",
    "uniugg-latent-small": "models.uniugg.latent:LATENT_SMALL",
    "uniugg-latent-base": "models.uniugg.latent:LATENT_BASE",
    "uniugg-direct-tiny": "models.uniugg.direct:DIRECT_TINY",
    "uniugg-direct-small": "models.uniugg.direct:DIRECT_SMALL",
    "uniugg-direct-3b": "models.uniugg.direct:DIRECT_3B",
    "uniugg-direct-llm-tiny": "models.uniugg.direct:DIRECT_LLM_TINY",
    "uniugg-direct-llm-small": "models.uniugg.direct:DIRECT_LLM_SMALL",
    "uniugg-direct-llm-3b": "models.uniugg.direct:DIRECT_LLM_3B",
}


def list_models(pattern: str = "*") -> list[str]:
    """Names in the registry that match a glob, sorted."""
    return sorted(fnmatch.filter(_TABLE, pattern))


def spec(name: str) -> ModelSpec:
    """The description of the model called ``name``; ModelError names the nearest ones where there is none."""
    if name not in _TABLE:
        near = difflib.get_close_matches(name, _TABLE, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"model.name: there is no model {name!r}{hint} All names: {', '.join(list_models())}")
    module, attribute = _TABLE[name].split(":")
    found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, ModelSpec), f"{_TABLE[name]} is not a ModelSpec"
    return found


def build(name: str, **overrides: object) -> nn.Module:
    """Build a model by name; ``overrides`` go on top of the size's defaults.

    Works under ``torch.device("meta")``, which gives names and shapes without the memory. ModelError for an
    unknown name, for an override that the model does not know, and for sizes that it cannot have.
    """
    found = spec(name)
    unknown = sorted(set(overrides) - set(found.defaults))
    if unknown:
        raise ModelError(
            f"model.overrides: {name} has no setting {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(sorted(found.defaults))}"
        )
    module = found.build(**{**found.defaults, **overrides})
    module.model_name = name  # type: ignore[assignment]  # how load_reference finds the published names again
    return module
