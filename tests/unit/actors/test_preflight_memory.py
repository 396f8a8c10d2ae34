"""Memory of a step on every backend: the plan's formula against what a tracker counts on rank 0 of four.

Compared are peak bytes of all storages of the second step, on the backends' own code (FSDP2 and DeepSpeed as they
train), whose collectives come from torch's fake process group; so no other rank is needed.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from actors.preflight.fake import building
from actors.preflight.memory import spread, step_cost
from actors.trainers.lora import apply_lora
from configs.schema import BackendConfig, PeftConfig
from models.spec import RoleSpec, StepOutput
from tests.support.memory_runs import measure
from tests.support.sharded_load import ROLE

TRIMMED: dict[str, Any] = {"lora": True, "checkpointing": True, "autocast": True, "accumulation": 2}
FEW: list[dict[str, Any]] = [
    {"backend": "ddp"},
    {"backend": "fsdp2"},
    {"backend": "zero2"},
    {"backend": "zero3", **TRIMMED},
]
MANY: list[dict[str, Any]] = [
    {"backend": "single", "accumulation": 2},
    {"backend": "ddp", **TRIMMED},
    {"backend": "fsdp2", **TRIMMED},
    {"backend": "fsdp2", "autocast": True, "accumulation": 2},
    {"backend": "fsdp2", "checkpointing": True, "autocast": True},
    {"backend": "zero2", **TRIMMED},
    {"backend": "zero2", "lora": True},
    {"backend": "zero2", "autocast": True, "accumulation": 2},
    {"backend": "zero3"},
    {"backend": "zero3", "lora": True},
    {"backend": "zero3", "checkpointing": True, "accumulation": 2},
    {"backend": "fsdp2", **TRIMMED, "half": True},
    {"backend": "zero3", **TRIMMED, "half": True},
]


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_memory_of_backends_is_what_a_tracker_measures(cases: list[dict[str, Any]]) -> None:
    # DeepSpeed and the fake group leave traces in a process: one for each case.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        found = list(pool.map(measure, cases, timeout=600))
    ratios = {str(case): planned / measured for case, (measured, planned) in zip(cases, found, strict=True)}
    assert not {case: ratio for case, ratio in ratios.items() if abs(ratio - 1) > 0.15}, ratios


#: Text models of Qwen2.5-VL as their configs are published: (hidden, intermediate, layers, heads, kv heads, tied).
SIZES = {"3B": (2048, 11008, 36, 16, 2, True), "7B": (3584, 18944, 28, 28, 4, False)}
PARAMETERS = {"3B": 3.086e9, "7B": 7.616e9}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_paper_s_language_models_are_planned_without_memory(size: str) -> None:
    import transformers

    hidden, inner, layers, heads, groups, tied = SIZES[size]
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=152064 if size == "7B" else 151936, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}, dtype="float32",
    )  # fmt: skip
    role = RoleSpec(name="llm", step=_hidden_step, counts=ROLE.counts, lora_targets=ROLE.lora_targets,
                          heads=("head.weight",), checkpointed=("Qwen2_5_VLDecoderLayer",))  # fmt: skip
    peaks: dict[tuple[bool, str], float] = {}
    for lora in (False, True):
        with building():
            module = torch.nn.ModuleDict({"model": transformers.Qwen2_5_VLTextModel(config)})
            if not tied:
                module["head"] = torch.nn.Linear(hidden, config.vocab_size, bias=False)
            if lora:
                apply_lora(module, role, PeftConfig(method="lora", rank=16), keep=["model.norm.weight"])
        batch = {"input_ids": torch.zeros(1, 2048, dtype=torch.int64)}
        cost = step_cost(module, role, batch, autocast=True, checkpointing=True)
        if not lora:
            trainable = cost.trainable
            assert trainable == pytest.approx(PARAMETERS[size], rel=0.002)
            # Multiply-adds of every weight forward, backward (twice) and forward again.
            assert cost.flops == pytest.approx(8 * trainable * 2048, rel=0.25)
        for name in ("ddp", "zero2", "zero3", "fsdp2"):
            part = spread(cost, module, role, BackendConfig(name=name), 8, accelerated=True)
            peaks[lora, name] = part.peak(2) / 1e9
    full, adapted = ({name: peaks[lora, name] for name in ("ddp", "zero2", "zero3", "fsdp2")} for lora in (False, True))
    assert full["fsdp2"] < full["zero3"] < full["zero2"] < full["ddp"]
    # Weights, gradients, two moments, and the copy of the gradients that travels, in float32.
    assert full["ddp"] >= 20 * trainable / 1e9
    assert all(adapted[name] < full[name] for name in full)
    assert adapted["fsdp2"] < 40


def _hidden_step(module: Any, batch: Any, received: Any) -> Any:
    """Cross-entropy through the head, or through the embedding where they are one."""
    ids = batch["input_ids"]
    states = module["model"](input_ids=ids, use_cache=False).last_hidden_state
    table = module["head"].weight if "head" in module else module["model"].embed_tokens.weight
    logits = torch.nn.functional.linear(states, table)[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return StepOutput(sums={"ce": loss})
