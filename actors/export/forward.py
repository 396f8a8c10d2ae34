"""One forward pass of a part on a random input: what two copies of the same weights must agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.pretrained import network_of
from models.probe.model import Probe
from models.spa3r.model import Spa3R
from models.spa3r.vlm.adapter import AppendAdapter, CrossAdapter
from models.spa3r.vlm.model import Spa3VLM
from models.uniugg.encoder import StudentViT
from models.uniugg.spatial import SpatialDecoder
from models.uniugg.vae import SpatialVae

GRID, TOKENS, TIMESTEP = 4, 16, 321
VIEWS, LATENTS = 2, 5


def random_inputs(module: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a forward pass of ``module``, that follow from ``seed`` and its sizes alone.

    It is a causal language model of transformers, Qwen2.5-VL's vision tower, a UNet of diffusers, or a part of ours.
    ModelError for others.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made = next((make(module, draw) for fits, make in _KINDS if fits(module)), None)
    if made is None:
        raise ModelError(f"a {type(module).__name__} cannot be checked by a forward pass: its inputs are not known")
    return made


@torch.no_grad()
def outputs(module: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Everything that a forward pass gives, float32, as one vector; of Spa3-VLM the logits."""
    given = module.logits(module.hidden(**inputs)) if isinstance(module, Spa3VLM) else module(**inputs)
    return torch.cat([tensor.float().flatten() for tensor in _tensors(given)])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _tensors(inner)


def _language(module: Any, draw: torch.Generator) -> dict[str, Any]:
    return {"input_ids": _words(module.config, (2, TOKENS), draw), "use_cache": False}


def _words(config: Any, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Any tokens but those in whose places pictures stand."""
    words = torch.randint(int(config.get_text_config().vocab_size), shape, generator=draw)
    for name in ("image_token_id", "video_token_id"):
        words[words == getattr(config, name, -1)] = 0
    return words


def _tower(module: Any, draw: torch.Generator) -> dict[str, Any]:
    c = module.config
    channels = c.in_channels * c.temporal_patch_size * c.patch_size**2
    pixels = torch.randn(2 * GRID**2, channels, generator=draw)
    return {"hidden_states": pixels, "grid_thw": torch.tensor([[1, GRID, GRID]] * 2)}


def _unet(module: Any, draw: torch.Generator) -> dict[str, Any]:
    side = GRID * 2 ** (len(module.config.block_out_channels) - 1)  # it is halved between the blocks
    return {
        "sample": torch.randn(2, module.config.in_channels, side, side, generator=draw),
        "timestep": torch.tensor([TIMESTEP, 2 * TIMESTEP]),
        "encoder_hidden_states": torch.randn(2, TOKENS, module.config.cross_attention_dim, generator=draw),
    }


def _vit(module: Any, draw: torch.Generator) -> dict[str, Any]:
    return {"images": torch.randn(1, 3, GRID * module.patch, GRID * module.patch, generator=draw)}


def _decoder(module: Any, draw: torch.Generator) -> dict[str, Any]:
    return {f"tokens{n}": torch.randn(1, GRID, GRID, module.in_width, generator=draw) for n in (1, 2)}


def _vae(module: Any, draw: torch.Generator) -> dict[str, Any]:
    return {
        "tokens": torch.randn(1, GRID, GRID, module.channels, generator=draw),
        "noise": torch.randn(1, module.latent_channels, 2 * GRID, 2 * GRID, generator=draw),
    }


def _probe(module: Any, draw: torch.Generator) -> dict[str, Any]:
    layers, channels = module.token_scale.mean.shape
    return {
        "tokens": torch.randn(1, layers, GRID, GRID, channels, generator=draw),
        "summary": torch.randn(1, *module.summary_scale.mean.shape, generator=draw),
        "size": (8 * GRID, 8 * GRID),
    }


def _spa3r(module: Any, draw: torch.Generator) -> dict[str, Any]:
    pose = torch.randn(1, VIEWS, 9, generator=draw)
    pose[..., 7:] = 1.0  # fields of view in radians
    context = torch.randn(1, VIEWS, GRID**2, module.channels, generator=draw)
    return {"context": context, "pose": pose, "grid": (GRID, GRID)}


def _vlm(module: Any, draw: torch.Generator) -> dict[str, Any]:
    """Some words, one picture in the middle, some words; and latents, which the model reads where it has an adapter."""
    words = _words(module.language.config, (1, TOKENS), draw)
    visual = torch.randn(1, GRID**2, module.width, generator=draw)
    latents = torch.randn(1, LATENTS, module.latent_channels, generator=draw)
    places = GRID**2 + (LATENTS if isinstance(module.adapter, AppendAdapter) else 0)
    image = torch.full((1, places), module.image_token_id)
    ids = torch.cat([words[:, : TOKENS // 2], image, words[:, TOKENS // 2 :]], dim=1)
    batch = {"input_ids": ids, "visual": visual, "grids": torch.tensor([[[GRID, GRID]]]), "latents": latents}
    return {"batch": batch if module.adapter is not None else {k: v for k, v in batch.items() if k != "latents"}}


def _cross(module: Any, draw: torch.Generator) -> dict[str, Any]:
    plain = isinstance(module.projector, nn.Identity)
    latent_width = module.attention.key.in_features if plain else module.projector.fc1.in_features
    return {
        "visual": torch.randn(1, TOKENS, module.attention.query.in_features, generator=draw),
        "latents": torch.randn(1, LATENTS, latent_width, generator=draw),
    }


def _append(module: Any, draw: torch.Generator) -> dict[str, Any]:
    return {"latents": torch.randn(1, LATENTS, module.projector.fc1.in_features, generator=draw)}


def _is_language(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None


def _is_tower(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and module.config.model_type == "qwen2_5_vl_vision"


def _is_unet(module: nn.Module) -> bool:
    from diffusers import UNet2DConditionModel

    return isinstance(module, UNet2DConditionModel)


_KINDS: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any, torch.Generator], dict[str, Any]]], ...] = (
    (lambda module: isinstance(module, StudentViT), _vit),
    (lambda module: isinstance(module, SpatialDecoder), _decoder),
    (lambda module: isinstance(module, SpatialVae), _vae),
    (lambda module: isinstance(module, Probe), _probe),
    (lambda module: isinstance(module, Spa3R), _spa3r),
    (lambda module: isinstance(module, Spa3VLM), _vlm),
    (lambda module: isinstance(module, CrossAdapter), _cross),
    (lambda module: isinstance(module, AppendAdapter), _append),
    (_is_tower, _tower),
    (_is_language, _language),
    (_is_unet, _unet),
)


def core(module: nn.Module) -> nn.Module:
    """What a part is checked by: its network, or the whole part where that can be run, or has none."""
    return module if isinstance(module, Spa3VLM) else module.get_submodule(network_of(module))
