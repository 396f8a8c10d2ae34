"""ViewSpatial-Bench (Li et al., 2025): accuracy of option letters by five types, and over all questions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

TYPES = (
    "Camera perspective - Relative Direction",
    "Camera perspective - Object View Orientation",
    "Person perspective - Relative Direction",
    "Person perspective - Object View Orientation",
    "Person perspective - Scene Simulation Relative Direction",
)

_ALONE = re.compile(r"\b([A-D])\b", re.IGNORECASE)


def read_letter(answer: str) -> str:
    """The first stand-alone A-D of the last line, upper case; "" without one.

    The last line is what follows the last line break, be it empty, and the article "a" counts: as published.
    """
    found = _ALONE.search(answer.split("\n")[-1])
    return found[1].upper() if found else ""


def score_answer(answer: str, truth: str) -> float:
    """1 if the letter of ``answer`` is that of ``truth`` ("B" or "B. front-right"), else 0.

    ValueError where ``truth`` states no letter: an answer without one would be held to be right.
    """
    letter = read_letter(truth)
    if not letter:
        raise ValueError(f"the true answer {truth!r} states no letter A-D")
    return float(read_letter(answer) == letter)


def aggregate(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Scores by type -> accuracy by type, and ``accuracy`` over all questions. ValueError for an unknown type.

    ``overall`` is ``accuracy`` where all five types are there.
    """
    unknown = sorted(set(scores) - set(TYPES))
    if unknown:
        raise ValueError(f"unknown types of ViewSpatial-Bench {unknown}; there are {', '.join(TYPES)}")
    result = {kind: float(np.mean(scores[kind])) for kind in TYPES if scores.get(kind)}
    if not result:
        return {}
    accuracy = float(np.mean([value for values in scores.values() for value in values]))
    return result | {"accuracy": accuracy} | ({"overall": accuracy} if len(result) == len(TYPES) else {})
