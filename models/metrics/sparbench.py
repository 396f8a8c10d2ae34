"""SPAR-Bench (Zhang et al., NeurIPS 2025): 20 tasks of three levels; numbers by MRA, choices, changes of view.

Two points where published code goes wrong are not followed: an empty answer scores 0 (the code finds it "contained"
in every truth), and a later harness whose numeric tasks all score 0 is no reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from models.metrics.vsibench import THRESHOLDS

LOW = (
    "depth_prediction_oc", "depth_prediction_oo", "distance_prediction_oc", "distance_prediction_oo",
    "depth_prediction_oc_mv", "depth_prediction_oo_mv", "distance_prediction_oo_mv", "distance_prediction_oc_mv",
)  # fmt: skip
MIDDLE = ("view_change_infer", "position_matching", "camera_motion_infer")
HIGH = (
    "obj_spatial_relation_oo", "obj_spatial_relation_oc_mv", "obj_spatial_relation_oo_mv", "spatial_imagination_oc",
    "spatial_imagination_oo", "spatial_imagination_oc_mv", "spatial_imagination_oo_mv", "distance_infer_center_oo",
    "distance_infer_center_oo_mv",
)  # fmt: skip
TASKS = LOW + MIDDLE + HIGH
VIEW_CHANGE = "view_change_infer"

_AXES = (
    ("move_right", "move_left"),
    ("move_up", "move_down"),
    ("move_forward", "move_backward"),
    ("rotate_right", "rotate_left"),
    ("rotate_up", "rotate_down"),
)
_NUMBER = re.compile(r"(?<!\^)\d+\.\d+|(?<!\^)\d+")


def relative_accuracy(value: float, reference: float) -> float:
    """Share of the ten thresholds at which |value - reference| / |reference| <= 1 - threshold; by 1 where it is 0."""
    return float((abs((value - reference) / (reference or 1.0)) <= 1 - THRESHOLDS).mean())


def read_number(answer: str, task: str) -> float | None:
    """The last number of an answer for tasks over several views, else the first; None without one. Never negative."""
    numbers = _NUMBER.findall(answer)
    if not numbers:
        return None
    return float(numbers[-1] if task.endswith("_mv") else numbers[0])


def score_choice(answer: str, truth: str) -> float:
    """1 if the answer, in lower case, equals the truth, is contained in it, or begins with the letter that it is."""
    answer, truth = answer.lower(), truth.lower()
    return float(bool(answer) and (answer in truth or answer[0] == truth))


def read_actions(answer: str) -> tuple[float, ...]:
    """Signed movement along five axes from "name:value,name:value": right, up, forward, turn right, turn up.

    An action that is not named is 0; an unknown name does not count. ValueError where a part is no such pair.
    """
    actions: dict[str, float] = {}
    for part in answer.split(","):
        name, _, value = part.partition(":")
        actions[name] = float(value)
    return tuple(actions.get(plus, 0.0) - actions.get(minus, 0.0) for plus, minus in _AXES)


def score_view_change(answer: str, truth: str) -> float:
    """Mean over the five axes of the relative accuracy, with the prediction as reference; 0 if it cannot be read."""
    true = read_actions(truth)
    try:
        predicted = read_actions(answer)
    except ValueError:
        return 0.0
    return float(np.mean([relative_accuracy(t, p) for t, p in zip(true, predicted, strict=True)]))


def score_answer(task: str, answer: str, truth: str) -> float:
    """Score in [0, 1] of one answer. ValueError for an unknown task, or a truth that is not of its form."""
    if task not in TASKS:
        raise ValueError(f"unknown task of SPAR-Bench {task!r}; there are {', '.join(TASKS)}")
    if task == VIEW_CHANGE:
        return score_view_change(answer, truth)
    if task not in LOW:
        return score_choice(answer, truth)
    number = read_number(answer, task)
    return 0.0 if number is None else relative_accuracy(number, float(truth))


def aggregate(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Scores by task -> mean by task; ``low``, ``middle``, ``high`` and ``overall`` as means of their tasks.

    A level, or ``overall``, is there only if none of its tasks is missing. ValueError for an unknown task.
    """
    unknown = sorted(set(scores) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown tasks of SPAR-Bench {unknown}; there are {', '.join(TASKS)}")
    means = {task: float(np.mean(scores[task])) for task in TASKS if scores.get(task)}
    result = dict(means)
    for level, tasks in (("low", LOW), ("middle", MIDDLE), ("high", HIGH), ("overall", TASKS)):
        if all(task in means for task in tasks):
            result[level] = float(np.mean([means[task] for task in tasks]))
    return result
