"""Spa3-VLM's recipe starting from a published Qwen2.5-VL on each of two ranks, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import configs
import models
from actors.recipes import open_recipe
from actors.trainers.backends import make_backend
from actors.trainers.loop import TrainLoop
from actors.trainers.roles import make_loop
from actors.trainers.tensors import local
from configs import RunConfig
from models.pretrained import empty_weights
from models.spa3r.vlm.qwen import build_qwen, qwen_config, qwen_settings
from models.spa3r.vlm.spec import step
from tests.support.sharded_load import Peak, anonymous_bytes

WIDTH, LATENT, PAD, VOCABULARY = 512, 24, 266, 4096
#: About 90 MB in float32, no tensor of it over 9 MB.
LANGUAGE: Mapping[str, Any] = {
    "text_config": {
        "hidden_size": WIDTH, "intermediate_size": 1408, "num_hidden_layers": 7, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0], "window_size": 56,
    },
    "tie_word_embeddings": False,
}  # fmt: skip


def publish(folder: Path, dtype: torch.dtype = torch.float32, language: Mapping[str, Any] = LANGUAGE) -> Path:
    """A Qwen2.5-VL of random weights, as transformers writes it, with its vision tower."""
    torch.manual_seed(0)
    config = qwen_config(language, vocab_size=VOCABULARY, image_token_id=PAD)
    build_qwen(config, vision=True, attention="sdpa").to(dtype).save_pretrained(folder, max_shard_size="40MB")
    return folder


def run_from(folder: Path, *overrides: str) -> RunConfig:
    """A run of recipe spa3_vlm that starts from ``folder``, where no weight of 1000 values or more is left whole."""
    settings = (
        "recipe=spa3_vlm", "size=tiny", "cluster=inline", f"model.init.language={folder}", "trainer.lr=1e-3",
        "trainer.activation_checkpointing=true", "backend.persistence_threshold=1000", "trainer.warmup_steps=0",
    )  # fmt: skip
    return configs.load([*settings, *overrides])


def settings_of(folder: Path) -> dict[str, Any]:
    """What the recipe describes for that folder; a small adapter."""
    own = {"vocab_size": VOCABULARY, "image_token_id": PAD, "latent_channels": LATENT}
    return {**models.spec("spa3-vlm-tiny").defaults, **own, "language": qwen_settings(str(folder))}


def loop_of(config: RunConfig, folder: Path, backend: Any = None) -> TrainLoop:
    """The loop at step 0 as a worker makes it: rebuilt by the recipe, adapted, and placed by its backend."""
    recipe = open_recipe(config)
    built = recipe.rebuild("vlm", settings_of(folder))
    return make_loop(config, recipe, built, backend or make_backend(config.backend, "cpu"), None)


def a_batch(seed: int = 0) -> dict[str, Any]:
    """Two samples of four visual tokens and six supervised ones."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (2, 14), generator=draw)
    ids[:, 2:6] = PAD
    supervised = torch.zeros(2, 14, dtype=torch.bool)
    supervised[:, 8:] = True
    return {
        "kind": "conversation", "id": ["a", "b"], "weight": torch.ones(2), "input_ids": ids, "supervised": supervised,
        "segments": torch.zeros_like(ids), "visual": torch.randn(2, 4, WIDTH, generator=draw),
        "grids": torch.tensor([[[2, 2]], [[2, 2]]]), "latents": torch.randn(2, 5, LATENT, generator=draw),
    }  # fmt: skip


def bases(module: nn.Module) -> set[str]:
    """Data types of the frozen weights of the language model."""
    return {
        str(p.dtype) for name, p in module.named_parameters() if name.startswith("language") and not p.requires_grad
    }


def a_step(loop: TrainLoop) -> dict[str, Any]:
    """One optimiser step on the same batch on every rank: its loss, norm, and what it moved."""
    backend = loop.backend
    module = loop.module.train()
    backend.zero_grad()
    loss = step(module, a_batch(), {}).sums["ce"] / 12
    backend.backward(loss / backend.world_size)
    _, norm = backend.reduce(torch.zeros(1, dtype=torch.float64))
    backend.update(1e-3, norm, 1.0)
    kinds = {str(local(p).dtype) for p in loop.module.parameters() if p.requires_grad}
    return {"loss": float(loss.detach()), "norm": float(norm), "bases": sorted(bases(loop.module)),
            "trained": sorted(kinds), "weights": backend.weights()}  # fmt: skip


def load_each(runs: Sequence[RunConfig], folders: Sequence[str]) -> dict[str, Any]:
    """The peak of RssAnon from before each run's model is built until its weights lie where they are trained (not yet
    gradients and moments, which are cut too), above that before; and the first step.
    """
    with empty_weights():  # imports, and what they hold, are not the model's
        build_qwen(qwen_config(LANGUAGE, vocab_size=VOCABULARY, image_token_id=PAD), vision=False, attention="sdpa")
    small = nn.Linear(8, 8)
    found: dict[str, Any] = {}
    for run, folder in zip(runs, folders, strict=True):
        open_recipe(run)  # imports it
        make_backend(run.backend, "cpu").prepare(small, models.spec("spa3-vlm-tiny").roles[0], run.trainer)
        small = nn.Linear(8, 8)
        backend = make_backend(run.backend, "cpu")
        peak = PlacedPeak(backend)
        loop = loop_of(run, Path(folder), backend)
        found[run.name] = {"peak": peak.bytes, **a_step(loop)}
        del loop, backend, peak
    return found


class PlacedPeak:
    """The largest RssAnon until a backend has placed a module, above that now."""

    def __init__(self, backend: Any) -> None:
        self._place, self._before, self.bytes = backend._place, anonymous_bytes(), 0
        backend._place = self._watched
        self._peak = Peak()
        self._peak.__enter__()

    def _watched(self, *arguments: Any) -> Any:
        module = self._place(*arguments)
        self._peak.__exit__()
        self.bytes = max(self._peak.bytes, anonymous_bytes() - self._before)
        return module
