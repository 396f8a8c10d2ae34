"""Runs of Spa3R and Spa3-VLM that nobody trained: parts of size tiny at random, in the folders that the recipes write.

What they read is small, and all of it at random: VGGT, the vision tower, the semantic encoder.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import configs
from actors.driver import run_folder
from actors.evaluate import save_parts
from actors.recipes import Built, Recipe, open_recipe
from actors.recipes.base import Facts
from actors.trainers.roles import adapt, write_settings
from actors.trainers.tensors import fill
from configs import RunConfig
from services.features.encode import build_encoder, pin_weights

STEP = 7
ROOMS = ("data.rooms.scenes=3", "data.rooms.views=4", "data.rooms.width=64", "data.rooms.height=48")
SMALL = (*ROOMS, "size=tiny", "encoders.patches.height=42", "encoders.patches.width=56", "logger.progress=off")
FIELD = ("recipe=spa3r_pretrain", "encoders.semantic.height=48", "encoders.semantic.width=64")
VLM = ("recipe=spa3_vlm", "encoders.visual.side=56", "encoders.visual.height=28", "encoders.visual.width=56",
       "generate.max_new_tokens=5")  # fmt: skip


def make_spa3r_run(root: Path, *overrides: str, seed: int = 0) -> tuple[Path, RunConfig]:
    """A run of ``spa3r_pretrain`` below ``root``: its folder and its configuration, as the driver saves it."""
    config = pin_weights(configs.load([*SMALL, *FIELD, f"storage.root={root}", f"seed={seed}", *overrides]))
    return _save(config), config


def make_vlm_run(root: Path, *overrides: str, seed: int = 0) -> tuple[Path, RunConfig]:
    """A run of ``spa3_vlm`` below ``root``, behind :func:`make_spa3r_run`'s where that is there already."""
    if not (root / "runs" / "spa3r_pretrain-tiny" / "weights").is_dir():
        make_spa3r_run(root)
    config = pin_weights(configs.load([*SMALL, *VLM, f"storage.root={root}", f"seed={seed}", *overrides]))
    return _save(config), config


def _save(config: RunConfig) -> Path:
    """What training and judging leave: the configuration, settings of the roles, parts."""
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    recipe = open_recipe(config)
    facts = Facts(outputs=lambda name: build_encoder(name, config).outputs())
    trained = {}
    for role in recipe.roles:
        built = recipe.rebuild(role, recipe.describe(role, facts))
        write_settings(folder, role, built)
        module = adapt(config, role, built)
        fill(module, built.weights or {})
        trained[role] = dataclasses.replace(built, module=shaken(module))
    save_parts(recipe, trained, folder, STEP)
    return folder


@torch.no_grad()
def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """As if it were trained: what starts at zero is no longer zero."""
    draw = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return module


def read_settings_of(folder: Path, role: str) -> dict[str, Any]:
    """Settings of a role, as its run folder keeps them."""
    settings: dict[str, Any] = json.loads((folder / "models" / f"{role}.json").read_text())
    return settings


def built_before(config: RunConfig, folder: Path, role: str) -> tuple[Recipe, Built]:
    """A role as its run began with it."""
    recipe = open_recipe(config)
    return recipe, recipe.rebuild(role, read_settings_of(folder, role))
