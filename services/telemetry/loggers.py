"""Where a run's numbers go: always ``metrics.jsonl``; TensorBoard, Weights & Biases and MLflow where asked for.

A resumed run appends to the same file and repeats the steps after its checkpoint. :func:`read_metrics` lets the
last line of a step win, so that curves show what the weights that survived have seen.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from configs import ConfigError
from configs.schema import LoggerConfig

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """One place that numbers go to."""

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` of ``split`` at ``step``."""

    def close(self) -> None:
        """Flush and let go."""


class JsonlSink:
    """``metrics.jsonl``: one line a call, flushed, so that a killed run loses nothing that was logged."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append a line; NaN and infinities become null, which JSON has."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"step": step, "split": split, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Scalars under ``tb/``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(folder / "tb"))

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Write one scalar a metric, tagged ``split/name``."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; the project is ``logger.wandb``."""

    def __init__(self, project: str, name: str, folder: Path) -> None:
        wandb = _optional("wandb", "logger.wandb")
        self._run: Any = wandb.init(project=project, name=name, dir=str(folder), resume="allow", id=name)

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Send the metrics as ``split/name``."""
        self._run.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowSink:
    """An MLflow run; the tracking URI is ``logger.mlflow``."""

    def __init__(self, uri: str, name: str) -> None:
        _optional("mlflow", "logger.mlflow")
        tracking: Any = importlib.import_module("mlflow.tracking")
        self._client = tracking.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name("loom3d")
        experiment = found.experiment_id if found else self._client.create_experiment("loom3d")
        self._run_id: str = self._client.create_run(experiment, run_name=name).info.run_id

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Send the metrics as ``split/name``."""
        for name, value in metrics.items():
            self._client.log_metric(self._run_id, f"{split}/{name}", value, step=step)

    def close(self) -> None:
        """Mark the run finished."""
        self._client.set_terminated(self._run_id)


class Loggers:
    """All sinks of a run. Only rank 0 of a role makes one."""

    def __init__(self, folder: Path, config: LoggerConfig) -> None:
        self.folder = folder
        self._sinks: list[Sink] = [JsonlSink(folder)]
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(folder))
        if config.wandb:
            self._sinks.append(WandbSink(config.wandb, folder.name, folder))
        if config.mlflow:
            self._sinks.append(MlflowSink(config.mlflow, folder.name))

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` (name -> number) of ``split`` (train, val, test) at ``step`` in every sink."""
        for sink in self._sinks:
            sink.log(step, split, metrics)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def read_metrics(folder: Path) -> dict[str, dict[str, dict[int, float]]]:
    """``{split: {name: {step: value}}}`` of a run folder, steps in order; of a repeated step the last line counts.

    A torn last line (a killed process) and null values are left out.
    """
    curves: dict[str, dict[str, dict[int, float]]] = {}
    path = folder / METRICS_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        step, split = int(row.pop("step")), str(row.pop("split"))
        row.pop("time", None)
        for name, value in row.items():
            if isinstance(value, int | float):
                curves.setdefault(split, {}).setdefault(name, {})[step] = float(value)
    return {
        split: {name: dict(sorted(values.items())) for name, values in names.items()} for split, names in curves.items()
    }


def _optional(module: str, key: str) -> Any:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key} is set but the package {module!r} is not installed; "
            f"install the extra (pip install 'loom3d[{module}]') or set {key}=''"
        ) from error
