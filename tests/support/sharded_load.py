"""A language model that each of two ranks starts from the same safetensors file, and the memory that it takes.

The kernel's RssAnon counts what a process holds for itself: pages of a mapped file, which it may drop, are not in it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import BackendConfig, PeftConfig, TrainerConfig
from models.pretrained import StoredTensors, empty_weights
from models.spec import RoleSpec, StepOutput

#: About 90 MB of float32, no tensor of it over 9 MB.
LANGUAGE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}


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
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("this kernel does not count RssAnon")


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


def load(name: str, folder: str, *, lora: bool) -> dict[str, Any]:
    """Start the model of ``folder`` on a backend, and make a step; bytes at the peak of loading, and its loss."""
    from actors.trainers.backends import make_backend
    from actors.trainers.lora import apply_lora

    weights = StoredTensors.of(folder)
    # Once without weights, and a small model first: what is imported at first use, and threads, are not the model's.
    with empty_weights():
        language()
        small = nn.Linear(8, 8)
    values = {"weight": torch.zeros(8, 8), "bias": torch.zeros(8)}
    make_backend(BackendConfig(name=name), "cpu").prepare(small, ROLE, TrainerConfig(), values)
    with Peak() as peak:
        with empty_weights():
            module = language()
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


def load_whole(folder: str) -> int:
    """Bytes at the peak of loading the model as one does on a single device."""
    from safetensors.torch import load_file

    with empty_weights():
        language()
    with Peak() as peak:
        module = language()
        module.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return peak.bytes


def load_each(cases: list[tuple[str, bool]], folder: str) -> dict[str, Any]:
    """:func:`load` for every (backend, with low-rank updates), and :func:`load_whole` to compare with."""
    found: dict[str, Any] = {
        f"{name} {'lora' if lora else 'full'}": load(name, folder, lora=lora) for name, lora in cases
    }
    return found | {"whole": load_whole(folder)}


def alone(folder: str, *, lora: bool) -> tuple[float, float]:
    """Loss and norm of the same step by plain autograd of the whole model."""
    from safetensors.torch import load_file

    from actors.trainers.lora import apply_lora

    module = language()
    module.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    if lora:
        apply_lora(module, ROLE, PeftConfig(method="lora", rank=4))
    batch = {"input_ids": torch.arange(24).reshape(2, 12) * 7 % LANGUAGE["vocab_size"]}
    loss: Tensor = step(module, batch, {}).sums["ce"]
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))
