"""Memory of a training step on one rank of several, measured without the others.

The ranks talk over torch's "fake" process group, whose collectives return at once: this process allocates what rank 0
of ``world`` does, on real tensors on CPU, and ``MemTracker`` counts every storage. FSDP2 and DeepSpeed run as ever.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from actors.preflight.fake import building
from actors.preflight.memory import spread, step_cost
from actors.trainers.backends import make_backend
from actors.trainers.lora import apply_lora, cast_base
from actors.trainers.recompute import checkpoint_activations
from configs.schema import BackendConfig, PeftConfig, TrainerConfig
from tests.support.sharded_load import ROLE, language, step

WORLD = 4
SIZE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2000}  # fmt: skip
PEFT = PeftConfig(method="lora", rank=8)


def measured_and_planned(
    backend: str,
    *,
    lora: bool = False,
    checkpointing: bool = False,
    autocast: bool = False,
    accumulation: int = 1,
    half: bool = False,
) -> tuple[int, int]:
    """Peak bytes of the second step of rank 0, and what the plan says; ``half``: frozen weights in bfloat16."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    settings = BackendConfig(name=backend, persistence_threshold=0)
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    try:
        measured = _measure(settings, lora, checkpointing, autocast, accumulation, half)
    finally:
        dist.destroy_process_group()
    with building():
        module = _module(lora, half)
    cost = step_cost(module, ROLE, _batch(), autocast=autocast, checkpointing=checkpointing)
    return measured, spread(cost, module, ROLE, settings, WORLD).peak(accumulation)


def _module(lora: bool, half: bool) -> Any:
    module = language(**SIZE)
    if lora:
        apply_lora(module, ROLE, PEFT)
    return cast_base(module, torch.bfloat16) if half else module


def _batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(2 * 48).reshape(2, 48) % 2000}


def _measure(
    settings: BackendConfig, lora: bool, checkpointing: bool, autocast: bool, accumulation: int, half: bool
) -> int:
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):
        """Counts frozen parameters too: its own hooks ask every parameter for a gradient."""

        def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> Any:
            return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    tracker, batch = Tracker(), _batch()
    with tracker:
        module = _module(lora, half)
        if checkpointing:
            checkpoint_activations(module, ROLE)
        backend = make_backend(settings, "cpu")
        module = backend.prepare(module, ROLE, TrainerConfig()).train()
        for _ in range(2):  # the optimiser's moments exist from the second step on
            backend.zero_grad()
            for _micro in range(accumulation):
                tracker.reset_mod_stats()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=not checkpointing):
                    loss = step(module, batch, {}).sums["ce"]
                backend.backward(loss)
                del loss
            _, norm = backend.reduce(torch.zeros(2, dtype=torch.float64))
            backend.update(1e-3, norm.nan_to_num(), 1.0)
    peak: int = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    return peak


def measure(case: dict[str, Any]) -> tuple[int, int]:
    """:func:`measured_and_planned` for a case."""
    torch.manual_seed(0)
    return measured_and_planned(**case)
