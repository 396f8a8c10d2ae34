"""Configurations of small probe runs on the scenes of ``tests.support.scenes``."""

from __future__ import annotations

import json
from pathlib import Path

import configs
from configs import RunConfig
from tests.support.scenes import write_scenes


def small_run(folder: Path, *overrides: str) -> RunConfig:
    """Six steps on toy scenes with a two-layer encoder; data and cache are shared by all runs of ``folder``."""
    data = folder / "scannet"
    if not data.exists():
        write_scenes(data)
    settings = [
        "recipe=probe", "size=tiny", "data=scannet", f"data.sources.scannet.root={data}",
        f"storage.root={folder / 'storage'}", "logger.tensorboard=false", "logger.progress=off",
        "encoders.features.arch={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 14}",
        "encoders.features.layers=[1,2]", "encoders.features.height=56", "encoders.features.width=56",
        "trainer.steps=6", "trainer.micro_batch=4", "trainer.accumulation=2", "trainer.warmup_steps=1",
        "trainer.log_every=1", "trainer.validate_every=3", "trainer.checkpoint_every=2", "trainer.threads=1",
        "cluster=inline", "backend=single",
    ]  # fmt: skip
    by_key = {setting.split("=", 1)[0]: setting for setting in (*settings, *overrides)}
    return configs.load(list(by_key.values()))


def losses(folder: Path) -> dict[int, dict[str, float]]:
    """Losses by step from a run folder's metrics.jsonl; of a repeated step the last line."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "train" and "loss" in row:
            found[row["step"]] = {k: v for k, v in row.items() if k.startswith("loss")}
    return found
