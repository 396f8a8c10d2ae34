"""A finished run is judged again: with other settings of judging, never as another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import configs
from actors import driver
from actors.cli import main
from actors.evaluate import TRAINED_BY, check_unchanged, evaluate_run, has_parts, save_parts
from actors.recipes import Built, open_recipe
from configs import ConfigError
from models import build
from models.uniugg.unified import part_settings
from services.contracts import Split
from services.errors import DataError, ResumeError
from tests.support.uniugg_parts import save_part


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe of the ViT that UniUGG's first phase left, trained for two steps."""
    root = tmp_path_factory.mktemp("evaluate")
    save_part(root / "runs" / "uniugg_encoder-tiny" / "weights" / "encoder", "encoder")
    config = configs.load(
        ["recipe=probe", "encoder=uniugg-encoder-tiny", f"storage.root={root}", "cluster=inline", "backend=single",
         "data.rooms.scenes=4", "data.rooms.views=3", "data.rooms.width=64", "data.rooms.height=48",
         "trainer.steps=2", "trainer.warmup_steps=1", "trainer.micro_batch=2", "trainer.validate_every=0",
         "trainer.checkpoint_every=0", "trainer.threads=1", "logger.tensorboard=false", "logger.progress=off"]
    )  # fmt: skip
    return driver.train(config).folder


def test_the_first_phases_vit_is_probed_like_any_encoder(run: Path):
    metrics = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert {"depth_linear/abs_rel", "segmentation/miou", "knn/view_top1"} <= set(metrics)


def test_judging_again_gives_the_same_numbers_and_another_split_others(run: Path):
    before = json.loads((run / "evaluation.json").read_text())
    report, again = evaluate_run(str(run), [])
    assert again == before
    assert report == run / "report" / "index.html"
    _, other = evaluate_run(str(run), [], split="val")
    assert other["split"] == Split.VAL.value
    assert json.loads((run / "evaluation.json").read_text()) == other
    score = "depth_linear/abs_rel"
    assert other["metrics"][score]["value"] != before["metrics"][score]["value"]


def test_what_was_trained_cannot_be_changed(run: Path):
    with pytest.raises(ConfigError, match=r"trainer\.lr=0\.5 \(trained with"):
        evaluate_run(str(run), ["trainer.lr=0.5"])
    with pytest.raises(ConfigError, match=r"model\.name='probe-base'"):
        evaluate_run(str(run), ["model.name=probe-base"])
    # Other rooms are other data: those that it was trained on must stay.
    with pytest.raises(ResumeError, match="trained on other data"):
        evaluate_run(str(run), ["data.rooms.seed=7"])
    saved = configs.load(file=run / "config.yaml")
    changed = replace(saved, evaluate=replace(saved.evaluate, samples=3), generate=replace(saved.generate, steps=2))
    assert check_unchanged(saved, changed) is None, "how a run is judged may change"


def test_a_run_whose_storage_was_moved_is_judged_alike(run: Path):
    _, before = evaluate_run(str(run), [])
    root = run.parents[1]
    away = root.rename(root.with_name("moved"))
    try:
        _, again = evaluate_run(str(away / "runs" / run.name), [])
    finally:
        away.rename(root)
    assert again == before


def test_weights_of_scores_that_are_not_there_are_named_before_anything_is_read(run: Path):
    with pytest.raises(ConfigError, match=r"evaluate\.lpips_weights=/absent is not there: give the path .*or leave it"):
        evaluate_run(str(run), ["evaluate.lpips_weights=/absent", "data.rooms.seed=7"])


def test_a_source_that_renumbers_the_classes_is_refused(run: Path):
    with pytest.raises(ConfigError, match="semantic classes"):
        evaluate_run(str(run), ["data.sources.more.format=rooms", f"data.sources.more.root={_rooms(run)}"])


def _rooms(run: Path) -> Path:
    return next(path.parent for path in sorted((run.parents[1] / "data").glob("rooms*/*")) if path.is_dir())


def test_the_command_prints_what_it_found(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "samples of the test split" in printed
    assert "knn/view_top1" in printed
    assert main(["evaluate", "--run", str(run), "trainer.steps=9"]) == 2
    assert "cannot be changed for an evaluation" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="is no run"):
        evaluate_run(str(tmp_path / "nothing"), [])


def test_parts_of_the_same_step_are_not_written_again(tmp_path: Path):
    recipe = open_recipe(configs.load(["recipe=uniugg_align", f"storage.root={tmp_path}"]))
    name, settings = part_settings("uniugg-tiny", {})["llm"]
    built = Built(
        module=build(name, **settings), spec=recipe._bound("llm"), settings={"model": name, "settings": settings}
    )
    trained = {"llm": built}
    assert not has_parts(recipe, trained, tmp_path, 4)
    (written,) = save_parts(recipe, trained, tmp_path, 4)
    assert has_parts(recipe, trained, tmp_path, 4)
    assert not has_parts(recipe, trained, tmp_path, 5), "another step"
    assert json.loads((written / "config.json").read_text())[TRAINED_BY]["step"] == 4
