"""VSI-Bench's scores on cases computed by hand."""

from __future__ import annotations

import pytest

from models.metrics import vsibench


@pytest.mark.parametrize(
    ("answer", "strict", "words"),
    [
        ("3", 3.0, 3.0),
        ("3.", 3.0, 3.0),
        ("2.5 meters", 2.5, 2.5),
        ("2.5m", None, 2.5),
        ("about 4", None, 4.0),
        (" 4", None, 4.0),
        ("1,200", None, 1.0),
        (".8", 0.8, 8.0),
        ("-2", -2.0, -2.0),
        ("1e1", 10.0, 1.0),
        ("Three chairs", None, 3.0),
        ("There are twenty-one of them", None, 21.0),
        ("two hundred and five", None, 205.0),
        ("three thousand two hundred", None, 3200.0),
        ("a hundred", None, 100.0),
        ("one or 2", None, 1.0),
        ("someone", None, None),
        ("nothing", None, None),
        ("", None, None),
    ],
)
def test_the_two_readers_of_numbers(answer: str, strict: float | None, words: float | None) -> None:
    assert vsibench.read_number(answer) == strict
    assert vsibench.read_number(answer, "words") == words


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (4.0, 4.0, 1.0),
        (3.9, 4.0, 1.0),  # relative error 0.025 <= 0.05
        (3.0, 4.0, 0.6),  # 0.25: passes .50 .55 .60 .65 .70 .75
        (6.0, 4.0, 0.1),  # 0.5: passes .50 alone
        (6.1, 4.0, 0.0),
        (0.0, 4.0, 0.0),
        (1.1, 1.0, 0.9),  # exactly at .90: linspace puts that threshold a hair below, as in the published code
        (None, 4.0, 0.0),
        (float("nan"), 4.0, 0.0),
        (float("inf"), 4.0, 0.0),
    ],
)
def test_mean_relative_accuracy(prediction: float | None, truth: float, expected: float) -> None:
    assert vsibench.mean_relative_accuracy(prediction, truth) == pytest.approx(expected)


def test_a_true_value_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="positive true value, got 0"):
        vsibench.mean_relative_accuracy(1.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("B", 1),
        ("b", 1),
        ("B.", 1),
        ("B... yes", 1),
        ("B. left", 1),
        ("(B)", 0),
        ("A", 0),
        (" B", 0),
        ("B\n", 1),
        ("", 0),
    ],
)
def test_choices(answer: str, score: float) -> None:
    assert vsibench.score_answer("route_planning", answer, "B") == score


def test_score_answer_reads_numbers_and_names_what_it_does_not_know() -> None:
    assert vsibench.score_answer("object_counting", "three", "3") == 0
    assert vsibench.score_answer("object_counting", "three", "3", reader="words") == 1
    with pytest.raises(ValueError, match="unknown question type 'colour'"):
        vsibench.score_answer("colour", "red", "red")
    with pytest.raises(ValueError, match="unknown reader of numbers 'loose'"):
        vsibench.read_number("3", "loose")


def test_aggregate_is_the_mean_of_eight_tasks() -> None:
    scores = {name: [0.5, 0.5] for name in vsibench.QUESTION_TYPES}
    scores["object_rel_direction_easy"] = [1.0]
    scores["object_rel_direction_medium"] = [0.0, 0.0, 0.0]
    scores["object_counting"] = [1.0] * 100  # many questions of one type weigh no more than few
    result = vsibench.aggregate(scores)
    assert result["object_rel_direction"] == pytest.approx(0.5)
    assert result["overall"] == pytest.approx((0.5 * 7 + 1.0) / 8)


def test_numerical_and_multiple_choice_are_means_of_four_tasks() -> None:
    """The row of the paper's table for the 3B model: eight tasks, and what it makes of them."""
    row = {
        "object_counting": 69.0, "object_abs_distance": 39.3, "object_size_estimation": 70.6,
        "room_size_estimation": 62.8, "object_rel_distance": 57.9, "route_planning": 36.1,
        "obj_appearance_order": 73.6, "object_rel_direction_easy": 59.5, "object_rel_direction_medium": 59.5,
        "object_rel_direction_hard": 59.5,
    }  # fmt: skip
    result = vsibench.aggregate({name: [score / 100] for name, score in row.items()})
    means = [round(100 * result[name], 1) for name in ("numerical", "multiple_choice", "overall")]
    assert means == [60.4, 56.8, 58.6]
    without_one = {name: [0.5] for name in row if name != "route_planning"}
    assert "numerical" in vsibench.aggregate(without_one)
    assert not {"multiple_choice", "overall"} & set(vsibench.aggregate(without_one))


def test_aggregate_of_a_part_has_no_overall() -> None:
    result = vsibench.aggregate({"object_counting": [1.0, 0.0], "object_rel_direction_easy": [1.0]})
    assert result == {"object_counting": 0.5, "object_rel_direction_easy": 1.0}
    with pytest.raises(ValueError, match="unknown question types"):
        vsibench.aggregate({"colour": [1.0]})
