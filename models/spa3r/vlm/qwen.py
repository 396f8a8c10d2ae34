"""Qwen2.5-VL through transformers' own class: built from its config, with or without the vision tower; weights by name.

Published folders have the layout of transformers 4 (``visual.*``, ``model.*``, ``lm_head.*``) or of 5
(``model.visual.*``, ``model.language_model.*``); both are read, tensor by tensor, so that a process holds no second
copy. Nothing is downloaded and nothing is unpickled here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from models.encoders.hf import cast_stored
from models.encoders.weights import read_json, resolve_folder, weight_files
from models.errors import ModelError, WeightsError

MODEL_TYPE = "qwen2_5_vl"
VISION, TEXT, HEAD = "model.visual.", "model.language_model.", "lm_head."
OLD_VISION, OLD_TEXT = "visual.", "model."
_BOOKKEEPING = ("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype")


def qwen_settings(weights: str) -> dict[str, Any]:
    """The config of a folder (or hub name) of Qwen2.5-VL, as :func:`build_qwen` takes it. WeightsError for another."""
    folder = resolve_folder(weights)
    values = read_json(folder / "config.json")
    if values.get("model_type") != MODEL_TYPE:
        raise WeightsError(f"{folder}/config.json is of model_type {values.get('model_type')!r}, not {MODEL_TYPE!r}")
    return {key: value for key, value in values.items() if key not in _BOOKKEEPING}


def qwen_config(values: Mapping[str, Any], *, vocab_size: int, image_token_id: int) -> Any:
    """The config of transformers, with the vocabulary and the placeholder of the run on top.

    ``values`` has ``text_config`` and ``vision_config``, or the text's keys beside ``vision_config`` as in published
    folders. ModelError names what cannot be.
    """
    from transformers import Qwen2_5_VLConfig

    given = copy.deepcopy({key: value for key, value in values.items() if key != "model_type"})
    try:
        config: Any = Qwen2_5_VLConfig(**given)
    except (TypeError, ValueError) as error:
        raise ModelError(f"language: {dict(values)} is no config of Qwen2.5-VL: {error}") from error
    text, vision = config.text_config, config.vision_config
    text.vocab_size, config.image_token_id = vocab_size, image_token_id
    sections = text.rope_parameters.get("mrope_section", [16, 24, 24])
    size = text.hidden_size // text.num_attention_heads
    if text.hidden_size % text.num_attention_heads or 2 * sum(sections) != size:
        raise ModelError(
            f"language: mrope_section={list(sections)} must add up to half of a head's {size} channels (hidden_size "
            f"{text.hidden_size}, {text.num_attention_heads} heads)"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise ModelError(
            f"language: vision_config.out_hidden_size={vision.out_hidden_size} must be the width of the language "
            f"model, {text.hidden_size}"
        )
    return config


def build_qwen(config: Any, *, vision: bool, attention: str) -> Any:
    """``Qwen2_5_VLForConditionalGeneration`` with random weights in float32; works on meta.

    Without ``vision`` it has no tower at all, and takes merged visual tokens instead of pixels.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    made: Any = copy.deepcopy(config)
    if not vision:  # the class always builds a tower: the smallest there can be, and out with it
        small = made.vision_config
        small.depth, small.hidden_size, small.num_heads, small.intermediate_size, small.out_hidden_size = 0, 4, 1, 4, 4
    network: Any = Qwen2_5_VLForConditionalGeneration._from_config(
        made, attn_implementation=attention, dtype=torch.float32
    )
    if not vision:
        del network.model.visual
        for module in (network, network.model):
            module.config.vision_config = copy.deepcopy(config.vision_config)
    return network


def build_tower(vision_config: Any, *, attention: str = "sdpa") -> Any:
    """The vision tower with its merger alone, with random weights in float32; works on meta."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    return Qwen2_5_VisionTransformerPretrainedModel._from_config(
        copy.deepcopy(vision_config), attn_implementation=attention, dtype=torch.float32
    )


def our_name(published: str) -> str:
    """Name in transformers 5 of a tensor of either layout."""
    if published.startswith((VISION, TEXT, HEAD)):
        return published
    if published.startswith(OLD_VISION):
        return VISION + published.removeprefix(OLD_VISION)
    if published.startswith(OLD_TEXT):
        return TEXT + published.removeprefix(OLD_TEXT)
    return published


def text_name(published: str) -> str:
    """The same, of a network without a vision tower: "" for what belongs to one."""
    name = our_name(published)
    return "" if name.startswith(VISION) else name


def published_name(ours: str) -> str:
    """Name in the published layout, that of transformers 4."""
    if ours.startswith(VISION):
        return OLD_VISION + ours.removeprefix(VISION)
    if ours.startswith(TEXT):
        return OLD_TEXT + ours.removeprefix(TEXT)
    return ours


def base_tensors(weights: str, *, vision: bool, text: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name in transformers 5, tensor) of a folder or hub name, one at a time, in no order.

    WeightsError for a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    for file in weight_files(resolve_folder(weights)):
        try:
            with safe_open(file, "pt") as stored:
                for published in stored.keys():  # noqa: SIM118  it is no mapping
                    name = our_name(published)
                    if vision if name.startswith(VISION) else text:
                        yield name, stored.get_tensor(published)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{file} cannot be read as safetensors: {error}") from error


@torch.no_grad()
def load_qwen(network: Any, weights: str) -> None:
    """Copy a folder (or hub name) into ``network``; every tensor must fit, but for a vision tower that it lacks.

    The vocabulary may be larger than the stored one: new entries start at the mean of the stored ones. WeightsError
    lists what does not fit; the network may then hold a part of the weights.
    """
    own = network.state_dict()
    vision = any(name.startswith(VISION) for name in own)
    missing, left, wrong = set(own), list[str](), list[str]()
    for name, tensor in base_tensors(weights, vision=vision):
        if name not in own:
            left.append(name)
            continue
        missing.discard(name)
        if not _fill(own[name], tensor):
            wrong.append(f"{name}: {tuple(tensor.shape)} instead of {tuple(own[name].shape)}")
    if network.config.tie_word_embeddings:
        missing.discard(f"{HEAD}weight")
    if missing or left or wrong:
        raise WeightsError(
            f"{weights} does not fit the Qwen2.5-VL that was built: missing {sorted(missing)[:10]}, left over "
            f"{sorted(left)[:10]}, of another shape {sorted(wrong)[:10]}; build it from the same folder's config.json"
        )


def _fill(target: Tensor, stored: Tensor) -> bool:
    """Copy; a table of embeddings may have more rows than are stored. False where the shapes do not fit."""
    longer = stored.ndim == target.ndim == 2 and stored.shape[1] == target.shape[1] and len(stored) < len(target)
    if stored.shape != target.shape and not longer:
        return False
    if not longer:
        target.copy_(stored)
        return True
    target[: len(stored)].copy_(stored)
    target[len(stored) :].copy_(stored.float().mean(0).to(target.dtype).expand_as(target[len(stored) :]))
    return True


@torch.no_grad()
def fill_tower(tower: Any, weights: str) -> None:
    """Copy the vision tower of ``weights`` into ``tower``, strictly. WeightsError lists what does not fit."""
    own, wrong, left = tower.state_dict(), list[str](), list[str]()
    missing = set(own)
    for name, tensor in base_tensors(weights, vision=True, text=False):
        inner = name.removeprefix(VISION)
        missing.discard(inner)
        if inner not in own:
            left.append(inner)
        elif own[inner].shape != tensor.shape:
            wrong.append(f"{inner}: {tuple(tensor.shape)} instead of {tuple(own[inner].shape)}")
        else:
            own[inner].copy_(tensor)
    if missing or left or wrong:
        raise WeightsError(
            f"{weights} has no vision tower for this config: missing {sorted(missing)[:10]}, left over "
            f"{sorted(left)[:10]}, of another shape {sorted(wrong)[:10]}"
        )


def attach_tower(network: Any, weights: str) -> Any:
    """Give a network that was built without one the frozen vision tower of ``weights``, in place; returns it.

    What is exported for others must be whole. WeightsError when the tower does not fit.
    """
    tower = build_tower(network.config.vision_config)
    fill_tower(tower, weights)
    return put_tower(network, tower)


def put_tower(network: Any, tower: Any) -> Any:
    """Give a network a vision tower, in place, as wide and precise as it is itself; returns it.

    ModelError for a tower of another width.
    """
    like = network.model.language_model.embed_tokens.weight
    if tower.config.out_hidden_size != like.shape[1]:
        raise ModelError(
            f"the vision tower gives tokens of {tower.config.out_hidden_size} channels, the language model is "
            f"{like.shape[1]} wide; they come from the same Qwen2.5-VL"
        )
    cast_stored(tower, like.dtype)
    network.model.visual = tower.to(like.device).eval().requires_grad_(False)
    for module in (network, network.model):
        module.config.vision_config = copy.deepcopy(tower.config)
    return network


def take_tower(network: Any) -> None:
    """Take it out again."""
    del network.model.visual
