"""Spa3-VLM by name: sizes, and the one role in which language model and adapter are trained.

The vision tower and the geometry encoder stay frozen, in the feature service; a trainer holds neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.errors import ModelError
from models.spa3r.vlm.adapter import CROSS, RELEASED, make_adapter
from models.spa3r.vlm.model import Spa3VLM, supervised_tokens
from models.spec import Batch, ModelSpec, RoleSpec, StepOutput

VLM, CONVERSATION = "vlm", "conversation"

#: Linear layers of the language model. The adapter's have other names: it is new, and, as the child that holds no
#: update, trained whole. The role names no heads, since a baseline without adapter has none.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCKS = ("Qwen2_5_VLDecoderLayer",)


def step(module: nn.Module, batch: Batch, received: Mapping[str, Tensor], **_: object) -> StepOutput:
    """Cross-entropy of answers, as a sum over supervised tokens."""
    assert not received, "the model is of one role"
    return StepOutput(sums={"ce": module(batch)["ce"]})


def counts(batch: Batch, **_: object) -> dict[str, float]:
    """Weighted number of supervised tokens that something predicts."""
    rows, _source, _target = supervised_tokens(batch)
    return {"ce": float(batch["weight"].double()[rows].sum())}


ROLE = RoleSpec(
    name=VLM,
    step=step,
    counts=counts,
    kinds=(CONVERSATION,),
    lora_targets=LORA_TARGETS,
    checkpointed=BLOCKS,
)


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": list(sections)}


# Tiny and small read bytes (models/text); the others have Qwen2.5-VL's own vocabulary.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "vocab_size": 512, "image_token_id": 266, "latent_channels": 96,
        "language": {
            "text_config": {
                "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
                "rope_parameters": _rope(4, 6, 6), "bos_token_id": None, "eos_token_id": None,
            },
            "vision_config": {
                "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
                "fullatt_block_indexes": [1], "window_size": 112,
            },
            "tie_word_embeddings": True,
        },
    },
    "small": {
        "vocab_size": 512, "image_token_id": 266, "latent_channels": 384,
        "language": {
            "text_config": {
                "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
                "num_key_value_heads": 2, "max_position_embeddings": 16384, "rms_norm_eps": 1e-6,
                "rope_parameters": _rope(8, 12, 12), "bos_token_id": None, "eos_token_id": None,
            },
            "vision_config": {
                "depth": 4, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 512,
                "fullatt_block_indexes": [3], "window_size": 112,
            },
            "tie_word_embeddings": True,
        },
    },
    # Qwen2.5-VL-3B-Instruct.
    "3b": {
        "vocab_size": 151936, "image_token_id": 151655, "latent_channels": 768,
        "language": {
            "text_config": {
                "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                "num_key_value_heads": 2, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
                "rope_parameters": _rope(16, 24, 24),
            },
            "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
                "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
            },
            "tie_word_embeddings": True,
        },
    },
    # Qwen2.5-VL-7B-Instruct.
    "7b": {
        "vocab_size": 152064, "image_token_id": 151655, "latent_channels": 768,
        "language": {
            "text_config": {
                "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
                "rope_parameters": _rope(16, 24, 24),
            },
            "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
                "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
            },
            "tie_word_embeddings": False,
        },
    },
}  # fmt: skip


def _spec(size: str) -> ModelSpec:
    adapter = {"kind": CROSS, "heads": 0, **RELEASED}
    return ModelSpec(
        name=f"spa3-vlm-{size}",
        build=Spa3VLM,
        defaults={**SIZES[size], "adapter": adapter, "vision": False, "attention": "sdpa"},
        roles=(ROLE,),
        doc="Spa3-VLM: Qwen2.5-VL's language model and the adapter to spatial latents.",
    )


SPA3_VLM_TINY, SPA3_VLM_SMALL, SPA3_VLM_3B, SPA3_VLM_7B = (_spec(size) for size in ("tiny", "small", "3b", "7b"))


def build_adapter(*, width: int, latent_channels: int, heads: int, adapter: Mapping[str, Any]) -> nn.Module:
    """The adapter alone, for a language model of ``width`` with so many heads. ModelError for kind none."""
    found = make_adapter(width, latent_channels, heads, adapter)
    if found is None:
        raise ModelError(f"adapter={dict(adapter)} is none at all; there is nothing to build")
    return found


def _adapter_spec(size: str) -> ModelSpec:
    chosen = SIZES[size]
    text = chosen["language"]["text_config"]
    return ModelSpec(
        name=f"spa3-vlm-adapter-{size}",
        build=build_adapter,
        defaults={
            "width": text["hidden_size"], "latent_channels": chosen["latent_channels"],
            "heads": text["num_attention_heads"], "adapter": {"kind": CROSS, "heads": 0, **RELEASED},
        },
        doc="What joins visual tokens and spatial latents, alone.",
    )  # fmt: skip


ADAPTER_TINY, ADAPTER_SMALL, ADAPTER_3B, ADAPTER_7B = (_adapter_spec(size) for size in ("tiny", "small", "3b", "7b"))
