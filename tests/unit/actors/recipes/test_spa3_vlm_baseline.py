"""Which plain run stands beside a language model with geometry, and what an evaluation says where it has no scores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import configs
from actors.beside import add_scores, judge_first, judged_by
from actors.recipes import open_recipe
from actors.trainers.roles import deciding_settings
from configs import ConfigError, RunConfig
from models.pretrained import save_pretrained
from services.contracts import Split
from tests.support.spa3_vlm import small_vlm

MINE = ("recipe=spa3_vlm", "size=tiny", "cluster=inline", "name=mine")


def load(*overrides: str) -> RunConfig:
    return configs.load([*MINE, *overrides])


def plain_of(config: RunConfig) -> Any:
    return open_recipe(config).baseline("mine")


def test_all_but_the_geometry_stays() -> None:
    config = load("seed=7", "trainer.lr=3e-4", "model.init.adapter=/a/folder", "peft=lora")
    found = plain_of(config)
    assert found.name == found.config.name == "mine-plain"
    settings, own = deciding_settings(found.config), deciding_settings(config)
    differing = {key for key in {*settings, *own} if settings.get(key) != own.get(key)}
    assert {key for key in differing if not key.startswith("encoders.")} == {
        "recipe.spa3_vlm.geometry", "model.init.adapter",
    }  # fmt: skip
    assert {key.split(".")[1] for key in differing if key.startswith("encoders.")} == {
        "patches", "views", "spa3r", "semantic",
    } & set(config.encoders)  # fmt: skip
    assert found.config.data == config.data


def test_there_is_none_without_geometry_and_where_it_is_off() -> None:
    assert plain_of(load("recipe.spa3_vlm.geometry=none")) is None
    assert plain_of(load("recipe.spa3_vlm.baseline=off")) is None
    assert open_recipe(configs.load(["recipe=probe", "size=tiny"])).baseline("mine") is None


def test_what_names_the_adapter_is_left_out() -> None:
    both = load("recipe.train.vlm=['adapter.*','language.lm_head.*']")
    assert plain_of(both).config.recipe.train == {"vlm": ["language.lm_head.*"]}
    assert plain_of(load("recipe.train.vlm=['adapter.*']")) is None, "the plain model as it began is judged anyway"
    low = plain_of(load("recipe.train.vlm=['adapter.*']", "peft=lora"))
    assert low.config.recipe.train == {}


def test_a_named_run_is_that_run() -> None:
    found = plain_of(load("recipe.spa3_vlm.baseline=run:other"))
    assert (found.name, found.config) == ("other", None)
    with pytest.raises(ConfigError, match="is this run itself"):
        plain_of(load("recipe.spa3_vlm.baseline=run:mine"))


@pytest.mark.parametrize("value", ["always", "run:", "run:a/llm", "on"])
def test_other_words_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"baseline='.*' must be train, off, or run:NAME"):
        load(f"recipe.spa3_vlm.baseline={value}")


def test_a_start_with_geometry_has_no_plain_finetune(tmp_path: Path) -> None:
    model = small_vlm()
    save_pretrained(model, tmp_path / "runs" / "first" / "weights" / "llm", "spa3-vlm-tiny", model.settings)
    config = load(f"model.init.llm={tmp_path}/runs/first/weights/llm")
    with pytest.raises(ConfigError, match=r"trained with geometry.*first is first-plain\), or baseline=off"):
        plain_of(config)


def test_what_a_run_is_compared_with_decides_nothing() -> None:
    assert deciding_settings(load("recipe.spa3_vlm.baseline=off")) == deciding_settings(load())


def test_scores_of_other_data_do_not_stand_beside(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    rows = {"text/ce": {"value": 1.0, "baseline": 2.0, "baseline_name": "before", "better": "lower"}}
    evaluation = {"split": "test", "step": 3, "samples": 4, "metrics": rows}
    config = load(f"storage.root={tmp_path}")
    found = add_scores(config, folder, dict(evaluation))
    assert found["beside"]["missing"] == "it was not judged"
    other = folder.with_name("mine-plain")
    other.mkdir(parents=True)
    (other / "evaluation.json").write_text(json.dumps({**evaluation, "samples": 5}))
    found = add_scores(config, folder, dict(evaluation))
    assert found["beside"]["missing"] == "it was judged on samples=5, this run on samples=4"
    assert found["metrics"] == rows
    (other / "evaluation.json").write_text(json.dumps({**evaluation, "metrics": {"text/ce": {"value": 1.5}}}))
    found = add_scores(config, folder, dict(evaluation))
    assert found["metrics"]["text/ce"]["also"] == {"mine-plain": 1.5}


def test_the_other_is_judged_by_its_own_geometry(tmp_path: Path) -> None:
    folder, asked = tmp_path / "runs" / "mine", []
    other = folder.with_name("mine-plain")
    overrides = ["name=mine", "recipe.spa3_vlm.geometry=cross", "recipe.spa3_vlm.baseline=train", "evaluate.samples=2"]
    config = load(f"storage.root={tmp_path}", *overrides[1:])
    judge_first(config, folder, overrides, Split.VAL, lambda place, keys: asked.append((place, keys)))
    assert asked == [], "it was never judged, which its scores say"
    other.mkdir(parents=True)
    (other / "evaluation.json").write_text(json.dumps({"split": "test", "judged_by": judged_by(config)}))
    judge_first(config, folder, overrides, Split.VAL, lambda place, keys: asked.append((place, keys)))
    assert asked == [(str(other), ["evaluate.samples=2"])]


def test_how_a_run_is_judged_has_a_digest() -> None:
    config = load()
    fewer = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, samples=1))
    assert judged_by(config) != judged_by(fewer)
    assert judged_by(config) == judged_by(plain_of(config).config)


def test_a_plan_says_that_two_trainings_run(tmp_path: Path) -> None:
    from actors import preflight

    def notes(*more: str) -> list[str]:
        plan = preflight.plan(load(f"storage.root={tmp_path}", "encoders.spa3r.weights=random", *more))
        return [note for note in plan.notes if "two trainings" in note]

    (note,) = notes()
    assert "first mine-plain (Qwen2.5-VL finetuned plainly)" in note
    assert notes("recipe.spa3_vlm.baseline=off") == []
