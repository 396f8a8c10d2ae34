"""Rates for the time estimate: given ones (``cluster.nodes.*.tflops``), or those that an earlier run measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.errors import DataError
from services.telemetry import events

SKIPPED_STEPS = 2
"""First steps of a run, in which memory is allocated and kernels are chosen."""


COMPUTING = ("forward", "backward", "step")
"""Spans of the training loop that make up a step; "step" is the optimiser's update alone."""

GIVEN = "given TFLOP/s and GB/s"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of work, alone on their hardware. None: not measured; the estimate uses given rates."""

    step_s: float | None = None
    """One optimiser step without waiting for data."""
    encode_s: float | None = None
    """One encoder input on one replica."""
    source: str = GIVEN


def measured_rates(folder: Path) -> Rates:
    """Medians over the events of a run folder. DataError when it has no finished step to measure."""
    if not (folder / "events").is_dir():
        raise DataError(f"--rates {folder}: no run folder, it has no events/; give the folder of an earlier run")
    found = events.read(folder / "events")
    steps = _step_seconds(found)[SKIPPED_STEPS:]
    if not steps:
        raise DataError(f"--rates {folder}: the run did not finish more than {SKIPPED_STEPS} steps")
    return Rates(step_s=statistics.median(steps), encode_s=_encode_seconds(found), source=str(folder))


def _step_seconds(found: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of computing of every optimiser step of every rank: its micro-batches and the update."""
    seconds: dict[tuple[str, int], float] = {}
    for event in found:
        if event["what"] in COMPUTING:
            key = (event["who"], event["step"])
            seconds[key] = seconds.get(key, 0.0) + _seconds(event)
    return list(seconds.values())


def _encode_seconds(found: Sequence[Mapping[str, Any]]) -> float | None:
    """Median seconds of one input over the batches of the encoders, None when everything came from the cache."""
    batches = [_seconds(e) / e["inputs"] for e in found if e["what"] == "encode" and e.get("inputs")]
    return statistics.median(batches) if batches else None


def _seconds(event: Mapping[str, Any]) -> float:
    return float(event["t1"]) - float(event["t0"])
