"""Where a run's numbers go: always ``metrics.jsonl``; TensorBoard, Weights & Biases and MLflow where asked for.

A resumed run goes on in the same file: lines of steps after its checkpoint, which it repeats, are taken out first, so
that what is left is what the weights that survived have seen. Several roles share the file; their lines say whose they
are, and :func:`read_metrics` makes one set of curves of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
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
    """``metrics.jsonl``: one line a call, written at once, so that a killed run loses nothing that was logged.

    The file is opened for every line, under a lock: rank 0 of every role of the run writes, perhaps from another node.
    """

    def __init__(self, folder: Path, *, role: str = "", after: int = 0) -> None:
        """``role`` marks the lines of one role of several. Lines of steps later than ``after`` are taken out."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._role = folder / METRICS_FILE, role
        rewind(folder, after)

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append a line; NaN and infinities become null, which JSON has."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        whose = {"role": self._role} if self._role else {}
        line = {"step": step, "split": split, **whose, "time": round(time.time(), 3), **values}
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):  # a file system without locks, where appending has to do
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)  # unlocks

    def close(self) -> None:
        """Nothing is held."""


class TensorBoardSink:
    """Scalars under ``tb/``, those of one role of several under ``tb/<role>``."""

    def __init__(self, folder: Path, *, role: str = "", after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = {"purge_step": after + 1} if after else {}
        self._writer: Any = SummaryWriter(log_dir=str(folder / "tb" / role), **purge)

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Write one scalar a metric, tagged ``split/name``."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run, one a role where there are several, in a group; the project is ``logger.wandb``."""

    def __init__(self, project: str, name: str, folder: Path, *, role: str = "") -> None:
        wandb = _optional("wandb", "logger.wandb")
        own = _joined(name, role)
        self._run: Any = wandb.init(project=project, name=own, group=name, dir=str(folder), resume="allow", id=own)

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

    def __init__(self, folder: Path, config: LoggerConfig, *, role: str = "", after: int = 0) -> None:
        """``role`` where several roles log into one run folder; ``after`` is the step that the run resumes from."""
        self.folder = folder
        self._sinks: list[Sink] = [JsonlSink(folder, role=role, after=after)]
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(folder, role=role, after=after))
        if config.wandb:
            self._sinks.append(WandbSink(config.wandb, folder.name, folder, role=role))
        if config.mlflow:
            self._sinks.append(MlflowSink(config.mlflow, _joined(folder.name, role)))

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` (name -> number) of ``split`` (train, val, test) at ``step`` in every sink."""
        for sink in self._sinks:
            sink.log(step, split, metrics)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def rewind(folder: Path, after: int) -> None:
    """Take the lines of steps later than ``after``, and a torn line, out of ``metrics.jsonl``.

    Ranks of several roles may do it at once, as long as none of them has begun to log.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = "".join(json.dumps(row) + "\n" for row in _rows(text) if row["step"] <= after)
    if kept == text:
        return
    draft = path.with_name(f".{METRICS_FILE}-{os.getpid()}")
    draft.write_text(kept, encoding="utf-8")
    draft.replace(path)


def read_metrics(folder: Path) -> dict[str, dict[str, dict[int, float]]]:
    """``{split: {name: {step: value}}}`` of a run folder, steps in order; of a repeated step the last line counts.

    Of several roles, ``loss`` is the sum at the steps that all of them have logged, and a name that more than one of
    them uses stands behind the role's: ``llm/lr``. A torn last line (a killed process) and null values are left out.
    """
    path = folder / METRICS_FILE
    by_role: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    for row in _rows(path.read_text(encoding="utf-8") if path.exists() else ""):
        step, split, role = int(row.pop("step")), str(row.pop("split")), str(row.pop("role", ""))
        row.pop("time", None)
        for name, value in row.items():
            if isinstance(value, int | float):
                by_role.setdefault(split, {}).setdefault(role, {}).setdefault(name, {})[step] = float(value)
    return {
        split: {name: dict(sorted(values.items())) for name, values in _merged(roles).items()}
        for split, roles in by_role.items()
    }


def _merged(roles: Mapping[str, Mapping[str, dict[int, float]]]) -> dict[str, dict[int, float]]:
    """The curves of several roles as one set; see :func:`read_metrics`."""
    if len(roles) == 1:
        return dict(next(iter(roles.values())))
    merged: dict[str, dict[int, float]] = {}
    losses = [curves["loss"] for curves in roles.values() if "loss" in curves]
    if losses:
        common = set.intersection(*(set(curve) for curve in losses))
        merged["loss"] = {step: sum(curve[step] for curve in losses) for step in common}
    for role, curves in roles.items():
        for name, curve in curves.items():
            if name != "loss":
                shared = sum(name in others for others in roles.values()) > 1
                merged[f"{role}/{name}" if shared else name] = curve
    return merged


def _rows(text: str) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file without those that are torn."""
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _joined(name: str, role: str) -> str:
    return f"{name}-{role}" if role else name


def _optional(module: str, key: str) -> Any:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key} is set but the package {module!r} is not installed; "
            f"install the extra (pip install 'loom3d[{module}]') or set {key}=''"
        ) from error
