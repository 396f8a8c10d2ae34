"""``lora_zero3``: a step of low-rank updates under ZeRO-3, on two ranks, beside the same under FSDP2: time and memory.

A Qwen2 of random weights, its blocks recomputed, is read from one safetensors file by both ranks of each pair; updates
of rank 16 are trained on text of noise. The two pairs work in turns. Memory is what a rank holds for itself (the
kernel's RssAnon) above what it held before the model: while the weights are read, and at the peak of the steps.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

from infra.bench.harness import Bench, Context, Measured, Target
from infra.bench.joint_peers import ROLES, Peers

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
_EVERY_S = 0.002


def language(size: dict[str, int]) -> Any:
    """A causal language model of ``size``, float32, its embeddings not tied."""
    import transformers

    import models  # noqa: F401  before transformers, which looks for torchvision's operations

    settings: dict[str, Any] = {**size, "tie_word_embeddings": False, "dtype": "float32"}
    config = transformers.Qwen2Config(**settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def step(module: Any, batch: Any, received: Any) -> Any:
    """Mean cross-entropy of every token."""
    import torch

    from models.spec import StepOutput

    assert not received, "nothing comes to the model"
    ids = batch["input_ids"]
    logits = module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return StepOutput(sums={"ce": torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())})


def counts(batch: Any) -> dict[str, float]:
    """The loss is a mean."""
    return {"ce": float(len(batch["input_ids"]) > 0)}


class _Anonymous:
    """The most that this process holds for itself within the block, in bytes above that at its beginning."""

    def __enter__(self) -> _Anonymous:
        import threading

        self.bytes, self.start, self._over = 0, _held(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(_EVERY_S):
            self.bytes = max(self.bytes, _held() - self.start)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _held() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


class Rank:
    """One of two ranks of a backend."""

    def __init__(self, role: str, _address: str, settings: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        from actors.trainers.backends import make_backend
        from actors.trainers.lora import apply_lora
        from actors.trainers.recompute import checkpoint_activations
        from configs.schema import BackendConfig, PeftConfig, TrainerConfig
        from models.pretrained import StoredTensors, empty_weights
        from models.spec import RoleSpec

        rank, store = list(ROLES).index(role), f"file://{settings['folder']}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(ROLES))
        self._config = TrainerConfig(lr=1e-3)
        spec = RoleSpec(name="llm", step=step, counts=counts, lora_targets=TARGETS, heads=("model.norm.weight",),
                        checkpointed=("Qwen2DecoderLayer",))  # fmt: skip
        config = BackendConfig(name=settings["backend"], persistence_threshold=10_000)
        make_backend(config, "cpu").prepare(torch.nn.Linear(2, 2), spec, self._config)  # imports are not its memory
        with _Anonymous() as loading:
            weights = StoredTensors.of(settings["weights"])
            with empty_weights():
                module = language(settings["size"])
            apply_lora(module, spec, PeftConfig(method="lora", rank=RANK), weights=weights)
            checkpoint_activations(module, spec)
            self._backend = make_backend(config, "cpu")
            self._module = self._backend.prepare(module, spec, self._config, weights).train()
        self._loading = loading.bytes
        self._base = loading.start
        generator = torch.Generator().manual_seed(rank)
        self._batch = {
            "input_ids": torch.randint(settings["size"]["vocab_size"], settings["text"], generator=generator)
        }
        self._stepping = 0
        self.loss = math.nan

    def step(self) -> float:
        """Seconds of one optimiser step."""
        import torch

        held = _held()
        with _Anonymous() as peak:
            start = time.perf_counter()
            self._backend.zero_grad()
            loss = step(self._module, self._batch, {}).sums["ce"]
            self._backend.backward(loss / len(ROLES))
            self.loss = float(loss.detach())
            _, norm = self._backend.reduce(torch.zeros(1, dtype=torch.float64))
            self._backend.update(self._config.lr, norm, self._config.clip_norm)
            seconds = time.perf_counter() - start
        self._stepping = max(self._stepping, held - self._base + peak.bytes)
        return seconds

    def close(self) -> None:
        """End the process group, before the process ends."""
        del self._module
        self._backend.close()

    def facts(self) -> dict[str, float]:
        """Bytes while loading, bytes at the peak of the steps, and the last loss."""
        return {"loading": self._loading, "stepping": self._stepping, "loss": self.loss}


def prepare(context: Context) -> Measured:
    """Seconds of a step of ZeRO-3 and of FSDP2; the extra holds the memory of both, and of the whole model."""
    import torch
    from safetensors.torch import save_file

    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
            "num_key_value_heads": 4, "vocab_size": 16384}  # fmt: skip
    if context.quick:
        size |= {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 512}
    torch.manual_seed(0)
    weights = context.folder / "weights"
    weights.mkdir()
    save_file({name: t.clone() for name, t in language(size).state_dict().items()}, weights / "model.safetensors")
    pairs: dict[str, Peers] = {}
    for backend in ("zero3", "fsdp2"):
        folder = context.folder / backend
        folder.mkdir()
        settings = {"backend": backend, "folder": str(folder), "weights": str(weights), "size": size,
                    "text": (2, context.size(256, 16))}  # fmt: skip
        pairs[backend] = context.cleanup.enter_context(Peers(Rank, settings, pinned=False))

    def seconds(backend: str) -> float:
        return float(max(pairs[backend].call("step").values()))

    def extra() -> dict[str, Any]:
        facts = {backend: list(pair.call("facts").values()) for backend, pair in pairs.items()}
        memory = {f"{backend}_{what}": max(rank[what] for rank in ranks)
                  for backend, ranks in facts.items() for what in ("loading", "stepping")}  # fmt: skip
        losses = {backend: statistics.fmean(rank["loss"] for rank in ranks) for backend, ranks in facts.items()}
        if abs(losses["zero3"] - losses["fsdp2"]) > 1e-2 * losses["fsdp2"]:
            raise RuntimeError(f"the two backends train differently: {losses}")
        return {"whole_model": (weights / "model.safetensors").stat().st_size, **memory, "ranks": len(ROLES)}

    return Measured(value=lambda: seconds("zero3"), baseline=lambda: seconds("fsdp2"), extra=extra)


#: Stated, not judged: a step that takes ten times as long would be a fault.
TABLE = [Bench(name="lora_zero3", unit="s", target=Target(on="ratio", op="<=", limit=10.0), prepare=prepare)]


def rows() -> list[Bench]:
    """The benchmarks of this module."""
    return TABLE
