"""An adapter of Spa3-VLM belongs to the language model that its run began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import configs
from actors.evaluate import save_parts
from actors.preflight.fake import building
from actors.recipes import Built, Recipe, open_recipe
from actors.recipes.spa3_vlm_base import BASE
from actors.trainers.tensors import fill
from configs import RunConfig
from models.pretrained import CONFIG, describe_pretrained, load_pretrained
from models.registry import spec
from models.spa3r.vlm.qwen import build_qwen, qwen_config, qwen_settings
from services.errors import WeightsError
from tests.support.spa3_vlm import LANGUAGE, LATENT, PAD, VOCABULARY

OWN: Mapping[str, Any] = {"vocab_size": VOCABULARY, "image_token_id": PAD, "latent_channels": LATENT}


def published(folder: Path, seed: int = 0, **text: int) -> Path:
    """A small Qwen2.5-VL in a folder as transformers writes it."""
    torch.manual_seed(seed)
    language = {**LANGUAGE, "text_config": {**LANGUAGE["text_config"], **text}}
    config = qwen_config(language, vocab_size=VOCABULARY, image_token_id=PAD)
    build_qwen(config, vision=True, attention="sdpa").save_pretrained(folder)
    return folder


def run_of(**init: Path | str | int) -> RunConfig:
    given = [f"model.init.{key}={value}" for key, value in init.items() if key != "seed"]
    return configs.load(["recipe=spa3_vlm", "size=tiny", "cluster=inline", *given, f"seed={init.get('seed', 0)}"])


def rebuilt(config: RunConfig, language: Mapping[str, Any] = LANGUAGE) -> tuple[Recipe, Built]:
    recipe = open_recipe(config)
    start = config.model.init.get("language")
    chosen = qwen_settings(start) if start else language
    settings = {**spec("spa3-vlm-tiny").defaults, "language": chosen, **OWN}
    return recipe, recipe.rebuild("vlm", settings)


def trained(config: RunConfig, folder: Path) -> Path:
    """The adapter of a run that has moved it, and its language model too."""
    recipe, built = rebuilt(config)
    fill(built.module, built.weights or {})
    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.add_(0.01)
    save_parts(recipe, {"vlm": built}, folder, 3)
    return folder / "weights" / "adapter"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    found = {"first": published(root / "first"), "second": published(root / "second", seed=1)}
    found["deeper"] = published(root / "deeper", num_hidden_layers=3)
    return found | {"adapter": trained(run_of(language=found["first"]), root / "run")}


def test_it_is_written_down(places: dict[str, Path]) -> None:
    described = describe_pretrained(places["adapter"])
    base = described[BASE]
    assert (base["layers"], base["width"], base["from"]) == (2, 32, str(places["first"]))
    assert len(base["sha256"]) == 64
    assert describe_pretrained(places["adapter"].with_name("llm"))[BASE] == base
    assert BASE not in described["settings"]
    assert load_pretrained(places["adapter"].with_name("llm")), "settings are those of the model alone"


def test_the_same_language_model_takes_it(places: dict[str, Path], tmp_path: Path) -> None:
    _, built = rebuilt(run_of(language=places["first"], adapter=places["adapter"], seed=3))
    stored = load_pretrained(places["adapter"]).state_dict()
    own: Any = built.module
    assert all(torch.equal(own.adapter.state_dict()[name], value) for name, value in stored.items())
    # What the run has made of the language model, too; and the same model in another precision and other files.
    rebuilt(run_of(llm=places["adapter"].with_name("llm"), adapter=places["adapter"]))
    from transformers import Qwen2_5_VLForConditionalGeneration

    loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(places["first"], dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "half", max_shard_size="20KB")
    rebuilt(run_of(language=tmp_path / "half", adapter=places["adapter"]))


@pytest.mark.parametrize("name", ["second", "deeper"])
def test_another_one_of_the_same_width_is_refused(name: str, places: dict[str, Path]) -> None:
    layers = {"second": 2, "deeper": 3}[name]
    with pytest.raises(
        WeightsError,
        match=rf"init.adapter=.*another base: it was trained behind .*/first \(2 layers, width 32, sha256 .*; the "
        rf"run's language model is .*/{name} \({layers} layers",
    ):
        rebuilt(run_of(language=places[name], adapter=places["adapter"]))


def test_random_language_models_differ_by_seed(tmp_path: Path) -> None:
    adapter = trained(run_of(seed=4), tmp_path)
    rebuilt(run_of(adapter=adapter, seed=4))
    with pytest.raises(WeightsError, match=r"trained behind random \(seed 4\) .* language model is random \(seed 5\)"):
        rebuilt(run_of(adapter=adapter, seed=5))


def test_an_older_part_is_checked_by_width(places: dict[str, Path], tmp_path: Path) -> None:
    adapter = trained(run_of(language=places["first"]), tmp_path)
    described = json.loads((adapter / CONFIG).read_text())
    del described[BASE]
    (adapter / CONFIG).write_text(json.dumps(described))
    rebuilt(run_of(language=places["second"], adapter=adapter))
    described["settings"]["width"] = 64
    (adapter / CONFIG).write_text(json.dumps(described))
    with pytest.raises(WeightsError, match=r"is an adapter for another base: it has {'width': 64}.*{'width': 32}"):
        rebuilt(run_of(language=places["second"], adapter=adapter))


def test_a_plan_has_no_values_to_tell_a_base_by() -> None:
    with building():
        _, built = rebuilt(run_of())
    assert BASE not in built.settings
