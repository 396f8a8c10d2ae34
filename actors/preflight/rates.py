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


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of work, alone on their hardware. None: not measured; the estimate uses FLOPs and given TFLOP/s."""

    step_s: float | None = None
    """One optimiser step without waiting for data."""
    encode_s: float | None = None
    """One encoder input on one replica."""
    source: str = "given TFLOP/s"


def measured_rates(folder: Path) -> Rates:
    """Medians over the events of a run folder. DataError when it has no finished step to measure."""
    if not (folder / "events").is_dir():
        raise DataError(f"--rates {folder}: no run folder, it has no events/; give the folder of an earlier run")
    found = events.read(folder / "events")
    steps = [_seconds(event) for event in found if event["what"] == "step"][SKIPPED_STEPS:]
    if not steps:
        raise DataError(f"--rates {folder}: the run did not finish more than {SKIPPED_STEPS} steps")
    return Rates(step_s=statistics.median(steps), encode_s=_encode_seconds(found), source=str(folder))


def _encode_seconds(found: Sequence[Mapping[str, Any]]) -> float | None:
    """Median seconds of one input over the batches of the encoders, None when everything came from the cache."""
    batches = [_seconds(e) / e["inputs"] for e in found if e["what"] == "encode" and e.get("inputs")]
    return statistics.median(batches) if batches else None


def _seconds(event: Mapping[str, Any]) -> float:
    return float(event["t1"]) - float(event["t0"])
