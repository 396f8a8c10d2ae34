from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from configs import ConfigError
from configs.schema import LoggerConfig
from services.telemetry.loggers import Loggers, MlflowSink, read_metrics


def test_metrics_file_and_tensorboard(tmp_path: Path) -> None:
    loggers = Loggers(tmp_path, LoggerConfig(tensorboard=True))
    loggers.log(1, "train", {"loss": 2.0, "bad": float("nan")})
    loggers.log(1, "val", {"abs_rel": 0.5})
    loggers.close()
    assert read_metrics(tmp_path) == {"train": {"loss": {1: 2.0}}, "val": {"abs_rel": {1: 0.5}}}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["bad"] is None
    assert list((tmp_path / "tb").glob("events.*"))


def test_of_a_repeated_step_the_last_line_counts(tmp_path: Path) -> None:
    loggers = Loggers(tmp_path, LoggerConfig(tensorboard=False))
    for step, loss in ((1, 3.0), (2, 9.0), (2, 1.0)):
        loggers.log(step, "train", {"loss": loss})
    loggers.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "spl')
    assert read_metrics(tmp_path) == {"train": {"loss": {1: 3.0, 2: 1.0}}}


def test_a_missing_extra_is_a_config_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logger\.wandb.*pip install 'loom3d\[wandb\]'"):
        Loggers(tmp_path, LoggerConfig(tensorboard=False, wandb="project"))


def test_mlflow_receives_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "ml").as_uri()
    sink = MlflowSink(uri, "run")
    sink.log(1, "train", {"loss": 0.25})
    sink.close()
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("loom3d")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == {"train/loss": 0.25}
    assert run.info.status == "FINISHED"
