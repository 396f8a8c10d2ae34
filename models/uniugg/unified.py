"""UniUGG's unified model (arXiv 2508.11952, section 3.3): two roles, ``llm`` and ``diffusion``, and the edge between.

The LLM role takes part in generation and conversation micro-batches, the diffusion role in generation alone; on the
edge go the LLM's last hidden states at the queries. Each role's module has a registry name of its own, so that a
worker group builds only what it trains; :func:`part_settings` says with which settings.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models import registry
from models.errors import ModelError
from models.spec import Batch, EdgeSpec, EdgeTensor, ModelSpec, RoleSpec, StepOutput, TensorSpec
from models.uniugg import diffusion as noise
from models.uniugg import llm as language
from models.uniugg.diffusion import ConditionedUNet
from models.uniugg.llm import CONVERSATION, GENERATION, UniuggLLM
from models.uniugg.objectives import DiffusionObjective, LanguageObjective

LLM, DIFFUSION, CONDITION = "llm", "diffusion", "condition"

#: Linear layers that get low-rank updates by default: attention and MLP of the language model, attention of the UNet.
LLM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

#: What is new beside the language model, and stays trained whole where that gets low-rank updates.
LLM_HEADS = ("projector.*", "queries.*")

#: Classes of the blocks of the language models that the sizes name, and of those of the UNet.
LLM_BLOCKS = ("Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer", "SmolLM3DecoderLayer")
UNET_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")


# -- steps ---------------------------------------------------------------------------------------------------


def llm_step(
    module: nn.Module, batch: Batch, received: Mapping[str, Tensor], *, objective: LanguageObjective | None = None
) -> StepOutput:
    """Cross-entropy of answers; on generation batches the condition leaves instead."""
    assert not received, "nothing comes to the LLM"
    assert objective is not None, "bind the objective first"
    out = module(batch, translation_scale=objective.translation_scale)
    return StepOutput(sums={"ce": out["ce"]}, outputs=_crossing(out))


def _crossing(out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The condition (B, queries, width) with its lengths: all queries of every sample, none is padding."""
    if CONDITION not in out:
        return {}
    condition = out[CONDITION]
    lengths = torch.tensor(condition.shape[1:]).expand(len(condition), 2)
    return {CONDITION: condition, f"{CONDITION}_lengths": lengths}


def llm_counts(batch: Batch, **_: object) -> dict[str, float]:
    """Supervised tokens."""
    return {"ce": language.counts(batch)}


def diffusion_step(
    module: nn.Module, batch: Batch, received: Mapping[str, Tensor], *, objective: DiffusionObjective | None = None
) -> StepOutput:
    """Squared error of the predicted noise under the condition that came."""
    assert objective is not None, "bind the objective first"
    prediction = module(received[CONDITION], batch, objective=objective)
    return StepOutput(sums={"noise": noise.noise_loss(prediction, batch["weight"])})


def diffusion_counts(batch: Batch, **_: object) -> dict[str, float]:
    """Latent elements."""
    return {"noise": noise.counts(batch)}


LLM_ROLE = RoleSpec(
    name=LLM,
    step=llm_step,
    counts=llm_counts,
    kinds=(GENERATION, CONVERSATION),
    no_decay=("bias", "norm", "position"),
    lora_targets=LLM_TARGETS,
    heads=LLM_HEADS,
    checkpointed=LLM_BLOCKS,
)
DIFFUSION_ROLE = RoleSpec(
    name=DIFFUSION,
    step=diffusion_step,
    counts=diffusion_counts,
    kinds=(GENERATION,),
    no_decay=("bias", "norm", "null"),
    lora_targets=UNET_TARGETS,
    heads=("conditioning.*",),
    checkpointed=UNET_BLOCKS,
)


# -- building ------------------------------------------------------------------------------------------------

#: Settings of the whole that both parts, or only one, are built from: part -> their names there.
_SHARED: Mapping[str, tuple[str, ...]] = {
    LLM: ("channels", "patch", "vocab_size", "image_token_id", "ray_token_id"),
    DIFFUSION: ("latent_channels", "latent_mean", "latent_scale"),
}


def part_settings(name: str, overrides: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Role -> (registry name, settings) of the part that ``models.build(name, **overrides)`` has for it.

    ``name`` is uniugg-SIZE or uniugg-direct-SIZE (which has no diffusion). The UNet is made for the width of the
    language model that the settings describe.
    """
    found = registry.spec(name)
    unknown = sorted(set(overrides) - set(found.defaults))
    if unknown:
        raise ModelError(f"model.overrides: {name} has no setting {unknown}; it has {sorted(found.defaults)}")
    return _parts(name, {**found.defaults, **overrides})


def _parts(name: str, values: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    size, direct = name.rpartition("-")[2], "-direct-" in name
    llm_name = f"uniugg-direct-llm-{size}" if direct else f"uniugg-llm-{size}"
    parts = {LLM: (llm_name, {**{key: values[key] for key in _SHARED[LLM]}, **values[LLM]})}
    if not direct:
        described = {**registry.spec(llm_name).defaults, **parts[LLM][1]}["language"]
        if "hidden_size" not in described:
            raise ModelError(f"model.overrides.llm.language must name hidden_size, got {sorted(described)}")
        shared = {key: values[key] for key in _SHARED[DIFFUSION]}
        settings = {**shared, "width": described["hidden_size"], **values[DIFFUSION]}
        parts[DIFFUSION] = (f"uniugg-unet-{size}", settings)
    return parts


def build_unified(name: str, **values: Any) -> nn.Module:
    """The whole model as a module with one child a role; frozen parts (ViT, VAE, spatial decoder) are left out."""
    whole = nn.Module()
    for role, (part, settings) in _parts(name, values).items():
        whole.add_module(role, registry.build(part, **settings))
    return whole


def _spec(size: str, **defaults: Any) -> ModelSpec:
    name = f"uniugg-{size}"
    condition = EdgeTensor(name=CONDITION, spec=TensorSpec(shape=(None, None), dtype="float32"))
    return ModelSpec(
        name=name,
        build=functools.partial(build_unified, name),
        defaults={**TOKENS[size], **_LATENTS, "llm": {}, "diffusion": {}, **defaults},
        roles=(LLM_ROLE, DIFFUSION_ROLE),
        edges=(EdgeSpec(source=LLM, target=DIFFUSION, tensors=(condition,), kinds=(GENERATION,)),),
        doc="UniUGG's LLM (with projector and ray queries) and the diffusion that its states condition.",
    )


def _llm(size: str, **defaults: Any) -> ModelSpec:
    return ModelSpec(
        name=f"uniugg-llm-{size}",
        build=UniuggLLM,
        defaults={**TOKENS[size], **LLM_SIZES[size], **defaults},
        roles=(LLM_ROLE,),
        doc="The LLM role of UniUGG's unified model, alone.",
    )


def _unet(size: str, width: int) -> ModelSpec:
    return ModelSpec(
        name=f"uniugg-unet-{size}",
        build=ConditionedUNet,
        defaults={**_LATENTS, "width": width, "unet": UNET_SIZES[size]},
        roles=(DIFFUSION_ROLE,),
        doc="The diffusion role of UniUGG's unified model, alone.",
    )


_LATENTS: Mapping[str, Any] = {"latent_channels": 4, "latent_mean": (), "latent_scale": 1.0}

# The ids are those of the tokenizer that the size is meant for; a run takes them from the tokenizer it has. Qwen2.5's
# table has room for them behind its 151,665 entries.
TOKENS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"channels": 96, "patch": 16, "vocab_size": 512, "image_token_id": 261, "ray_token_id": 264},
    "small": {"channels": 768, "patch": 16, "vocab_size": 49280, "image_token_id": 49278, "ray_token_id": 49279},
    "3b": {"channels": 1024, "patch": 16, "vocab_size": 151936, "image_token_id": 151934, "ray_token_id": 151935},
}

LLM_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "grid": (7, 7), "rays": "pixels", "bidirectional_queries": False,
        "language": {
            "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        },
    },
    # SmolLM2-135M-Instruct.
    "small": {
        "grid": (14, 14), "rays": "pixels", "bidirectional_queries": False,
        "language": {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    },
    # Qwen2.5-3B-Instruct.
    "3b": {
        "grid": (14, 14), "rays": "pixels", "bidirectional_queries": False,
        "language": {
            "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
    },
}  # fmt: skip

UNET_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 64,
        "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "small": {
        "block_out_channels": (128, 256, 384), "layers_per_block": 2, "norm_num_groups": 32,
        "cross_attention_dim": 512, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    # Stable Diffusion 1.5. Its `attention_head_dim` is the number of heads, for historical reasons.
    "3b": {
        "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "norm_num_groups": 32,
        "cross_attention_dim": 768, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}  # fmt: skip

UNIUGG_TINY, UNIUGG_SMALL, UNIUGG_3B = (_spec(size) for size in ("tiny", "small", "3b"))
UNIUGG_LLM_TINY, UNIUGG_LLM_SMALL, UNIUGG_LLM_3B = (_llm(size) for size in ("tiny", "small", "3b"))
UNIUGG_UNET_TINY, UNIUGG_UNET_SMALL, UNIUGG_UNET_3B = _unet("tiny", 128), _unet("small", 576), _unet("3b", 2048)
