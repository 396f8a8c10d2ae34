"""3DSRBench (Ma et al., ICCV 2025): a question counts only if all of its variants are answered right.

Variants of a question are told by its id: ``Q`` as asked, ``Q-1`` with the options rotated, ``Q-flip`` with the
picture mirrored, ``Q-flip-1`` with both. Scores, each over all questions and over the four groups:

- ``vanilla``: every variant for itself;
- ``flip``: a question and its mirror image, for each rotation;
- ``circular``: all rotations of a question, the mirrored one apart;
- ``circular_flip``: all variants together (the strictest, and the one papers compare by).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

GROUPS = {
    "height": ("height_higher",),
    "location": ("location_above", "location_closer_to_camera", "location_next_to"),
    "orientation": ("orientation_in_front_of", "orientation_on_the_left", "orientation_viewpoint"),
    "multi_object": (
        "multi_object_closer_to",
        "multi_object_facing",
        "multi_object_viewpoint_towards_object",
        "multi_object_parallel",
        "multi_object_same_direction",
    ),
}
CATEGORIES = {category: group for group, categories in GROUPS.items() for category in categories}

_RULES = (
    r"^([A-D])(?:[.\s)]|$)",
    r"[Aa]nswer[:\s]+([A-D])",
    r"[Tt]he answer is[:\s]+([A-D])",
    r"[Mm]y answer is[:\s]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\.",
    r"\b([A-D])\b",
)


class Variant(NamedTuple):
    """What an id says: which question, which rotation of its options, mirrored or not."""

    question: str
    rotation: str
    flipped: bool


def read_letter(answer: str) -> str:
    """The option letter that an answer gives, "" without one.

    The first rule that finds a capital A-D decides: at the start; after "answer", "the answer is", "my answer is";
    "(X)"; "X."; a word of its own. Of several places the first. It is the rule of a widely used evaluation harness;
    the benchmark's own script asks a language model where the answer is no plain letter.
    """
    answer = answer.strip()
    for rule in _RULES:
        found = re.search(rule, answer)
        if found:
            return found[1]
    return ""


def score_answer(answer: str, truth: str) -> float:
    """1 if the letter of ``answer`` is ``truth``, else 0."""
    return float(read_letter(answer) == truth.strip().upper())


def variant_of(question_id: str) -> Variant:
    """The parts of ``Q``, ``Q-1``, ``Q-flip`` and ``Q-flip-1``; dashes within Q are kept."""
    found = re.fullmatch(r"(.+?)(-flip)?(?:-(\d))?", question_id)
    assert found is not None
    return Variant(question=found[1], rotation=found[3] or "", flipped=bool(found[2]))


def aggregate(rows: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """(id, category, score) of single answers -> the scores above, ``<score>/<group>`` and ``vanilla/<category>``.

    A score is there only where its variants are: without mirrored questions there is no ``flip``. ValueError for an
    unknown category.
    """
    answers = [(variant_of(name), category, score) for name, category, score in rows]
    unknown = sorted({category for _, category, _ in answers} - set(CATEGORIES))
    if unknown:
        raise ValueError(f"unknown categories of 3DSRBench {unknown}; there are {', '.join(CATEGORIES)}")
    flipped = any(variant.flipped for variant, _, _ in answers)
    rotated = any(variant.rotation for variant, _, _ in answers)
    keys = {"vanilla": lambda v: v}
    if flipped:
        keys["flip"] = lambda v: (v.question, v.rotation)
    if rotated:
        keys["circular"] = lambda v: (v.question, v.flipped)
    if flipped and rotated:
        keys["circular_flip"] = lambda v: v.question
    result: dict[str, float] = {}
    for mode, key in keys.items():
        together: dict[object, list[float]] = defaultdict(list)
        category_of = {}
        for variant, category, score in answers:
            together[key(variant)].append(score)
            category_of[key(variant)] = category
        hits: dict[str, list[float]] = defaultdict(list)
        for name, scores in together.items():
            hit = min(scores)
            hits[mode].append(hit)
            hits[f"{mode}/{CATEGORIES[category_of[name]]}"].append(hit)
            if mode == "vanilla":
                hits[f"{mode}/{category_of[name]}"].append(hit)
        result |= {name: float(np.mean(values)) for name, values in hits.items()}
    return result
