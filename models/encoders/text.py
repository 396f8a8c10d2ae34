"""Frozen text encoders through transformers: the text towers of CLIP and SigLIP, from a folder with their tokenizer.

Of a text, padded or cut to the tower's length L (a fixed shape, so that neighbours in a batch change nothing):

``tokens`` (L, C): last hidden states after the final LayerNorm.
``summary`` (1, C'): CLIP the projected end-of-text token, in the space shared with images; SigLIP the projected
    last position, for which SigLIP is always padded to L and padding takes part in attention, as in pretraining.
``offsets`` (L, 2) int32: [start, end) of each token in characters of the text; (0, 0) for special tokens.
``mask`` (L,) uint8: 1 where there is text or a special token, 0 for padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.encoders.base import FrozenEncoder, InputKind
from models.encoders.hf import architecture_identity, library_versions, quiet_transformers
from models.encoders.weights import (
    RANDOM,
    load_strict,
    read_json,
    resolve_folder,
    same_digest,
    stored_digest,
    torch_dtype,
)
from models.errors import ModelError, WeightsError
from models.spec import TensorSpec

_IMAGE_SIDE = ("vision_model.", "visual_projection.", "logit_scale", "logit_bias")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")

#: Family -> model_type of the folder (a whole model or its text tower) -> (config class, model class).
_TOWERS = {
    "clip_text": {
        "clip": ("CLIPTextConfig", "CLIPTextModelWithProjection"),
        "clip_text_model": ("CLIPTextConfig", "CLIPTextModelWithProjection"),
    },
    "siglip2_text": {
        "siglip": ("SiglipTextConfig", "SiglipTextModel"),
        "siglip_text_model": ("SiglipTextConfig", "SiglipTextModel"),
        "siglip2": ("Siglip2TextConfig", "Siglip2TextModel"),
        "siglip2_text_model": ("Siglip2TextConfig", "Siglip2TextModel"),
    },
}


class HFTextEncoder(FrozenEncoder):
    """A text tower; see the module for its outputs. Made by :func:`load_text_encoder`; loads at first use."""

    input_kind = InputKind.TEXT

    def __init__(self, folder: Path, config: Any, model_class: str, dtype: str) -> None:
        super().__init__()
        from transformers import AutoTokenizer

        self.folder, self.config, self.model_class = folder, config, model_class
        self.dtype_name, self.dtype = dtype, torch_dtype(dtype)
        # Without it transformers makes an empty tokenizer for some families, and every word becomes "unknown".
        if not (folder / "tokenizer.json").is_file():
            raise WeightsError(f"{folder} has no tokenizer.json, from which the characters of a token are known")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise WeightsError(f"{folder} has no tokenizer that can be loaded: {error}") from error
        self.length = int(config.max_position_embeddings)
        self.model: Any = None
        self._digest = ""

    def load(self) -> HFTextEncoder:
        """Build the network now; WeightsError when the folder does not fit. Returns self."""
        if self.model is None:
            import transformers

            with quiet_transformers():
                self.model = load_strict(
                    getattr(transformers, self.model_class), self.folder, self.dtype,
                    other_tower=_IMAGE_SIDE, config=self.config, attn_implementation="sdpa",
                )  # fmt: skip
            self._digest = same_digest(stored_digest(self.folder), self._digest, self.folder)
            self.freeze()
        return self

    def identity(self) -> Mapping[str, Any]:  # noqa: D102
        self._digest = self._digest or stored_digest(self.folder)
        return {
            "kind": "text",
            "model": self.model_class,
            "architecture": architecture_identity(self.config),
            "weights": self._digest,
            "tokenizer": _tokenizer_digest(self.folder),
            "dtype": self.dtype_name,
            "attention": "sdpa",
            "libraries": library_versions(),
            "padding": [self.length],
            "layout": self.layout_version,
        }

    def outputs(self) -> Mapping[str, TensorSpec]:  # noqa: D102
        projected = getattr(self.config, "projection_dim", None) or self.config.projection_size
        return {
            "tokens": TensorSpec(shape=(self.length, self.config.hidden_size), dtype=self.dtype_name),
            "summary": TensorSpec(shape=(1, projected), dtype=self.dtype_name),
            "offsets": TensorSpec(shape=(self.length, 2), dtype="int32"),
            "mask": TensorSpec(shape=(self.length,), dtype="uint8"),
        }

    def prepare(self, value: str, transform: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """A text -> input_ids (L,), mask (L,) and offsets (L, 2); longer texts are cut."""
        if transform:
            raise ModelError(f"a text encoder has no transform, got {dict(transform)}")
        encoded = self.tokenizer(
            value, padding="max_length", truncation=True, max_length=self.length, return_offsets_mapping=True,
            return_attention_mask=True,
        )  # fmt: skip
        return {
            "input_ids": torch.tensor(encoded["input_ids"]),
            "mask": torch.tensor(encoded["attention_mask"], dtype=torch.uint8),
            "offsets": torch.tensor(encoded["offset_mapping"], dtype=torch.int32),
        }

    def encode(self, inputs: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:  # noqa: D102
        model = self.load().model
        device = next(model.parameters()).device
        ids, mask, offsets = (
            torch.stack([i[k] for i in inputs]).to(device) for k in ("input_ids", "mask", "offsets")
        )  # fmt: skip
        # SigLIP was trained without a mask; CLIP's causal attention never looks at the padding behind the text.
        output = model(input_ids=ids, attention_mask=mask.long() if "CLIP" in self.model_class else None)
        summary = output.text_embeds if "CLIP" in self.model_class else output.pooler_output
        return {"tokens": output.last_hidden_state, "summary": summary[:, None], "offsets": offsets, "mask": mask}


def _tokenizer_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.exists():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def load_text_encoder(
    family: str,
    weights: str,
    *,
    arch: Mapping[str, Any] | None = None,
    layers: Sequence[int] = (),
    dtype: str = "bfloat16",
    **_image_settings: Any,
) -> HFTextEncoder:
    """The text tower of ``family`` (clip_text, siglip2_text) from a local folder or a hub name.

    ModelError for random weights (a random tower has no tokenizer), taps or an arch; WeightsError for a folder that
    does not fit. Input sizes are the tower's own.
    """
    import transformers

    if weights == RANDOM or arch or layers:
        raise ModelError(
            f"{family} needs a folder with weights and tokenizer, and takes neither arch nor layers; "
            f"got weights={weights!r}, arch={dict(arch or {})}, layers={list(layers)}"
        )
    folder = resolve_folder(weights)
    values = read_json(folder / "config.json")
    declared = str(values.get("model_type", ""))
    if declared not in _TOWERS[family]:
        raise ModelError(f"weights of type {declared!r} are no {family}; that family has {list(_TOWERS[family])}")
    config_class, model_class = _TOWERS[family][declared]
    if "text_config" in values:
        projection = {"projection_dim": values["projection_dim"]} if "projection_dim" in values else {}
        values = {**values["text_config"], **projection}
    return HFTextEncoder(folder, getattr(transformers, config_class).from_dict(values), model_class, dtype)
