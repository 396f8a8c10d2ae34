"""A language model that each of two ranks starts from the same safetensors file, and the memory that it takes.

The kernel's RssAnon counts what a process holds for itself: pages of a mapped file, which it may drop, are not in it.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import BackendConfig, PeftConfig, TrainerConfig
from models.pretrained import StoredTensors, empty_weights
from models.spec import RoleSpec, StepOutput

#: 257 MiB of float32, no tensor of it over 16 MiB: few layers, for each costs Python's objects as well.
LANGUAGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
#: By the size's name: what is not as in :data:`LANGUAGE`. ``wide`` has 154 MiB, of which two tensors of 32 MiB.
SIZES: Mapping[str, dict[str, int]] = {"deep": {}, "wide": {"num_hidden_layers": 2, "vocab_size": 8192}}
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}


def step(module: nn.Module, batch: Any, received: Any) -> StepOutput:
    """Cross-entropy of every token."""
    assert not received
    ids = batch["input_ids"]
    logits = module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return StepOutput(sums={"ce": nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())})


def counts(batch: Any) -> dict[str, float]:
    """The loss is a mean already."""
    return {"ce": float(batch["input_ids"].shape[0] > 0)}


ROLE = RoleSpec(
    name="llm",
    step=step,
    counts=counts,
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    heads=("model.norm.weight",),
    checkpointed=("Qwen2DecoderLayer",),
)


def language(**settings: Any) -> nn.Module:
    """A Qwen2 of transformers, float32, with random weights; its embeddings are not tied."""
    import transformers

    config = transformers.Qwen2Config(**{**LANGUAGE, "tie_word_embeddings": False, "dtype": "float32", **settings})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def anonymous_bytes() -> int:
    """RssAnon of this process: what is resident of it without what it shares with files."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_bytes().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The largest RssAnon within the block, above that at its beginning; another thread looks every millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self._start, self._over = 0, anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes() - self._start)


def load(name: str, folder: str, size: str, *, lora: bool) -> dict[str, Any]:
    """Start the model of that size on a backend, and make a step; bytes at the peak of loading, and its loss."""
    from actors.trainers.backends import make_backend
    from actors.trainers.lora import apply_lora
    from actors.trainers.tensors import give_back

    weights = StoredTensors.of(Path(folder) / size)
    # All of it with a tiny model first: what is imported at first use, and threads, are not the model's.
    values = language(**TINY).state_dict()
    with empty_weights():
        tiny = language(**TINY)
    if lora:
        apply_lora(tiny, ROLE, PeftConfig(method="lora", rank=4), weights=values)
    make_backend(BackendConfig(name=name, persistence_threshold=1000), "cpu").prepare(
        tiny, ROLE, TrainerConfig(), values
    )
    gc.collect()
    give_back(2**30)  # what the model before this one has left is not for this one to use
    with Peak() as peak:
        with empty_weights():
            module = language(**SIZES[size])
        if lora:
            apply_lora(module, ROLE, PeftConfig(method="lora", rank=4), weights=weights)
        backend = make_backend(BackendConfig(name=name, persistence_threshold=1000), "cpu")
        module = backend.prepare(module, ROLE, TrainerConfig(lr=1e-3), weights).train()
    batch = {"input_ids": torch.arange(24).reshape(2, 12) * 7 % LANGUAGE["vocab_size"]}
    backend.zero_grad()
    loss = step(module, batch, {}).sums["ce"]
    backend.backward(loss / backend.world_size)
    _, norm = backend.reduce(torch.zeros(1, dtype=torch.float64))
    return {"peak": peak.bytes, "loss": float(loss.detach()), "norm": float(norm)}


def load_each(cases: list[tuple[str, bool, str]], folder: str) -> dict[str, Any]:
    """:func:`load` for every (backend, with low-rank updates, size)."""
    return {f"{name} {lora} {size}": load(name, folder, size, lora=lora) for name, lora, size in cases}


def alone(folder: str, size: str, *, lora: bool) -> tuple[float, float]:
    """Loss and norm of the same step by plain autograd of the whole model."""
    from safetensors.torch import load_file

    from actors.trainers.lora import apply_lora

    module = language(**SIZES[size])
    module.load_state_dict(load_file(Path(folder) / size / "model.safetensors"))
    if lora:
        apply_lora(module, ROLE, PeftConfig(method="lora", rank=4))
    batch = {"input_ids": torch.arange(24).reshape(2, 12) * 7 % LANGUAGE["vocab_size"]}
    loss: Tensor = step(module, batch, {}).sums["ce"]
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))
