"""What the third phase starts from: parts of runs and public weights, and what does not belong together."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import configs
import models
from actors.recipes import open_recipe
from actors.recipes.base import Facts
from models.errors import WeightsError
from models.pretrained import save_pretrained
from models.spec import TensorSpec
from tests.support.hub import empty_cache, snapshot
from tests.support.uniugg_parts import save_part

OUTPUTS = {
    "vit": {"tokens": TensorSpec(shape=(1, 7, 7, 96), dtype="float32")},
    "vae": {"mean": TensorSpec(shape=(4, 14, 14), dtype="float32")},
}
LLM = {"language", "projector", "queries"}
TRAINED = {
    "uniugg_align": {"llm": LLM},
    "uniugg_joint": {"llm": LLM, "diffusion": {"unet", "conditioning"}},
    "uniugg_finetune": {"llm": LLM, "diffusion": {"unet", "conditioning"}},
    "uniugg_direct": {"llm": LLM | {"head"}},
}
"""Recipe -> role -> what its trainer holds: neither ViT nor VAE nor spatial decoder, which the service has."""


def started(root: Path, *overrides: str) -> Any:
    """The diffusion of a run below ``root`` whose VAE lies there, as it begins."""
    vae = root / "runs" / "uniugg_vae-tiny" / "weights" / "vae"
    if not vae.exists():
        save_part(vae, "vae")
    recipe = open_recipe(configs.load(["recipe=uniugg_joint", f"storage.root={root}", *overrides]))
    facts = Facts(outputs=lambda name: OUTPUTS[name], classes=1)
    return recipe.rebuild("diffusion", recipe.describe("diffusion", facts)).module


@pytest.mark.parametrize("recipe", TRAINED)
def test_what_is_frozen_is_in_no_trainer(recipe: str, tmp_path: Path) -> None:
    save_part(tmp_path / "runs" / "uniugg_vae-tiny" / "weights" / "vae", "vae")
    config = configs.load([f"recipe={recipe}", f"storage.root={tmp_path}", "model.init={}"])
    opened, facts = open_recipe(config), Facts(outputs=lambda name: OUTPUTS[name], classes=1)
    modules = {role: opened.rebuild(role, opened.describe(role, facts)).module for role in config.cluster.roles}
    assert {role: {name for name, _ in module.named_children()} for role, module in modules.items()} == TRAINED[recipe]
    assert not any(list(module.parameters(recurse=False)) for module in modules.values())


def test_a_diffusion_goes_on_behind_its_own_vae_only(tmp_path: Path) -> None:
    saved = save_part(tmp_path / "diffusion", "diffusion", seed=3)
    init = f"model.init.diffusion={saved}"
    fresh, further = started(tmp_path, "model.init.llm=random"), started(tmp_path, "model.init.llm=random", init)
    assert not torch.equal(fresh.unet.conv_in.weight, further.unet.conv_in.weight)
    vae: Any = models.build("spatial-vae-tiny")
    vae.latent_scale.fill_(0.25)
    save_pretrained(vae, tmp_path / "runs/uniugg_vae-tiny/weights/vae", "spatial-vae-tiny", vae.settings)
    assert float(started(tmp_path, "model.init.llm=random").latent_scale) == 0.25
    with pytest.raises(
        WeightsError, match=r"model\.init\.diffusion=.* latent_scale=1\.0, those of encoders\.vae have 0\.25"
    ):
        started(tmp_path, "model.init.llm=random", init)


def test_a_run_starts_from_a_unet_of_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshot(empty_cache(monkeypatch, tmp_path / "hub"), "somebody/diffusion")
    source: Any = models.build("uniugg-unet-tiny")
    source.unet.save_pretrained(folder / "unet")
    made = started(tmp_path, "model.init.llm=random", "model.init.unet=somebody/diffusion")
    assert torch.equal(made.unet.conv_in.weight, source.unet.conv_in.weight)
    with pytest.raises(WeightsError, match=r"hf download somebody/other --include 'unet/config\.json'"):
        started(tmp_path, "model.init.llm=random", "model.init.unet=somebody/other")


def test_a_language_model_of_another_vit_is_a_start_that_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What stage i trained says which tokens it knows: a later stage hears of others, and no view is shown to both."""
    config = configs.load(["recipe=uniugg_align", f"storage.root={tmp_path}"])
    vit = dataclasses.replace(config.encoders["vit"], digest="a" * 64)
    config = dataclasses.replace(config, encoders={**config.encoders, "vit": vit})
    module: Any = models.build("uniugg-llm-tiny")
    settings = {"model": "uniugg-llm-tiny", "settings": module.settings}
    (part,) = open_recipe(config).parts("llm", module, settings).values()
    assert part.reads == "a" * 64
    save_pretrained(module, tmp_path / "llm", part.model, part.settings, extra={"reads": part.reads})
    for digest, warned in (("a", False), ("b", True)):
        again = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, init={"llm": str(tmp_path / "llm")}),
            encoders={"vit": dataclasses.replace(vit, digest=digest * 64)},
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="loom3d"):
            open_recipe(again).rebuild("llm", settings)
        assert ("trained on tokens of a ViT with sha256 aaaa" in caplog.text) is warned
