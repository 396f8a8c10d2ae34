"""Answers of somebody who has read the training split and sees no picture: the bar for what a model has learnt.

Several strategies learn from the questions of the training split and answer those of another one. For each type the
one that scores best **on the questions that are judged** is taken: nobody could know it beforehand, so the bar is
never too low. (:mod:`services.data.questions.blind` asks the same of one set of questions alone, to balance it.)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from models.metrics.benchmarks import scorer
from services.contracts import Question
from services.data.questions.blind import best_constant, split_option

Strategy = Callable[[Question], str]
"""Answers a question of the type that it has learnt from."""


@dataclass(frozen=True, kw_only=True)
class BlindBaseline:
    """What guessing scores on the judged questions."""

    numbers: dict[str, float]
    """The benchmark's scores when every type is answered by its best strategy."""
    best: dict[str, str]
    """Type -> name of its best strategy."""
    scores: dict[str, dict[str, float]] = field(repr=False)
    """Type -> strategy -> mean score of its answers."""
    untrained: tuple[str, ...] = ()
    """Judged types that the training split does not have: they are answered with the first option, or nothing."""


def blind_baseline(training: Sequence[Question], judged: Sequence[Question], benchmark: str = "plain") -> BlindBaseline:
    """The best image-blind baseline of each type.

    Args:
        training: questions of the training split, with their answers.
        judged: questions of the split that a model is judged on.
        benchmark: whose scores are computed; see :func:`models.metrics.benchmarks.scorer`.

    ValueError for an unknown benchmark, or a type that it does not have.
    """
    learnt: dict[str, list[Question]] = defaultdict(list)
    asked: dict[str, list[Question]] = defaultdict(list)
    for question in training:
        learnt[question.type].append(question)
    for question in judged:
        asked[question.type].append(question)
    total = scorer(benchmark)
    best: dict[str, str] = {}
    scores: dict[str, dict[str, float]] = {}
    for kind, questions in asked.items():
        strategies = strategies_from(learnt.get(kind, []), choice=bool(questions[0].options))
        judge = scorer(benchmark)
        answers = {name: [strategy(question) for question in questions] for name, strategy in strategies.items()}
        scores[kind] = {
            name: float(np.mean([_score(judge.add, q, a) for q, a in zip(questions, given, strict=True)]))
            for name, given in answers.items()
        }
        best[kind] = max(scores[kind], key=lambda name: scores[kind][name])
        for question, answer in zip(questions, answers[best[kind]], strict=True):
            _score(total.add, question, answer)
    untrained = tuple(kind for kind in asked if kind not in learnt)
    return BlindBaseline(numbers=total.compute(), best=best, scores=scores, untrained=untrained)


def strategies_from(questions: Sequence[Question], *, choice: bool) -> Mapping[str, Strategy]:
    """Strategies that have learnt from questions of one type; with none, the first option or an empty answer.

    Choices: ``letter`` (the most frequent one), ``option`` (the text that was right most often when it was offered),
    ``option given the question``. Numbers: ``median``, ``constant`` (the best by mean relative accuracy), ``median
    given the question``. Other answers: ``mode``, ``mode given the question``. What is given the question and meets
    one that training did not ask falls back on the type.
    """
    if not questions:
        return {"first option" if choice else "nothing": lambda q: split_option(q.options[0])[0] if q.options else ""}
    if choice:
        letter = _mode(question.answer for question in questions)
        return {
            "letter": lambda _: letter,
            "option": _by_success(questions, lambda _, option: (option,)),
            "option given the question": _by_success(questions, lambda q, option: (q.text, option)),
        }
    numbers = [_number(question.answer) for question in questions]
    if all(number is not None for number in numbers):
        known = [number for number in numbers if number is not None]
        constant = best_constant(np.array([x for x in known if x > 0]))[0] if any(x > 0 for x in known) else 0.0
        return {
            "median": lambda _: f"{median(known):g}",
            "constant": lambda _: repr(constant),
            "median given the question": _given(questions, lambda group: f"{median(map(float, group)):g}"),
        }
    common = _mode(question.answer for question in questions)
    return {"mode": lambda _: common, "mode given the question": _given(questions, _mode)}


def _score(add: Callable[..., float], question: Question, answer: str) -> float:
    return add(id=question.id, type=question.type, answer=question.answer, options=question.options, prediction=answer)


def _mode(answers: Iterable[str]) -> str:
    """The most frequent answer, of equally frequent ones the first by the alphabet."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _number(answer: str) -> float | None:
    try:
        return float(answer)
    except ValueError:
        return None


def _given(questions: Sequence[Question], summary: Callable[[Sequence[str]], str]) -> Strategy:
    """The summary of the answers to the same words, or of all answers."""
    answers: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        answers[question.text].append(question.answer)
    of_words = {text: summary(group) for text, group in answers.items()}
    of_all = summary([question.answer for question in questions])
    return lambda question: of_words.get(question.text, of_all)


def _by_success(questions: Sequence[Question], clue: Callable[[Question, str], tuple[str, ...]]) -> Strategy:
    """The option whose clue was right most often when offered, smoothed towards chance; of equal ones the first."""
    seen: Counter[tuple[str, ...]] = Counter()
    right: Counter[tuple[str, ...]] = Counter()
    for question in questions:
        for option in question.options:
            letter, text = split_option(option)
            seen[clue(question, text)] += 1
            right[clue(question, text)] += letter == question.answer

    def answer(question: Question) -> str:
        if not question.options:
            return ""
        prior = 1 / len(question.options)
        rates = {}
        for option in question.options:
            letter, text = split_option(option)
            key = clue(question, text)
            rates[letter] = (right[key] + prior) / (seen[key] + 1)
        return max(rates, key=lambda letter: rates[letter])

    return answer
