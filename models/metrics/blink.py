"""BLINK (Fu et al., ECCV 2024): accuracy of option letters, one task at a time, and the mean of the tasks."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw",
    "Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance",
    "Semantic_Correspondence", "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip


def read_letter(answer: str, options: int) -> str:
    """The option letter that an answer states, upper case, "" where there is none.

    The first rule that finds one of the ``options`` first letters decides: a first line of at most four characters
    that is one letter with brackets or punctuation; the last "answer X" or "answer is X"; the last "(X)", capitals
    only; a letter at the very start.
    """
    letters = string.ascii_uppercase[:options] or string.ascii_uppercase
    answer = answer.strip()
    line = answer.partition("\n")[0].strip()
    alone = re.fullmatch(rf"\(?([{letters}])\)?[.\s:,)]*", line, re.IGNORECASE) if len(line) <= 4 else None
    if alone:
        return alone[1].upper()
    stated = re.findall(rf"answers?(?:\s+is)?\s*[:-]?\s*\(?([{letters}])\)?(?![A-Za-z])", answer, re.IGNORECASE)
    bracketed = stated or re.findall(rf"\(([{letters}])\)", answer)
    if bracketed:
        return str(bracketed[-1]).upper()
    leading = re.match(rf"[(\s]*([{letters}])", answer, re.IGNORECASE)
    return leading[1].upper() if leading else ""


def score_answer(answer: str, truth: str, options: int) -> float:
    """1 if the letter of ``answer`` is that of ``truth`` ("B" or "(B)"), else 0."""
    return float(read_letter(answer, options) == truth.strip("()"))


def aggregate(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Scores by task -> accuracy by task, ``mean`` of the tasks that are there, ``accuracy`` over all answers.

    ``overall`` is ``mean`` where all 14 tasks are there.
    """
    result = {task: float(np.mean(values)) for task, values in scores.items() if values}
    if not result:
        return {}
    mean = float(np.mean(list(result.values())))
    complete = set(TASKS) <= set(result)
    everything = [value for values in scores.values() for value in values]
    return result | {"mean": mean, "accuracy": float(np.mean(everything))} | ({"overall": mean} if complete else {})
