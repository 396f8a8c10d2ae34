"""Runs and their cache: every family of encoder, a disk that fills up, a folder that is locked, two runs at once."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors import driver
from services.features import writer
from tests.support.probe_runs import losses, small_run
from tests.support.uniugg_parts import save_part

pytestmark = pytest.mark.e2e

SHORT = ("trainer.steps=4", "trainer.accumulation=1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> driver.RunResult:
    return driver.train(small_run(tmp_path_factory.mktemp("alone"), *SHORT))


@pytest.mark.parametrize("family", ["clip", "dinov3", "radio", "siglip2"])
def test_every_family_of_encoder_trains_a_probe(family: str, tmp_path: Path) -> None:
    arch = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 14"
    if family == "clip":
        arch += ", projection_dim: 24"  # summaries are narrower than tokens
    result = driver.train(
        small_run(
            tmp_path,
            f"encoder={family}-tiny",
            f"encoders.features.arch={{{arch}}}",
            "trainer.steps=2",
            "trainer.validate_every=0",
            "trainer.accumulation=1",
        )
    )
    assert sorted(losses(result.folder)) == [1, 2]
    assert 0 < result.metrics["depth_linear/abs_rel"]["value"] < 5


def test_an_encoder_that_a_run_has_trained_is_judged_like_any_other(tmp_path: Path) -> None:
    """Depth, segmentation and k-NN of the first phase's student, as of RADIO that it is compared with."""
    save_part(tmp_path / "storage" / "runs" / "uniugg_encoder-tiny" / "weights" / "encoder", "encoder")
    result = driver.train(
        small_run(
            tmp_path,
            "encoder=uniugg-encoder-tiny",
            "encoders.features.arch={}",
            "encoders.features.layers=[]",
            "encoders.features.height=64",
            "encoders.features.width=64",
            "trainer.steps=2",
            "trainer.validate_every=0",
            "trainer.accumulation=1",
        )
    )
    for metric in ("depth_linear/abs_rel", "depth_dpt/abs_rel", "segmentation/miou", "knn/view_top1", "knn/scene_top1"):
        assert math.isfinite(result.metrics[metric]["value"]), metric
    assert json.loads((result.folder / "evaluation.json").read_text())["metrics"].keys() == result.metrics.keys()


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [("write", errno.ENOSPC, "the disk is full; free space"), ("open", errno.EROFS, "the file system is read-only")],
)
def test_a_disk_that_refuses_in_mid_run_costs_the_cache_only(
    undisturbed: driver.RunResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    number: int,
    words: str,
) -> None:
    real, taken, refused = getattr(os, call), 0, 0

    def fill_up(file: Any, *args: Any, **options: Any) -> Any:
        nonlocal taken, refused
        where = str(Path(f"/proc/self/fd/{file}").readlink()) if call == "write" else str(file)
        if where.endswith(".tmp") and str(tmp_path) in where:
            if taken >= 3:
                refused += 1
                raise OSError(number, os.strerror(number))
            taken += where.endswith(".arrow.tmp")
        return real(file, *args, **options)

    monkeypatch.setattr(writer.os, call, fill_up)
    config = small_run(tmp_path, *SHORT, "cache.seal_s=0.05")
    result = driver.train(config)
    assert taken == 3
    assert refused > 3
    assert losses(result.folder) == losses(undisturbed.folder)
    assert result.metrics == undisturbed.metrics
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING and words in r.message]) == 1
    # What was committed before is there, and a later run fills the rest.
    monkeypatch.undo()
    again = driver.train(small_run(tmp_path, *SHORT, "name=again"))
    assert losses(again.folder) == losses(undisturbed.folder)


def test_two_runs_on_one_cache_at_once(undisturbed: driver.RunResult, tmp_path: Path) -> None:
    small_run(tmp_path)  # makes the scenes
    root = Path(__file__).parents[2]
    code = (
        "import sys; from pathlib import Path; from actors import driver; "
        "from tests.support.probe_runs import small_run; "
        "driver.train(small_run(Path(sys.argv[1]), f'name={sys.argv[2]}', *sys.argv[3:]))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), name, *SHORT],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )
        for name in ("one", "two")
    ]
    try:
        assert [run.wait(150) for run in runs] == [0, 0]
    finally:
        for run in runs:
            run.kill()
    for name in ("one", "two"):
        folder = tmp_path / "storage" / "runs" / name
        assert losses(folder) == losses(undisturbed.folder)
        assert json.loads((folder / "evaluation.json").read_text())["metrics"] == undisturbed.metrics
