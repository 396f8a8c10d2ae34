"""SEED-Bench (Li et al., CVPR 2024): the first character of the answer is the option letter, or it is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

IMAGE_DIMENSIONS = (
    "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instances Counting",
    "Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Understanding",
)  # fmt: skip
VIDEO_DIMENSIONS = ("Action Recognition", "Action Prediction", "Procedure Understanding")


def score_answer(answer: str, truth: str) -> float:
    """1 if the first character of the stripped answer is the letter, ignoring case, else 0."""
    return float(answer.strip()[:1].lower() == truth.strip().lower())


def aggregate(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Scores by dimension -> accuracy by dimension, and over all questions of ``image``, ``video`` and ``all``.

    ValueError for a dimension that the benchmark does not have.
    """
    unknown = sorted(set(scores) - {*IMAGE_DIMENSIONS, *VIDEO_DIMENSIONS})
    if unknown:
        raise ValueError(f"unknown dimensions {unknown}; there are {', '.join(IMAGE_DIMENSIONS + VIDEO_DIMENSIONS)}")
    result = {name: float(np.mean(values)) for name, values in scores.items() if values}
    for half, names in (
        ("image", IMAGE_DIMENSIONS),
        ("video", VIDEO_DIMENSIONS),
        ("all", IMAGE_DIMENSIONS + VIDEO_DIMENSIONS),
    ):
        values = [value for name in names for value in scores.get(name, ())]
        if values:
            result[half] = float(np.mean(values))
    return result
