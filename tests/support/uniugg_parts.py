"""Runs of UniUGG that nobody trained: parts of size tiny at random, in the folders that the recipes write."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

import configs
import models
from configs import RunConfig
from models.encoders.weights import stored_digest
from models.pretrained import save_pretrained

NAMES = {
    "encoder": "uniugg-vit-tiny",
    "spatial_decoder": "uniugg-spatial-decoder-tiny",
    "vae": "spatial-vae-tiny",
    "llm": "uniugg-llm-tiny",
    "diffusion": "uniugg-unet-tiny",
    "direct": "uniugg-direct-llm-tiny",
}


def save_part(folder: Path, part: str, seed: int = 0) -> Path:
    """Write a part at random into ``folder``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = models.build(NAMES[part])
        if part == "spatial_decoder":
            look_ahead(module)
    save_pretrained(module, folder, NAMES[part], module.settings)  # type: ignore[arg-type]
    return folder


@torch.no_grad()
def look_ahead(decoder: torch.nn.Module) -> None:
    """Points of a random decoder, which lie anywhere, come to lie before the camera and apart."""
    for name, parameter in decoder.named_parameters():
        if name.endswith("points.head.2.weight"):
            parameter[:2].mul_(30.0)
        if name.endswith("points.head.2.bias"):
            parameter.copy_(torch.tensor([0.0, 0.0, 1.2, 1.0]))


def make_run(root: Path, recipe: str = "uniugg_finetune", *overrides: str, seed: int = 0) -> tuple[Path, RunConfig]:
    """A run of ``recipe`` and those before it below ``root``, as after training; returns its folder and configuration.

    The digests of encoders are pinned, as the driver does.
    """
    config = configs.load([f"recipe={recipe}", f"storage.root={root}", *overrides])
    runs = root / "runs"
    for part, run in {"encoder": "uniugg_encoder", "spatial_decoder": "uniugg_encoder", "vae": "uniugg_vae"}.items():
        save_part(runs / f"{run}-tiny" / "weights" / part, part, seed)
    save_part(runs / "uniugg_vae-tiny" / "weights" / "spatial_decoder", "spatial_decoder", seed + 1)
    folder = runs / f"{recipe}-tiny"
    save_part(folder / "weights" / "llm", "direct" if recipe == "uniugg_direct" else "llm", seed)
    if recipe in ("uniugg_joint", "uniugg_finetune"):
        save_part(folder / "weights" / "diffusion", "diffusion", seed)
    pinned = {
        name: dataclasses.replace(encoder, digest=stored_digest(Path(encoder.weights)))
        for name, encoder in config.encoders.items()
        if encoder.weights != "random"
    }
    config = dataclasses.replace(config, encoders={**config.encoders, **pinned})
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    return folder, config
