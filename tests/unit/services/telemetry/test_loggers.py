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


def test_a_resumed_run_takes_out_what_it_repeats_and_what_was_torn(tmp_path: Path) -> None:
    config = LoggerConfig(tensorboard=False)
    first = Loggers(tmp_path, config)
    for step in (1, 2, 3):
        first.log(step, "train", {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "spl')
    again = Loggers(tmp_path, config, after=2)
    again.log(3, "train", {"loss": 30.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    Loggers(tmp_path, config)  # a run that begins anew in the same folder
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_roles_share_a_file_and_do_not_mix(tmp_path: Path) -> None:
    config = LoggerConfig(tensorboard=True)
    sinks = {role: Loggers(tmp_path, config, role=role) for role in ("llm", "diffusion")}
    for step in (1, 2):
        sinks["llm"].log(step, "train", {"loss": 4.0 * step, "loss/ce": 4.0 * step, "lr": 0.5})
        sinks["diffusion"].log(step, "train", {"loss": 1.0, "loss/noise": 1.0, "lr": 0.25})
    sinks["llm"].log(2, "val", {"loss": 3.0, "accuracy": 0.5})
    sinks["diffusion"].log(2, "val", {"loss": 2.0})
    sinks["llm"].log(3, "train", {"loss": 9.0, "loss/ce": 9.0, "lr": 0.5})
    for sink in sinks.values():
        sink.close()
    assert read_metrics(tmp_path) == {
        "train": {
            "loss": {1: 5.0, 2: 9.0},
            "loss/ce": {1: 4.0, 2: 8.0, 3: 9.0},
            "llm/lr": {1: 0.5, 2: 0.5, 3: 0.5},
            "loss/noise": {1: 1.0, 2: 1.0},
            "diffusion/lr": {1: 0.25, 2: 0.25},
        },
        "val": {"loss": {2: 5.0}, "accuracy": {2: 0.5}},
    }
    assert {path.name for path in (tmp_path / "tb").iterdir()} == {"llm", "diffusion"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["role"] for line in lines[:3]] == ["llm", "diffusion", "llm"]
    for role in sinks:  # both begin again from step 1, and write into the same file still
        sinks[role] = Loggers(tmp_path, LoggerConfig(tensorboard=False), role=role, after=1)
    for role, sink in sinks.items():
        sink.log(2, "train", {"loss": 0.5 if role == "llm" else 0.25})
    assert read_metrics(tmp_path)["train"]["loss"] == {1: 5.0, 2: 0.75}


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
