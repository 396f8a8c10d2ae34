"""Reads a run folder into one object; whatever a run did not write stays empty, and the report leaves it out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actors.report.units import with_unit
from services.errors import DataError
from services.telemetry import events
from services.telemetry.loggers import read_metrics


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of the final evaluation beside its trivial baseline."""

    name: str
    value: float
    baseline: float | None
    baseline_name: str
    better: str
    """"lower" or "higher"."""
    also: dict[str, float] = field(default_factory=dict)
    """Further baselines by name."""
    other: float | None = None
    """The same metric of the run that this one is compared with."""

    @property
    def label(self) -> str:
        """The name with its unit."""
        return with_unit(self.name)

    @property
    def margin(self) -> float | None:
        """Relative improvement over the other run, positive when this one is better; None without one."""
        if not self.other:
            return None
        return (self.value / self.other - 1) * (-1 if self.better == "lower" else 1)

    @property
    def beats_baseline(self) -> bool | None:
        """Whether the value is on the better side of the baseline; None where there is none."""
        if self.baseline is None:
            return None
        return self.value < self.baseline if self.better == "lower" else self.value > self.baseline


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run folder holds."""

    folder: Path
    config: str
    curves: dict[str, dict[str, dict[int, float]]]
    events: list[dict[str, Any]]
    scores: tuple[Score, ...] = ()
    evaluated_on: str = ""
    examples: dict[str, np.ndarray] = field(default_factory=dict)
    blind: list[dict[str, Any]] = field(default_factory=list)
    """Rows of ``blind.jsonl``: the best score without images, by source, split and type of question."""
    pictures: list[dict[str, Any]] = field(default_factory=list)
    """``file`` (relative to the folder), ``title``, ``caption``, as the recipe left them."""
    tables: list[dict[str, Any]] = field(default_factory=list)
    """``title``, ``note``, ``columns``, ``rows``."""
    summary: dict[str, Any] = field(default_factory=dict)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    against: str = ""
    """Name of the run that this one is compared with."""


def collect(folder: Path, against: Path | None = None) -> RunData:
    """Read ``folder``, and the scores of the run ``against`` beside its own.

    DataError when a folder is no run folder, or the two runs were not judged on the same samples.
    """
    config = folder / "config.yaml"
    if not config.exists():
        raise DataError(f"{folder} is no run folder: it has no config.yaml; name a folder under <storage.root>/runs")
    evaluation = _json(folder / "evaluation.json")
    others = _comparable(folder, evaluation, against) if against is not None else _beside(evaluation)
    name = against.name if against is not None else evaluation.get("beside", {}).get("run", "") if others else ""
    examples: dict[str, np.ndarray] = {}
    if (folder / "examples.npz").exists():
        with np.load(folder / "examples.npz", allow_pickle=False) as arrays:
            examples = {name: arrays[name] for name in arrays.files}
    return RunData(
        folder=folder,
        config=config.read_text(),
        curves=read_metrics(folder),
        events=events.read(folder / "events"),
        scores=tuple(_scores(evaluation, others, name)),
        evaluated_on=f"{evaluation.get('samples', 0)} samples of the {evaluation['split']} split" if evaluation else "",
        examples=examples,
        blind=_blind(folder.resolve().parents[1] / "questions"),
        pictures=_list(folder / "pictures.json"),
        tables=_list(folder / "tables.json"),
        summary=_json(folder / "summary.json"),
        quarantined=_lines(folder / "quarantine.jsonl"),
        against=name,
    )


def _beside(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the run that this one is always compared with, as its evaluation holds them."""
    run = evaluation.get("beside", {}).get("run", "")
    rows = evaluation.get("metrics", {})
    return {name: {"value": row["also"][run]} for name, row in rows.items() if run in row.get("also", {})}


def _comparable(folder: Path, evaluation: dict[str, Any], against: Path) -> dict[str, Any]:
    """The metrics of the run ``against``; DataError when it was judged on something else."""
    other = _json(against / "evaluation.json")
    if not other:
        raise DataError(f"{against} was not evaluated: it has no evaluation.json; name another run to compare with")
    for name in ("split", "samples"):
        if other.get(name) != evaluation.get(name):
            raise DataError(
                f"{folder.name} was judged on {name}={evaluation.get(name)}, {against.name} on "
                f"{name}={other.get(name)}; only runs on the same data can be compared"
            )
    metrics: dict[str, Any] = other["metrics"]
    return metrics


def _blind(questions: Path) -> list[dict[str, Any]]:
    """What ``loom3d data questions`` last wrote beside the runs, with the name of the source."""
    return [
        {"source": path.parent.name, **row} for path in sorted(questions.glob("*/blind.jsonl")) for row in _lines(path)
    ]


def _scores(evaluation: dict[str, Any], others: dict[str, Any], beside: str) -> list[Score]:
    """``beside`` has a column of its own."""
    return [
        Score(
            name=name,
            value=float(row["value"]),
            baseline=None if row.get("baseline") is None else float(row["baseline"]),
            baseline_name=str(row.get("baseline_name", "")),
            better=str(row["better"]),
            also={run: value for run, value in row.get("also", {}).items() if run != beside},
            other=float(others[name]["value"]) if name in others else None,
        )
        for name, row in evaluation.get("metrics", {}).items()
    ]


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); delete it and run the evaluation again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, an object is expected; delete it and evaluate again")
    return value


def _list(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); delete it and run the evaluation again") from error
    if not isinstance(value, list):
        raise DataError(f"{path} holds a {type(value).__name__}, a list is expected; delete it and evaluate again")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
