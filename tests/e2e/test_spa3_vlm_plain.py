"""A language model with geometry is never judged alone: the plain finetune is trained first, and stands beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from actors import driver
from actors.evaluate import evaluate_run
from actors.report.collect import collect
from configs import ConfigError
from models.pretrained import load_pretrained
from models.spa3r.vlm.model import Spa3VLM
from tests.support.films import write_video

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

COMMON = (
    "recipe=spa3_vlm", "size=tiny", "cluster=inline", "backend=single", "data.rooms.scenes=4", "data.rooms.views=6",
    "data.rooms.width=64", "data.rooms.height=48", "encoders.patches.height=42", "encoders.patches.width=56",
    "encoders.visual.side=56", "encoders.visual.height=28", "encoders.visual.width=56", "encoders.spa3r.weights=random",
    "trainer.steps=2", "trainer.micro_batch=2", "trainer.warmup_steps=1", "trainer.checkpoint_every=0",
    "trainer.validate_every=0", "trainer.threads=1", "trainer.log_every=1", "logger.tensorboard=false",
    "logger.progress=off", "evaluate.samples=3", "generate.max_new_tokens=2",
)  # fmt: skip
NAME, PLAIN = "grounded", "grounded-plain"


def judged(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    driver.train(configs.load([*COMMON, f"name={NAME}", f"storage.root={folder}"]))
    return folder


def test_the_plain_finetune_is_trained_first_and_stands_beside_every_score(root: Path) -> None:
    own, plain = judged(root / "runs" / NAME), judged(root / "runs" / PLAIN)
    assert own["beside"]["run"] == PLAIN
    assert "missing" not in own["beside"]
    assert "beside" not in plain
    assert plain["samples"] == own["samples"] > 0
    assert any(name.startswith("answers/vsibench") for name in own["metrics"])
    for name, row in own["metrics"].items():
        assert row["also"][PLAIN] == plain["metrics"][name]["value"], name
    assert own["metrics"]["text/ce"]["baseline"] == plain["metrics"]["text/ce"]["baseline"], "one start for both"
    assert own["metrics"]["text/ce"]["value"] != plain["metrics"]["text/ce"]["value"]
    saved = {name: configs.load(file=root / "runs" / name / "config.yaml") for name in (NAME, PLAIN)}
    assert saved[PLAIN].recipe.spa3_vlm.geometry == "none"
    assert list(saved[PLAIN].encoders) == ["visual"]
    assert saved[PLAIN].trainer == saved[NAME].trainer
    assert saved[PLAIN].data == saved[NAME].data
    assert saved[PLAIN].seed == saved[NAME].seed
    model = load_pretrained(root / "runs" / PLAIN / "weights" / "llm")
    assert isinstance(model, Spa3VLM)
    assert model.adapter is None
    page = collect(root / "runs" / NAME)
    assert page.against == PLAIN
    assert all(score.other is not None and PLAIN not in score.also for score in page.scores)
    assert f'<th class="number">{PLAIN}</th>' in (root / "runs" / NAME / "report" / "index.html").read_text()


def test_a_plain_run_that_is_there_serves_again_and_is_judged_as_its_other(root: Path) -> None:
    written = (root / "runs" / PLAIN / "evaluation.json").stat().st_mtime_ns
    driver.train(configs.load([*COMMON, f"name={NAME}", f"storage.root={root}"]))
    assert (root / "runs" / PLAIN / "evaluation.json").stat().st_mtime_ns == written, "neither trained nor judged again"
    _, found = evaluate_run(str(root / "runs" / NAME), ["evaluate.samples=2"], split="val")
    assert found["split"] == judged(root / "runs" / PLAIN)["split"] == "val"
    assert found["beside"]["run"] == PLAIN
    assert PLAIN in found["metrics"]["text/ce"]["also"]


def test_another_run_can_be_named_and_must_be_a_plain_one(root: Path) -> None:
    def load(baseline: str) -> configs.RunConfig:
        return configs.load([*COMMON, "name=third", f"storage.root={root}", f"recipe.spa3_vlm.baseline={baseline}"])

    with pytest.raises(ConfigError, match=r"'nobody'.*is not there.*no config\.yaml"):
        driver.train(load("run:nobody"))
    with pytest.raises(ConfigError, match=rf"'{NAME}' to compare with is of recipe spa3_vlm and no baseline"):
        driver.train(load(f"run:{NAME}"))
    evaluate_run(str(root / "runs" / PLAIN), [], split="test")
    result = driver.train(load(f"run:{PLAIN}"))
    assert PLAIN in result.metrics["text/ce"]["also"]
    assert not (root / "runs" / "third-plain").exists()


def write_vsibench(folder: Path) -> Path:
    """Four questions about one video, in the benchmark's own files."""
    draw = np.random.default_rng(0)
    write_video(folder / "scannet" / "scene0011_00.mp4", [draw.integers(0, 256, (48, 64, 3), np.uint8)] * 9)
    about = {"dataset": "scannet", "scene_name": "scene0011_00"}
    kinds = [
        ("object_counting", "4", None), ("object_size_estimation", "120", None), ("room_size_estimation", "9", None),
        ("route_planning", "B", ["A. left", "B. right"]),
    ]  # fmt: skip
    rows = [
        {"id": n, **about, "question_type": kind, "question": "What?", "ground_truth": truth, "options": options}
        for n, (kind, truth, options) in enumerate(kinds)
    ]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_benchmark_of_videos_is_asked_of_both(root: Path, tmp_path: Path) -> None:
    added = [
        "data.sources.vsi.format=benchmark", f"data.sources.vsi.root={write_vsibench(tmp_path)}",
        "data.sources.vsi.options={name: vsibench, frames: 3}", "evaluate.samples=4",
    ]  # fmt: skip
    page, found = evaluate_run(str(root / "runs" / NAME), added)
    rows = {name: row for name, row in found["metrics"].items() if "(vsi)" in name}
    assert len(rows) == 2, "by both readers of numbers"
    for name, row in rows.items():
        told = row["protocol"]
        assert (told["frames"], told["frames_at_most"], told["questions"]) == ({"3": 4}, 3, 4)
        assert told["prompt"].startswith("These are frames of a video.")
        assert ("a later harness" in told["parser"]) == ("vsibench-words" in name)
        assert PLAIN in row["also"]
        assert name in page.read_text()
    for run in (NAME, PLAIN):
        below = root / "runs" / run / "lmms_eval" / run
        (results,) = below.glob("*_results.json")
        content = json.loads(results.read_text())
        assert content["n-samples"] == {"vsibench": {"original": 4, "effective": 4}}
        assert content["configs"]["vsibench"]["metadata"]["frames"] == {"3": 4}
        (lines,) = below.glob("*_samples_vsibench.jsonl")
        answers = [json.loads(line) for line in lines.read_text().splitlines()]
        assert [line["target"] for line in answers] == ["4", "120", "9", "B"]
        assert all(line["input"].startswith("These are frames of a video.\nWhat?") for line in answers)
