"""What Spa3-VLM is always compared with: Qwen2.5-VL finetuned plainly, on the same data, for as many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.recipes.base import Baseline
from configs import ConfigError, RunConfig
from configs.paths import RUN
from configs.roles import role_config
from models.encoders.weights import RANDOM, is_here
from models.pretrained import describe_pretrained
from models.spa3r.vlm.adapter import NONE
from services.streams.inputs import needed_encoders

SUFFIX = "-plain"
PLAIN = "Qwen2.5-VL finetuned plainly"
KEYS = ("recipe.spa3_vlm.baseline", "recipe.spa3_vlm.geometry")


def plain_run(config: RunConfig, name: str) -> Baseline | None:
    """The run that a run called ``name`` is compared with; None for one without geometry, or without a baseline.

    ConfigError where there can be none: the run starts from a language model that was trained with geometry.
    """
    vlm = config.recipe.spa3_vlm
    if vlm.geometry == "none" or vlm.baseline == "off":
        return None
    if vlm.baseline.startswith(RUN):
        other = vlm.baseline.removeprefix(RUN)
        if other == name:
            raise ConfigError(f"recipe.spa3_vlm.baseline={vlm.baseline} is this run itself; name one without geometry")
        return Baseline(name=other, title=PLAIN, keys=KEYS)
    train = _without_adapter(config)
    if train is None:  # a run that trains the adapter alone starts as the plain model, which is judged anyway
        return None
    _check_start(config)
    plain = dataclasses.replace(
        config,
        name=name + SUFFIX,
        recipe=dataclasses.replace(
            config.recipe, train=train, spa3_vlm=dataclasses.replace(vlm, geometry="none", baseline="off")
        ),
        model=dataclasses.replace(
            config.model, init={key: value for key, value in config.model.init.items() if key != "adapter"}
        ),
    )
    kept = needed_encoders(plain)
    return Baseline(
        name=plain.name,
        title=PLAIN,
        keys=KEYS,
        config=dataclasses.replace(plain, encoders={key: plain.encoders[key] for key in kept}),
    )


def _without_adapter(config: RunConfig) -> dict[str, list[str]] | None:
    """``recipe.train`` without what there is no adapter for; None where nothing else was trained."""
    kept = {role: [g for g in globs if not g.startswith("adapter")] for role, globs in config.recipe.train.items()}
    alone = [role for role, globs in config.recipe.train.items() if globs and not kept[role]]
    if any(role_config(config, role).peft.method != "lora" for role in alone):
        return None
    return {role: globs for role, globs in kept.items() if globs}


def _check_start(config: RunConfig) -> None:
    start = config.model.init.get("llm", RANDOM)
    if start == RANDOM or not is_here(start):
        return
    settings: Mapping[str, Any] = describe_pretrained(start)["settings"]
    if settings.get("adapter", {}).get("kind", NONE) != NONE:
        raise ConfigError(
            f"model.init.llm={start} was trained with geometry, so no plain finetune of it can stand beside this run; "
            f"set recipe.spa3_vlm.baseline=run:NAME of a run with recipe.spa3_vlm.geometry=none (that of "
            f"{Path(start).parent.parent.name} is {Path(start).parent.parent.name}{SUFFIX}), or baseline=off"
        )
