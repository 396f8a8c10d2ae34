"""What the results of an experiment say of a claim: the figure of every seed, their spread, and whether it holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""Name of a run (part-seed) -> its result."""
Claim = dict[str, Any]
"""``phase``, ``claim``, ``figures`` (run -> figure), ``mean``, ``spread``, ``limit`` and ``holds``: for every seed."""


def markdown(made: Sequence[Claim]) -> str:
    """The claims as a Markdown table."""
    lines = ["| phase | claim | figure | limit | holds |", "| --- | --- | --- | --- | --- |"]
    for claim in made:
        spread = f" ± {claim['spread']:.3g}" if len(claim["figures"]) > 1 else ""
        lines.append(
            f"| {claim['phase']} | {claim['claim']} | {claim['mean']:.3g}{spread} | {claim['limit']} | "
            f"{'yes' if claim['holds'] else '**no**'} |"
        )
    return "\n".join(lines)


def make_claim(phase: str, text: str, op: str, limit: float, figures: Mapping[str, float | None]) -> Claim:
    """A figure of each run against a limit; runs without the figure are left out."""
    there = {name: value for name, value in figures.items() if value is not None}
    values = list(there.values())
    holds = {">": lambda v: v > limit, ">=": lambda v: v >= limit, "<": lambda v: v < limit, "<=": lambda v: v <= limit}
    return {
        "phase": phase,
        "claim": text,
        "figures": there,
        "mean": statistics.fmean(values) if values else 0.0,
        "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
        "limit": f"{op} {limit:g}",
        "holds": bool(values) and all(holds[op](value) for value in values),
    }


def of_part(results: Results, part: str) -> dict[str, Mapping[str, Any]]:
    """The runs of one part, by name: one a seed."""
    return {name: result for name, result in results.items() if name.rpartition("-")[0] == part}


def metric(result: Mapping[str, Any], name: str, beside: str = "") -> float | None:
    """A metric of a result, or what stands beside it under a name; None where that was not measured."""
    row = result["metrics"].get(name)
    if row is None:
        return None
    if not beside:
        return float(row["value"])
    found = row["baseline"] if row["baseline_name"] == beside else row.get("also", {}).get(beside)
    return None if found is None else float(found)


def values(runs: Results, name: str) -> dict[str, float | None]:
    """A metric of each run."""
    return {run: metric(result, name) for run, result in runs.items()}


def ratios(runs: Results, name: str, beside: str) -> dict[str, float | None]:
    """A metric over what stands beside it."""
    return {run: ratio(metric(result, name), metric(result, name, beside)) for run, result in runs.items()}


def differences(runs: Results, name: str, beside: str) -> dict[str, float | None]:
    """A metric less what stands beside it."""
    return {run: difference(metric(result, name), metric(result, name, beside)) for run, result in runs.items()}


def apart(runs: Results, others: Results, part: str, name: str) -> dict[str, float | None]:
    """A metric of the runs less that of the run of ``part`` of the same seed; only where there are both."""
    pairs = {run: f"{part}-{run.rpartition('-')[2]}" for run in runs}
    return {
        run: difference(metric(runs[run], name), metric(others[other], name))
        for run, other in pairs.items()
        if other in others
    }


def ratio(value: float | None, other: float | None) -> float | None:
    """None where one of them is missing, or would divide by zero."""
    return None if value is None or not other else value / other


def difference(value: float | None, other: float | None) -> float | None:
    """None where one of them is missing."""
    return None if value is None or other is None else value - other
