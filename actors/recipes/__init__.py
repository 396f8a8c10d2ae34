"""The recipes: what is trained, from which samples, and how it is judged."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from actors.recipes.base import Built, Part, Recipe
from configs import ConfigError
from configs.schema import RunConfig

__all__ = ["RECIPES", "Built", "Part", "Recipe", "open_recipe"]

#: Name of a recipe -> where its class is; modules are imported when a run asks for them.
RECIPES: Mapping[str, str] = {
    "probe": "actors.recipes.probe:ProbeRecipe",
    "uniugg_encoder": "actors.recipes.uniugg_encoder:EncoderRecipe",
    "uniugg_vae": "actors.recipes.uniugg_vae:VaeRecipe",
    "uniugg_align": "actors.recipes.uniugg_unified:UnifiedRecipe",
    "uniugg_joint": "actors.recipes.uniugg_unified:UnifiedRecipe",
    "uniugg_finetune": "actors.recipes.uniugg_unified:UnifiedRecipe",
    "uniugg_direct": "actors.recipes.uniugg_unified:UnifiedRecipe",
    "spa3r_pretrain": "actors.recipes.spa3r:Spa3rRecipe",
    "spa3_vlm": "actors.recipes.spa3_vlm:VlmRecipe",
}


def open_recipe(config: RunConfig) -> Recipe:
    """The recipe that ``recipe.name`` chooses. ConfigError lists the names there are."""
    name = config.recipe.name
    if name not in RECIPES:
        raise ConfigError(f"recipe.name={name!r} is not a recipe; there are {', '.join(RECIPES)}")
    module, attribute = RECIPES[name].split(":")
    found: type[Recipe] = getattr(importlib.import_module(module), attribute)
    return found(config)
