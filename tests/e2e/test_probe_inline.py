"""The whole chain in one process: scenes on disk, features, training, evaluation, report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actors import driver
from services.errors import QuarantineLimitError, ResumeError
from tests.support.probe_runs import losses, small_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="module")
def finished(folder: Path) -> driver.RunResult:
    return driver.train(small_run(folder, "name=finished", "trainer.ema=0.5"))


def test_the_run_folder_is_complete(finished: driver.RunResult) -> None:
    assert finished.steps == 6
    names = {path.name for path in finished.folder.iterdir()}
    assert names >= {
        "config.yaml", "metrics.jsonl", "events", "checkpoints", "evaluation.json", "examples.npz", "models",
        "report", "summary.json",
    }  # fmt: skip
    assert "broken" not in names
    assert finished.report.read_text().startswith("<!")
    assert sorted(losses(finished.folder)) == [1, 2, 3, 4, 5, 6]


def test_metrics_stand_beside_their_baselines(finished: driver.RunResult) -> None:
    evaluation = json.loads((finished.folder / "evaluation.json").read_text())
    assert (evaluation["split"], evaluation["samples"]) == ("test", 12)
    assert set(evaluation["metrics"]) == {
        "depth_linear/abs_rel", "depth_linear/delta1", "depth_dpt/abs_rel", "depth_dpt/delta1",
        "segmentation/miou", "segmentation/accuracy", "knn/view_top1", "knn/scene_top1",
    }  # fmt: skip
    for name, row in evaluation["metrics"].items():
        assert row["better"] == ("lower" if "abs_rel" in name else "higher")
        assert 0 <= row["value"] <= 5, name
        assert row["baseline_name"]
    assert evaluation["metrics"]["knn/view_top1"]["baseline"] == pytest.approx(1 / 3)
    # The room type is the colour of the whole image, which any encoder shows.
    assert evaluation["metrics"]["knn/view_top1"]["value"] > 0.6


def test_examples_have_the_encoders_size(finished: driver.RunResult) -> None:
    with np.load(finished.folder / "examples.npz", allow_pickle=False) as arrays:
        assert arrays["image"].shape == (6, 56, 56, 3)
        assert arrays["depth_true"].shape == arrays["depth_dpt"].shape == arrays["seg_pred"].shape == (6, 56, 56)
        assert arrays["pca"].shape == (6, 4, 4, 3)
        assert len(set(arrays["ids"])) == 6
        assert (arrays["depth_linear"] > 0).all()
        assert "wall" in arrays["classes"].tolist()
        # The image is the one whose depth stands beside it: nearer is brighter in these scenes.
        wall = arrays["seg_true"] == arrays["classes"].tolist().index("wall")
        shade = arrays["image"].mean(-1)[wall]
        assert np.corrcoef(shade, 1 / arrays["depth_true"][wall])[0, 1] > 0.5


def test_the_same_call_again_only_evaluates(folder: Path, finished: driver.RunResult) -> None:
    before = losses(finished.folder)
    again = driver.train(small_run(folder, "name=finished", "trainer.ema=0.5"))
    assert again.resumed_from == 6
    assert losses(again.folder) == before
    assert again.metrics == finished.metrics


def test_other_settings_are_refused_and_the_saved_config_stays(folder: Path, finished: driver.RunResult) -> None:
    saved = (finished.folder / "config.yaml").read_text()
    with pytest.raises(ResumeError, match=r"trainer\.lr: 0\.\d+ then, 0\.5 now"):
        driver.train(small_run(folder, "name=finished", "trainer.ema=0.5", "trainer.lr=0.5"))
    assert (finished.folder / "config.yaml").read_text() == saved


def test_resume_never_moves_the_earlier_run_aside(folder: Path) -> None:
    first = driver.train(small_run(folder, "name=anew", "trainer.steps=2"))
    mine = (first.folder / "metrics.jsonl").read_bytes()
    second = driver.train(small_run(folder, "name=anew", "trainer.steps=2", "trainer.resume=never", "trainer.lr=0.5"))
    assert second.resumed_from == 0
    assert (first.folder.with_name("anew.1") / "metrics.jsonl").read_bytes() == mine
    # A second run on the same data reads every feature from the cache.
    lines = [json.loads(line) for line in (second.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["hit_rate"] for line in lines if "hit_rate" in line] == [1.0, 1.0]


def test_kill_9_in_mid_run_and_the_same_call_again_give_the_same_losses(folder: Path) -> None:
    straight = driver.train(small_run(folder, "name=straight"))
    code = f"""
import os, signal
from pathlib import Path
from actors.trainers import loop
from actors import driver
from tests.support.probe_runs import small_run
original = loop.TrainLoop.train_step
def step(self, loaded):
    if loaded.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, loaded)
loop.TrainLoop.train_step = step
driver.train(small_run(Path({str(folder)!r}), "name=killed"))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    resumed = driver.train(small_run(folder, "name=killed"))
    assert resumed.resumed_from == 4
    assert losses(resumed.folder) == losses(straight.folder)
    assert resumed.metrics == straight.metrics


def test_a_broken_image_gets_weight_zero_and_is_recorded(tmp_path: Path) -> None:
    config = small_run(tmp_path, "name=first", "trainer.steps=1")
    driver.train(config)  # indexes the source while all is well
    victim = sorted((tmp_path / "scannet" / "scans").iterdir())[0] / "depth" / "1.png"
    victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(QuarantineLimitError, match=r"data\.max_broken allows 1\.00%"):
        driver.train(small_run(tmp_path, "name=strict", "trainer.steps=6"))
    kept = driver.train(small_run(tmp_path, "name=lenient", "trainer.steps=6", "data.max_broken=0.2"))
    ledger = [json.loads(line) for line in (kept.folder / "quarantine.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in ledger}) == 1
    assert str(victim) in ledger[0]["reason"]
