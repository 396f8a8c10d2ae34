"""How well one can answer without seeing anything: the bar that a trained model has to pass.

Each strategy below knows the answers of all *other* scenes (leave one scene out), or of the very set for the single
best letter or number, and never an image. The best strategy of each type is reported beside chance.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.metrics.vsibench import CHOICE_TYPES, QUESTION_TYPES, mean_relative_accuracy
from services.contracts import Question


@dataclass(frozen=True, kw_only=True)
class BlindScore:
    """Scores in [0, 1] of one question type. ``best`` is the largest of the strategies' scores."""

    questions: int
    chance: float
    """Mean of 1 / number of options; 0 for numbers."""
    strategies: dict[str, float]

    @property
    def best(self) -> float:
        """Score of the best strategy."""
        return max(self.strategies.values())


def blind_scores(questions: Sequence[Question]) -> dict[str, BlindScore]:
    """Best score without images by published type, over the questions of one split."""
    by_type: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_type[question.type].append(question)
    scores = {}
    for kind in QUESTION_TYPES:
        group = by_type.get(kind, [])
        if not group:
            continue
        if kind in CHOICE_TYPES:
            strategies = {name: _choice_score(group, clues) for name, clues in _CLUES.items()}
            letters = Counter(question.answer for question in group)
            strategies["letter"] = max(letters.values()) / len(group)
            chance = float(np.mean([1 / len(question.options) for question in group]))
        else:
            strategies, chance = _number_scores(group), 0.0
        scores[kind] = BlindScore(questions=len(group), chance=chance, strategies=strategies)
    return scores


def scene_of(question: Question) -> str:
    """Scene of a question made here, whose id is ``scene/type/number``."""
    return question.id.rsplit("/", 2)[0]


def right_option(question: Question) -> str:
    """Text of the right option, without its letter."""
    return dict(split_option(option) for option in question.options)[question.answer]


def split_option(option: str) -> tuple[str, str]:
    """Letter and text of an option as it is written: "B. left" gives ("B", "left")."""
    letter, _, text = option.partition(". ")
    return letter, text


#: What a guess may look at: (question, option text) -> the key whose past success decides.
_CLUES: dict[str, Callable[[Question, str], tuple[str, ...]]] = {
    "option": lambda _, option: (option,),
    "option given the question": lambda question, option: (question.text, option),
    "first word of the option": lambda _, option: (option.split(", ")[0],),
}


def _choice_score(questions: Sequence[Question], clue: Callable[[Question, str], tuple[str, ...]]) -> float:
    """Accuracy of choosing the option whose clue was right most often in other scenes (smoothed towards chance)."""
    seen: Counter[tuple[str, ...]] = Counter()
    right: Counter[tuple[str, ...]] = Counter()
    here: dict[str, list[tuple[tuple[str, ...], bool]]] = defaultdict(list)
    for question in questions:
        for option in question.options:
            letter, text = split_option(option)
            key = clue(question, text)
            seen[key] += 1
            right[key] += letter == question.answer
            here[scene_of(question)].append((key, letter == question.answer))
    total = 0.0
    for scene, group in _by_scene(questions).items():
        own_seen = Counter(key for key, _ in here[scene])
        own_right = Counter(key for key, hit in here[scene] if hit)
        for question in group:
            prior = 1 / len(question.options)
            rates = {}
            for option in question.options:
                letter, text = split_option(option)
                key = clue(question, text)
                rates[letter] = (right[key] - own_right[key] + prior) / (seen[key] - own_seen[key] + 1)
            best = max(rates.values())
            tied = [letter for letter, rate in rates.items() if rate >= best - 1e-12]
            total += (question.answer in tied) / len(tied)
    return total / len(questions)


def _number_scores(questions: Sequence[Question]) -> dict[str, float]:
    """MRA of the best constant of the set, and of the best constant for the same words in other scenes."""
    answers = np.array([float(question.answer) for question in questions])
    constant, score = best_constant(answers)
    words: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        words[question.text].append(question)
    total = 0.0
    for group in words.values():
        for scene, own in _by_scene(group).items():
            others = np.array([float(q.answer) for q in group if scene_of(q) != scene])
            guess = best_constant(others)[0] if len(others) else constant
            total += sum(mean_relative_accuracy(guess, float(q.answer)) for q in own)
    return {"constant": score, "constant given the question": total / len(questions)}


def best_constant(answers: np.ndarray) -> tuple[float, float]:
    """The number that scores best when given to all questions, and its mean relative accuracy.

    MRA is a sum of indicator functions of intervals [g(1-t), g(1+t)] with t = 0.05 ... 0.5, so a maximum lies at
    an end of one of these intervals: all ends are tried.
    """
    tolerances = np.linspace(0.05, 0.5, 10)
    ordered = np.sort(answers)
    candidates = np.unique(ordered[:, None] * np.concatenate([1 - tolerances, 1 + tolerances, [1.0]]))
    hits = np.zeros(len(candidates))
    for t in tolerances:
        # A guess c is within t of every answer in [c/(1+t), c/(1-t)]; the ends themselves count.
        first = np.searchsorted(ordered, candidates / (1 + t) * (1 - 1e-9), side="left")
        last = np.searchsorted(ordered, candidates / (1 - t) * (1 + 1e-9), side="right")
        hits += last - first
    best = int(hits.argmax())
    return float(candidates[best]), float(hits[best] / (len(tolerances) * len(ordered)))


def _by_scene(questions: Sequence[Question]) -> dict[str, list[Question]]:
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[scene_of(question)].append(question)
    return groups
