"""Any causal language model of transformers: built from its config as a dictionary, weights from a folder.

Nothing is downloaded and nothing is unpickled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.encoders.weights import load_strict, read_json, resolve_folder
from models.errors import ModelError, WeightsError

#: Settings of a config that change the logits after the last linear layer, which is called on its own here.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def build_language(config: Mapping[str, Any], vocab_size: int) -> nn.Module:
    """A causal language model with random weights, float32, scaled dot-product attention; works on meta.

    Args:
        config: of transformers, with ``model_type``; ``vocab_size`` is put on top.
        vocab_size: entries of the embedding, special tokens among them.
    """
    import transformers

    values = dict(config)
    kind = str(values.pop("model_type", ""))
    if kind not in transformers.CONFIG_MAPPING:
        raise ModelError(f"language: model_type {kind!r} is unknown to transformers {transformers.__version__}")
    try:
        made = transformers.AutoConfig.for_model(kind, **{**values, "vocab_size": vocab_size, "dtype": "float32"})
        language = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")
    except (TypeError, ValueError) as error:
        raise ModelError(f"language: {dict(config)} is no causal language model of transformers: {error}") from error
    odd = {key: getattr(made, key) for key in _AFTER_HEAD if getattr(made, key, None) not in (None, 1, 1.0)}
    if odd:
        raise ModelError(f"language: {kind} changes its logits after the head ({odd}); such a model is not supported")
    return language


def language_settings(weights: str) -> dict[str, Any]:
    """The config of a folder (or hub name) of weights, as the setting ``language`` takes it.

    WeightsError when there is none.
    """
    folder = resolve_folder(weights)
    values = read_json(folder / "config.json")
    if "model_type" not in values:
        raise WeightsError(f"{folder}/config.json names no model_type; it describes no model of transformers")
    bookkeeping = ("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype")
    return {key: value for key, value in values.items() if key not in bookkeeping}


@torch.no_grad()
def load_language(language: nn.Module, weights: str) -> None:
    """Copy the weights of a folder (or hub name) into ``language``; every tensor must fit.

    The vocabulary of ``language`` may be larger: entries beyond the stored ones (new special tokens) start at the
    mean of the stored ones, where a fresh token disturbs the others least. WeightsError lists what does not fit.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(weights)
    stored = load_strict(AutoModelForCausalLM, folder, torch.float32).state_dict()
    own = language.state_dict()
    missing, left = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    wrong = [name for name in own.keys() & stored.keys() if not _fits(stored[name], own[name])]
    if missing or left or wrong:
        shapes = [f"{n}: {tuple(stored[n].shape)} instead of {tuple(own[n].shape)}" for n in sorted(wrong)[:10]]
        raise WeightsError(
            f"{folder} does not fit the language model that was built: missing {missing[:10]}, left over {left[:10]}, "
            f"of another shape {shapes}; build it from the same folder's config.json"
        )
    for name, target in own.items():
        source = stored[name].to(target.dtype)
        target[: len(source)].copy_(source) if target.ndim else target.copy_(source)
        if target.ndim and len(target) > len(source):
            target[len(source) :].copy_(source.float().mean(0).to(target.dtype).expand_as(target[len(source) :]))


def _fits(stored: Tensor, own: Tensor) -> bool:
    """Equal shapes, or a table of embeddings with more rows."""
    if stored.shape == own.shape:
        return True
    return stored.ndim == own.ndim == 2 and stored.shape[1] == own.shape[1] and len(stored) < len(own)
