"""UniUGG without VAE and diffusion (arXiv 2508.11952, appendix A.4): the language model regresses the target's tokens.

It is the paper's simplified variant and its ablation (d): where the diffusion draws one of the views that could be,
a regression gives their mean, hence smooth surfaces.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.spec import Batch, ModelSpec, RoleSpec, StepOutput
from models.uniugg import llm as language
from models.uniugg.llm import CONVERSATION, GENERATION, UniuggLLM, target_grid
from models.uniugg.losses import distillation
from models.uniugg.objectives import DirectObjective
from models.uniugg.unified import LLM, LLM_BLOCKS, LLM_HEADS, LLM_SIZES, LLM_TARGETS, TOKENS


class DirectLLM(UniuggLLM):
    """The language role with a head that turns the states at the queries into patch tokens."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.head = nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, self.channels))

    def forward(self, batch: Batch, *, translation_scale: str) -> dict[str, Tensor]:
        """As :class:`UniuggLLM`; of a generation batch ``tokens`` (B, h, w, C) of the target view, float32."""
        out = super().forward(batch, translation_scale=translation_scale)
        if batch["kind"] == GENERATION:
            out["tokens"] = self.head(out["condition"]).unflatten(1, target_grid(batch)).float()
        else:  # the head takes part
            out["ce"] = out["ce"] + 0.0 * self.head(out["ce"].new_zeros(1, self.width)).sum()
        return out


def step(
    module: nn.Module, batch: Batch, received: Mapping[str, Tensor], *, objective: DirectObjective | None = None
) -> StepOutput:
    """Cross-entropy of answers, and the distance of regressed tokens from the target's."""
    assert not received, "the direct variant has no edges"
    assert objective is not None, "bind the objective first"
    out = module(batch, translation_scale=objective.translation_scale)
    regression = out["ce"].new_zeros(())
    if batch["kind"] == GENERATION:
        target, weight = target_tokens(batch), batch["weight"]
        with torch.autocast(target.device.type, enabled=False):
            distance = distillation(out["tokens"], target, objective.cosine, objective.smooth_l1).flatten(1).sum(1)
        regression = torch.where(weight > 0, distance * weight, torch.zeros_like(distance)).sum()
    return StepOutput(sums={"ce": out["ce"], "token_regression": regression})


def counts(batch: Batch, **_: object) -> dict[str, float]:
    """Supervised tokens of text, and patch tokens of target views."""
    regressed = 0.0
    if batch["kind"] == GENERATION:
        target = target_tokens(batch)
        regressed = float(batch["weight"].double().sum()) * target.shape[1] * target.shape[2]
    return {"ce": language.counts(batch), "token_regression": regressed}


def target_tokens(batch: Batch) -> Tensor:
    """Tokens (B, h, w, C) of the target view. ModelError when its grid is not that of the queries."""
    target: Tensor = batch["target_tokens"][:, 0]
    if tuple(target.shape[1:3]) != target_grid(batch):
        raise ModelError(
            f"the target view has {target.shape[1]}x{target.shape[2]} tokens and the reference has "
            f"{target_grid(batch)}; both must be cut to the size of encoders.vit"
        )
    return target


DIRECT_ROLE = RoleSpec(
    name=LLM,
    step=step,
    counts=counts,
    kinds=(GENERATION, CONVERSATION),
    no_decay=("bias", "norm", "position"),
    lora_targets=LLM_TARGETS,
    heads=(*LLM_HEADS, "head.*"),
    checkpointed=LLM_BLOCKS,
)


def build_direct(size: str, *, llm: Mapping[str, Any], **tokens: Any) -> DirectLLM:
    """The model of a size; ``llm`` overrides settings of the language side, as in the unified model."""
    return DirectLLM(**{**LLM_SIZES[size], **tokens, **llm})


def _size(size: str) -> ModelSpec:
    return ModelSpec(
        name=f"uniugg-direct-{size}",
        build=functools.partial(build_direct, size),
        defaults={**TOKENS[size], "llm": {}},
        roles=(DIRECT_ROLE,),
        doc="UniUGG's variant without diffusion: the LLM regresses the tokens of the target view.",
    )


def _part(size: str) -> ModelSpec:
    return ModelSpec(
        name=f"uniugg-direct-llm-{size}",
        build=DirectLLM,
        defaults={**TOKENS[size], **LLM_SIZES[size]},
        roles=(DIRECT_ROLE,),
        doc="The language role of the direct variant, as a part.",
    )


DIRECT_TINY, DIRECT_SMALL, DIRECT_3B = (_size(size) for size in ("tiny", "small", "3b"))
DIRECT_LLM_TINY, DIRECT_LLM_SMALL, DIRECT_LLM_3B = (_part(size) for size in ("tiny", "small", "3b"))
