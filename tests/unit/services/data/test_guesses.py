"""Guessing from the training split, without pictures."""

from __future__ import annotations

import pytest

from models.metrics.vsibench import mean_relative_accuracy
from services.contracts import Question
from services.data.questions.guesses import blind_baseline, strategies_from


def choice(
    number: int, answer: str, options: tuple[str, ...] = ("A. left", "B. right"), text: str = "Where?"
) -> Question:
    kind = "object_rel_direction_easy"
    return Question(id=f"q{number}", type=kind, text=text, answer=answer, options=options)


def number(place: int, answer: str, text: str = "How many?") -> Question:
    return Question(id=f"n{place}", type="object_counting", text=text, answer=answer)


SWAPPED = ("A. right", "B. left")


def test_the_best_strategy_of_each_type_is_the_bar() -> None:
    # In training "left" is right three times of four, while the letters are two and two.
    training = [choice(1, "A"), choice(2, "A"), choice(3, "B", SWAPPED), choice(4, "B")]
    training += [number(1, "2"), number(2, "4"), number(3, "40")]
    judged = [choice(5, "B", SWAPPED), choice(6, "A"), choice(7, "B"), number(4, "4")]
    baseline = blind_baseline(training, judged, "vsibench")
    kind = "object_rel_direction_easy"
    assert baseline.scores[kind] == {
        "letter": pytest.approx(1 / 3),  # A, the first of two equally frequent letters
        "option": pytest.approx(2 / 3),  # left: right for the first two
        "option given the question": pytest.approx(2 / 3),
    }
    assert baseline.best[kind] == "option"
    assert baseline.scores["object_counting"]["median"] == 1.0
    assert baseline.numbers == {kind: pytest.approx(2 / 3), "object_counting": 1.0}
    assert baseline.untrained == ()


def test_numbers() -> None:
    training = [
        number(1, "2", "chairs?"),
        number(2, "3", "chairs?"),
        number(3, "10", "cups?"),
        number(4, "10", "cups?"),
    ]
    strategies = strategies_from(training, choice=False)
    assert strategies["median"](number(9, "?", "lamps?")) == "6.5"
    assert strategies["median given the question"](number(9, "?", "chairs?")) == "2.5"
    assert strategies["median given the question"](number(9, "?", "lamps?")) == "6.5"
    # About 10 is right for two of four and nothing for the others: better than any number between.
    assert mean_relative_accuracy(float(strategies["constant"](number(9, "?"))), 10) == 1


def test_words() -> None:
    def named(place: int, answer: str, text: str) -> Question:
        return Question(id=str(place), type="colour", text=text, answer=answer)

    training = [
        named(1, "red", "chair?"),
        named(2, "blue", "cup?"),
        named(3, "blue", "cup?"),
        named(4, "red", "chair?"),
    ]
    strategies = strategies_from(training, choice=False)
    assert strategies["mode"](training[0]) == "blue"  # as frequent as red
    assert strategies["mode given the question"](training[0]) == "red"
    baseline = blind_baseline(training, [named(5, "Red", "chair?"), named(6, "blue", "cup?")])
    assert baseline.best == {"colour": "mode given the question"}
    assert baseline.numbers["accuracy"] == 1.0


def test_a_type_that_training_does_not_have() -> None:
    baseline = blind_baseline([], [choice(1, "A"), choice(2, "B"), number(1, "3")], "vsibench")
    assert baseline.untrained == ("object_rel_direction_easy", "object_counting")
    assert baseline.best == {"object_rel_direction_easy": "first option", "object_counting": "nothing"}
    assert baseline.numbers == {"object_rel_direction_easy": 0.5, "object_counting": 0.0}
    assert blind_baseline([], []).numbers == {}


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(ValueError, match="unknown benchmark 'mmlu'"):
        blind_baseline([], [], "mmlu")
