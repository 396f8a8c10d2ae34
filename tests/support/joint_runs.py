"""Runs of UniUGG's joint stage, as small as they get: an LLM and a diffusion on frozen parts that nobody trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import configs
from configs import RunConfig
from tests.support.uniugg_parts import save_part

_PARTS = {
    "uniugg_encoder-tiny/weights/encoder": "encoder",
    "uniugg_vae-tiny/weights/vae": "vae",
    "uniugg_align-tiny/weights/llm": "llm",
}


def joint_run(folder: Path, *overrides: str) -> RunConfig:
    """Six steps on three rooms; parts, data and cache are shared by all runs of ``folder``."""
    root = folder / "storage"
    for place, part in _PARTS.items():
        if not (root / "runs" / place).exists():
            save_part(root / "runs" / place, part)
    settings = [
        "recipe=uniugg_joint", "size=tiny", f"storage.root={root}", "logger.tensorboard=false", "logger.progress=off",
        "data.rooms.scenes=3", "data.rooms.views=4", "encoders.vit.height=64", "encoders.vit.width=64",
        "trainer.steps=6", "trainer.micro_batch=4", "trainer.accumulation=2", "trainer.warmup_steps=1",
        "trainer.log_every=1", "trainer.validate_every=0", "trainer.checkpoint_every=2", "trainer.threads=1",
        "cluster=inline", "backend=single",
    ]  # fmt: skip
    by_key = {setting.split("=", 1)[0]: setting for setting in (*settings, *overrides)}
    return configs.load(list(by_key.values()))


def lines(folder: Path, split: str = "train") -> dict[tuple[int, str], dict[str, Any]]:
    """Lines of a joint run's metrics file by step and role; two of one step and role are an error."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(text)
        if row["split"] == split and "loss" in row:
            key = row["step"], row["role"]
            assert key not in found, f"step {key[0]} of {key[1]} was logged twice"
            found[key] = row
    return found


def losses(folder: Path) -> dict[tuple[int, str], dict[str, float]]:
    """Losses and gradient norms by step and role."""
    return {
        key: {name: value for name, value in row.items() if name.startswith("loss") or name == "grad_norm"}
        for key, row in lines(folder).items()
    }
