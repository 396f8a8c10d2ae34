from __future__ import annotations

import dataclasses

import configs
from actors.recipes import open_recipe
from actors.recipes.uniugg_vae import VaeRecipe
from models.registry import build


def test_what_p2_trains_is_bound_to_the_vit_whose_tokens_it_saw() -> None:
    config = configs.load(["recipe=uniugg_vae", "model.init.spatial_decoder=random"])
    vit = dataclasses.replace(config.encoders["vit"], digest="ab" * 32)
    recipe = open_recipe(dataclasses.replace(config, encoders={"vit": vit}))
    assert isinstance(recipe, VaeRecipe)
    settings = {"vae": {"channels": 96}, "spatial_decoder": {}, "finetune_spatial_decoder": True}
    module = build("uniugg-latent-tiny", **settings)
    parts = recipe.parts("trainer", module, settings)
    assert {name: part.reads for name, part in parts.items()} == {"vae": "ab" * 32, "spatial_decoder": "ab" * 32}
    assert {name: part.model for name, part in parts.items()} == {
        "vae": "spatial-vae-tiny",
        "spatial_decoder": "uniugg-spatial-decoder-tiny",
    }
