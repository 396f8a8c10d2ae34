"""CV-Bench (Tong et al., "Cambrian-1", NeurIPS 2024): accuracy of option letters, averaged by where pictures are from.

A question's type is ``SOURCE/TASK``: ``ADE20K/Count``, ``COCO/Relation``, ``Omni3D/Depth``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

SOURCES = ("ADE20K", "COCO", "Omni3D")
TASKS = ("Count", "Relation", "Depth", "Distance")

_LEADING = re.compile(r"[(\s]*([A-Z])", re.IGNORECASE)


def read_letter(answer: str) -> str:
    """The first letter of the stripped answer after an optional bracket, upper case; "" where it begins otherwise."""
    found = _LEADING.match(answer.strip())
    return found[1].upper() if found else ""


def score_answer(answer: str, truth: str) -> float:
    """1 if the letter of ``answer`` is that of ``truth`` ("B" or "(B)"), else 0."""
    return float(read_letter(answer) == truth.strip("()"))


def aggregate(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Scores by type -> accuracy by source and by task, ``2D``, ``3D``, ``combined``, and ``accuracy`` of all answers.

    ``2D`` is the plain mean of ADE20K and COCO, ``3D`` is Omni3D, ``combined`` the plain mean of the two. Each is there
    only if nothing that it averages is missing. ValueError for a type that names no source and task of the benchmark.
    """
    by_source: dict[str, list[float]] = {}
    by_task: dict[str, list[float]] = {}
    for kind, values in scores.items():
        source, _, task = kind.partition("/")
        if source not in SOURCES or task not in TASKS:
            raise ValueError(
                f"unknown type {kind!r} of CV-Bench; it is SOURCE/TASK, of {', '.join(SOURCES)} and {', '.join(TASKS)}"
            )
        by_source.setdefault(source, []).extend(values)
        by_task.setdefault(task, []).extend(values)
    groups = [(name, by_source.get(name)) for name in SOURCES] + [(name, by_task.get(name)) for name in TASKS]
    result = {name: float(np.mean(values)) for name, values in groups if values}
    if "ADE20K" in result and "COCO" in result:
        result["2D"] = (result["ADE20K"] + result["COCO"]) / 2
    if "Omni3D" in result:
        result["3D"] = result["Omni3D"]
    if "2D" in result and "3D" in result:
        result["combined"] = (result["2D"] + result["3D"]) / 2
    everything = [value for values in scores.values() for value in values]
    return result | ({"accuracy": float(np.mean(everything))} if everything else {})
