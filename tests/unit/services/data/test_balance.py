"""Balancing of answers, dealing of letters, and the scores that guessing reaches."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.metrics.vsibench import mean_relative_accuracy
from services.contracts import Question, Split
from services.data.questions import blind_scores
from services.data.questions.balance import balance, value_bin
from services.data.questions.blind import best_constant, right_option
from services.data.questions.draft import Draft

SIDES = ("left", "right", "back")


def choice(
    scene: int, answer: str, wrong: tuple[str, ...], kind: str = "object_rel_direction_medium", text: str = ""
) -> Draft:
    return Draft(
        scene=f"s/{scene}", split=Split.TRAIN, type=kind, text=text or f"Where? {scene}", answer=answer, wrong=wrong
    )


def number(scene: int, answer: str, text: str, kind: str = "object_counting") -> Draft:
    return Draft(scene=f"s/{scene}", split=Split.TRAIN, type=kind, text=text, answer=answer)


def test_answers_and_letters_become_uniform() -> None:
    drafts = [
        choice(i, side, tuple(s for s in SIDES if s != side))
        for i, side in enumerate(["left"] * 60 + ["right"] * 30 + ["back"] * 12)
    ]
    questions = balance(drafts, 0)
    assert Counter(right_option(q) for q in questions) == {"left": 18, "right": 18, "back": 12}
    letters = Counter(q.answer for q in questions)
    assert letters == {"A": 16, "B": 16, "C": 16}
    pairs = Counter((q.answer, right_option(q)) for q in questions)
    assert set(pairs.values()) == {6, 4}
    score = blind_scores(questions)["object_rel_direction_medium"]
    assert score.strategies["letter"] == pytest.approx(1 / 3)
    assert score.chance == pytest.approx(1 / 3)
    assert score.best <= 0.45


def test_unbalanced_answers_would_be_found() -> None:
    """The measure itself works: a set that always answers "left" is guessed wholly."""
    questions = [
        Question(id=f"s{i}/x/0", type="object_rel_direction_easy", text=f"{i}?", answer="AB"[i % 2],
                 options=("A. left", "B. right") if i % 2 == 0 else ("A. right", "B. left"))
        for i in range(20)
    ]  # fmt: skip
    score = blind_scores(questions)["object_rel_direction_easy"]
    assert score.strategies["letter"] == 0.5
    assert score.strategies["option"] == 1.0
    assert score.best == 1.0


def test_a_prior_of_the_question_is_found_only_in_other_scenes() -> None:
    """ "The nightstand is nearest to the bed" helps if other scenes say so, not if only the same scene does."""
    options = ("A. nightstand", "B. door", "C. lamp", "D. rug")

    def ask(scene: str, answer: str) -> Question:
        return Question(
            id=f"{scene}/t/0", type="object_rel_distance", text="Nearest to the bed?", answer=answer, options=options
        )

    alike = blind_scores([ask(f"s{i}", "A") for i in range(6)])["object_rel_distance"]
    assert alike.strategies["option given the question"] == 1.0
    alone = blind_scores([ask("s0", "A")])["object_rel_distance"]
    assert alone.strategies["option given the question"] == 0.25


def test_an_object_that_is_always_the_nearest_is_limited() -> None:
    rng = np.random.default_rng(0)
    labels = ["lamp", "door", "rug", "sofa", "plant", "desk"]
    drafts = []
    for i in range(200):
        others = [labels[j] for j in rng.permutation(6)[:4]]
        answer = "lamp" if "lamp" in others and rng.random() < 0.9 else others[0]
        wrong = tuple(label for label in others if label != answer)
        drafts.append(choice(i, answer, wrong, "object_rel_distance", f"Nearest to the bed {i}?"))
    before = Counter(d.answer for d in drafts)["lamp"] / sum("lamp" in (d.answer, *d.wrong) for d in drafts)
    questions = balance(drafts, 0)
    shown = sum(any("lamp" in option for option in q.options) for q in questions)
    after = sum(right_option(q) == "lamp" for q in questions) / shown
    assert before > 0.8
    assert after <= 0.41
    assert len(questions) > 60
    assert blind_scores(questions)["object_rel_distance"].best <= 0.42


def test_numbers_do_not_repeat_with_the_same_words() -> None:
    drafts = [number(i, "2", "How many chairs?") for i in range(30)] + [
        number(i, "4", "How many chairs?") for i in range(3)
    ]
    drafts += [number(i, "3", "How many beds?") for i in range(4)]
    questions = balance(drafts, 0)
    chairs = Counter(q.answer for q in questions if "chairs" in q.text)
    assert chairs["2"] <= 4
    assert chairs["4"] >= 3
    assert blind_scores(questions)["object_counting"].best < 0.95


@settings(max_examples=40, deadline=None)
@given(
    answers=st.lists(st.sampled_from(SIDES), min_size=0, max_size=60),
    seed=st.integers(0, 5),
)
def test_balance_holds_for_any_answers(answers: list[str], seed: int) -> None:
    drafts = [choice(i % 7, a, tuple(s for s in SIDES if s != a), text=f"{i}?") for i, a in enumerate(answers)]
    questions = balance(drafts, seed)
    right = Counter(right_option(q) for q in questions)
    letters = Counter(q.answer for q in questions)
    assert bool(questions) == bool(answers)
    if questions:
        assert max(right.values()) <= max(1, 1.5 * min(Counter(answers)[side] for side in SIDES))
        assert max(letters.values()) - min(letters[c] for c in "ABC") <= 1
    given_text = {d.text: d.answer for d in drafts}
    assert all(given_text[q.text] == right_option(q) for q in questions)
    assert balance(drafts[::-1], seed) == questions
    assert len({q.id for q in questions}) == len(questions)


def test_splits_are_balanced_apart() -> None:
    drafts = [choice(i, "left", ("right", "back"), text=f"{i}") for i in range(9)]
    test = []
    for i, side in enumerate(SIDES * 3):
        wrong = tuple(s for s in SIDES if s != side)
        test.append(dataclasses.replace(choice(i, side, wrong), scene=f"t/{i}", split=Split.TEST))
    questions = balance([*drafts, *test], 0)
    assert sum(q.id.startswith("s/") for q in questions) == 1  # only "left" occurs there: one is kept
    assert sum(q.id.startswith("t/") for q in questions) == 9


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.3, 30), min_size=1, max_size=12))
def test_best_constant_is_the_best_of_a_fine_grid(answers: list[float]) -> None:
    guess, score = best_constant(np.array(answers))
    for other in np.linspace(0.1, 50, 800):
        assert np.mean([mean_relative_accuracy(other, a) for a in answers]) <= score + 1e-9
    assert np.mean([mean_relative_accuracy(guess, a) for a in answers]) == pytest.approx(score, abs=0.1001)


@pytest.mark.parametrize(
    ("answers", "expected"), [([2.0], 1.0), ([2.0, 2.0, 4.0], (1 + 1 + 0.1) / 3), ([1.0, 100.0], 0.5)]
)
def test_best_constant_by_hand(answers: list[float], expected: float) -> None:
    assert best_constant(np.array(answers))[1] == pytest.approx(expected)


def test_value_bins_are_relative() -> None:
    assert value_bin("10") == value_bin("10.2")
    assert value_bin("1.0") != value_bin("1.2")
    assert value_bin("100") != value_bin("130")
