"""One forward pass of a part on a random input: what two copies of the same weights must agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.pretrained import network_of
from models.probe.model import Probe
from models.uniugg.encoder import StudentViT
from models.uniugg.spatial import SpatialDecoder
from models.uniugg.vae import SpatialVae

GRID, TOKENS, TIMESTEP = 4, 16, 321


def random_inputs(module: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a forward pass of ``module``, that follow from ``seed`` and its sizes alone.

    It is a causal language model of transformers, a UNet of diffusers, or a part of ours. ModelError for others.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made = next((make(module, draw) for fits, make in _KINDS if fits(module)), None)
    if made is None:
        raise ModelError(f"a {type(module).__name__} cannot be checked by a forward pass: its inputs are not known")
    return made


@torch.no_grad()
def outputs(call: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
    """Everything that a forward pass gives, float32, as one vector."""
    return torch.cat([tensor.float().flatten() for tensor in _tensors(call(**inputs))])


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
    words = int(module.config.get_text_config().vocab_size)
    return {"input_ids": torch.randint(words, (2, TOKENS), generator=draw), "use_cache": False}


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


def _is_language(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None


def _is_unet(module: nn.Module) -> bool:
    from diffusers import UNet2DConditionModel

    return isinstance(module, UNet2DConditionModel)


_KINDS: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any, torch.Generator], dict[str, Any]]], ...] = (
    (lambda module: isinstance(module, StudentViT), _vit),
    (lambda module: isinstance(module, SpatialDecoder), _decoder),
    (lambda module: isinstance(module, SpatialVae), _vae),
    (lambda module: isinstance(module, Probe), _probe),
    (_is_language, _language),
    (_is_unet, _unet),
)


def core(module: nn.Module) -> nn.Module:
    """What a part is checked by: its network, or the whole part where it has none."""
    return module.get_submodule(network_of(module))
