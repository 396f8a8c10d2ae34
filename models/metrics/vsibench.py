"""VSI-Bench's scores: exact letters for choices, mean relative accuracy (MRA) for numbers.

Source: Yang et al., "Thinking in Space" (CVPR 2025) and its published evaluation. Two readers of numbers are in
use and give different scores on the same answers, so a score is reported with the name of its reader:
``strict`` is the benchmark's own, ``words`` the later one of a widely used evaluation harness.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

CHOICE_TYPES = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
NUMERIC_TYPES = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
QUESTION_TYPES = CHOICE_TYPES + NUMERIC_TYPES
READERS = ("strict", "words")

THRESHOLDS = np.linspace(0.5, 0.95, 10)
_DIRECTION = "object_rel_direction"
_CHOICE_TASKS = (_DIRECTION, "object_rel_distance", "route_planning", "obj_appearance_order")
TASKS = _CHOICE_TASKS + NUMERIC_TYPES
"""The eight tasks that ``overall`` averages."""

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_UNITS = {word: value for value, word in enumerate(_BELOW_TWENTY.split())}
_DECADES = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 10 * decade for decade, word in enumerate(_DECADES.split(), start=2)}
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000}
_WORD = "|".join(sorted([*_UNITS, *_TENS, *_SCALES], key=len, reverse=True))
_NUMBER = re.compile(rf"-?\d+(?:\.\d+)?|\b(?:{_WORD})\b(?:(?:\s+and\s+|[\s-]+)(?:{_WORD})\b)*")


def first_token(answer: str) -> str:
    """What the benchmark looks at: the text before the first space, trailing full stops dropped, stripped."""
    return answer.split(" ")[0].rstrip(".").strip()


def read_number(answer: str, reader: str = "strict") -> float | None:
    """The number that an answer states, or None where ``reader`` finds none.

    ``strict`` takes ``float()`` of the first token. ``words`` takes, in lower case, the first string of digits or
    run of English number words: "1,200" reads 1 and ".8" reads 8. ValueError for an unknown reader.
    """
    if reader == "strict":
        try:
            return float(first_token(answer))
        except ValueError:
            return None
    if reader == "words":
        found = _NUMBER.search(answer.lower())
        if found is None:
            return None
        text = found.group()
        return float(text) if text[-1].isdigit() else float(_words_to_number(text))
    raise ValueError(f"unknown reader of numbers {reader!r}; there are {', '.join(READERS)}")


def _words_to_number(text: str) -> int:
    """Value of "two hundred and five": every scale multiplies what stands before it since the last larger scale."""
    total = group = 0
    for word in re.findall(_WORD, text):
        if word in _SCALES:
            scale = _SCALES[word]
            group = max(group, 1) * scale
            if scale > 100:
                total, group = total + group, 0
        else:
            group += _UNITS.get(word, 0) + _TENS.get(word, 0)
    return total + group


def mean_relative_accuracy(prediction: float | None, truth: float) -> float:
    """Share of the ten thresholds 0.50, 0.55 ... 0.95 at which |prediction - truth| / truth <= 1 - threshold.

    None and NaN score 0. ValueError where ``truth`` is not positive: the relative error has no meaning there.
    """
    if not truth > 0:
        raise ValueError(f"mean relative accuracy needs a positive true value, got {truth}")
    if prediction is None:
        return 0.0
    return float((abs(prediction - truth) / truth <= 1 - THRESHOLDS).mean())


def score_choice(answer: str, letter: str) -> float:
    """1 if the first token of ``answer`` is ``letter``, ignoring case, else 0."""
    return float(first_token(answer).lower() == letter.lower())


def score_answer(question_type: str, answer: str, truth: str, *, reader: str = "strict") -> float:
    """Score in [0, 1] of one answer to a question of a published type. ValueError for an unknown type."""
    if question_type in CHOICE_TYPES:
        return score_choice(answer, truth)
    if question_type in NUMERIC_TYPES:
        return mean_relative_accuracy(read_number(answer, reader), float(truth))
    raise ValueError(f"unknown question type {question_type!r}; there are {', '.join(QUESTION_TYPES)}")


def aggregate(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Scores of single answers by published type -> mean by task, ``numerical``, ``multiple_choice`` and ``overall``.

    The three difficulties of relative direction become one task by their plain mean, and ``overall`` is the plain
    mean of the resulting eight tasks, not of all questions; ``numerical`` and ``multiple_choice`` are those of four
    tasks each. A task without answers is left out; a mean is there only if nothing that it averages is missing.
    """
    unknown = sorted(set(scores) - set(QUESTION_TYPES))
    if unknown:
        raise ValueError(f"unknown question types {unknown}; there are {', '.join(QUESTION_TYPES)}")
    means = {name: float(np.mean(scores[name])) for name in QUESTION_TYPES if scores.get(name)}
    directions = [means[name] for name in CHOICE_TYPES if name.startswith(_DIRECTION) and name in means]
    tasks = {name: value for name, value in means.items() if not name.startswith(_DIRECTION)}
    if len(directions) == 3:
        tasks[_DIRECTION] = float(np.mean(directions))
    result = means | tasks
    for name, parts in (("numerical", NUMERIC_TYPES), ("multiple_choice", _CHOICE_TASKS), ("overall", TASKS)):
        if all(part in tasks for part in parts):
            result[name] = float(np.mean([tasks[part] for part in parts]))
    return result
