"""Scores of benchmarks on cases computed by hand."""

from __future__ import annotations

import pickle

import pytest

from models.metrics import blink, cvbench, realworldqa, seedbench, sparbench, three_dsr, viewspatial
from models.metrics.benchmarks import BENCHMARKS, scorer


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B.)", "B"),
        ("c:\nbecause", "C"),
        ("The answer is (A), no, the answer is B.", "B"),
        ("Answer: C", "C"),
        ("answer D", "D"),
        ("I would say (A) or rather (C)", "C"),
        ("either (a) or nothing", ""),  # brackets count with capitals only
        ("E", ""),  # not among four options
        ("Both look alike", "B"),  # the last rule reads the first letter, whatever follows
        ("dog", "D"),
        ("", ""),
        ("It is the left one", ""),
    ],
)
def test_blink_letters(answer: str, letter: str) -> None:
    assert blink.read_letter(answer, 4) == letter


def test_blink_reads_only_letters_of_its_options_and_averages_tasks() -> None:
    assert blink.read_letter("C", 2) == ""
    assert blink.score_answer("C", "(C)", 3) == 1
    scores = {"Counting": [1.0, 0.0, 0.0, 0.0], "Jigsaw": [1.0]}
    assert blink.aggregate(scores) == {"Counting": 0.25, "Jigsaw": 1.0, "mean": 0.625, "accuracy": 0.4}
    assert blink.aggregate({task: [1.0] for task in blink.TASKS})["overall"] == 1.0
    assert blink.aggregate({}) == {}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. The car", "B"),
        ("The car is nearer, so it is C", "C"),
        ("A thing, but C", "A"),  # the start outranks the end
        ("The answer is B because Dogs bark", "D"),  # of the places after the phrase the later wins
        ("I pick B though", "B"),
        ("maybe (A), not B: far", "A"),  # (X) outranks X:
        ("not A) but B) then", "B"),  # the later of equal ranks
        ("xAy", "A"),  # anywhere, where nothing else is
        ("b", ""),  # capitals only
        ("", ""),
        ("...", ""),
    ],
)
def test_realworldqa_letters(answer: str, letter: str) -> None:
    assert realworldqa.read_letter(answer) == letter


def test_realworldqa_short_answers() -> None:
    assert realworldqa.score_answer("Downhill.", "downhill") == 1
    assert realworldqa.score_answer(" 3. ", "3") == 1
    assert realworldqa.score_answer("three", "3") == 0
    assert realworldqa.score_answer("", "A") == 0
    assert realworldqa.aggregate([1.0, 0.0]) == {"accuracy": 0.5}
    assert realworldqa.aggregate([]) == {}


def test_seedbench_reads_the_first_character() -> None:
    assert [seedbench.score_answer(a, "B") for a in ("B", " b)", "Because", "(B)", "A", "")] == [1, 1, 1, 0, 0, 0]
    scores = {"Scene Understanding": [1.0, 1.0, 0.0], "Spatial Relation": [0.0], "Action Prediction": [1.0]}
    result = seedbench.aggregate(scores)
    assert (result["image"], result["video"], result["all"]) == (0.5, 1.0, 0.6)
    assert result["Scene Understanding"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"unknown dimensions \['Taste'\]"):
        seedbench.aggregate({"Taste": [1.0]})


@pytest.mark.parametrize(
    ("task", "answer", "truth", "score"),
    [
        ("depth_prediction_oc", "2.0 m, at most 9", "2.0", 1.0),  # the first number
        ("depth_prediction_oc_mv", "between 9 and 2.0", "2.0", 1.0),  # the last one
        ("depth_prediction_oo", "1.5", "2.0", 0.6),  # 0.25: .50 .55 .60 .65 .70 .75
        ("depth_prediction_oo", "-2.0", "2.0", 1.0),  # signs are not read
        ("distance_prediction_oo", "about 10^2 or so 2", "10", 1.0),  # an exponent is no number
        ("distance_prediction_oo", "0.3", "0", 0.5),  # truth 0: error 0.3 <= .5 .45 .4 .35 .3
        ("distance_prediction_oo_mv", "far", "2.0", 0.0),
        ("position_matching", "B", "B", 1.0),
        ("position_matching", "b. left", "B", 1.0),  # the first character
        ("position_matching", "left", "B. left", 1.0),  # contained
        ("position_matching", "(B)", "B", 0.0),
        ("camera_motion_infer", "", "B", 0.0),  # an empty answer is contained in everything
    ],
)
def test_sparbench_answers(task: str, answer: str, truth: str, score: float) -> None:
    assert sparbench.score_answer(task, answer, truth) == pytest.approx(score)


def test_sparbench_change_of_view() -> None:
    truth = "move_right:1,rotate_left:30"
    assert sparbench.read_actions(truth) == (1, 0, 0, -30, 0)
    assert sparbench.score_view_change(truth, truth) == 1
    # Right: |1 - 2| / 2 = 0.5 passes one threshold of ten. Turn: 0 predicted, |-30 - 0| / 1. Others exact.
    assert sparbench.score_view_change("move_right:2", truth) == pytest.approx((0.1 + 1 + 1 + 0 + 1) / 5)
    assert sparbench.score_view_change("move_left:-1,rotate_left:40,rotate_right:10", truth) == 1
    assert sparbench.score_view_change("forward please", truth) == 0
    with pytest.raises(ValueError, match="could not convert"):
        sparbench.score_view_change(truth, "forward please")


def test_sparbench_levels_are_means_of_tasks() -> None:
    scores = {task: [0.0] for task in sparbench.LOW} | {task: [1.0] for task in sparbench.MIDDLE}
    scores["depth_prediction_oc"] = [1.0, 1.0, 1.0, 0.2]
    result = sparbench.aggregate(scores)
    assert result["low"] == pytest.approx(0.8 / 8)
    assert result["middle"] == 1
    assert not {"high", "overall"} & set(result)
    assert (len(sparbench.LOW), len(sparbench.MIDDLE), len(sparbench.HIGH)) == (8, 3, 9)
    full = sparbench.aggregate(scores | {task: [0.5] for task in sparbench.HIGH})
    assert full["overall"] == pytest.approx((0.8 + 3 + 4.5) / 20)
    with pytest.raises(ValueError, match="unknown task of SPAR-Bench 'colour'"):
        sparbench.score_answer("colour", "red", "red")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("B. yes", "B"),
        ("Answer: C", "C"),
        ("The answer is D", "D"),
        ("it could be (B) or (C)", "B"),
        ("either. A or B", "A"),
        ("b", ""),
        ("", ""),
    ],
)
def test_3dsrbench_letters(answer: str, letter: str) -> None:
    assert three_dsr.read_letter(answer) == letter


def test_3dsrbench_variants() -> None:
    assert three_dsr.variant_of("VIN6MS3J") == ("VIN6MS3J", "", False)
    assert three_dsr.variant_of("VIN6MS3J-1") == ("VIN6MS3J", "1", False)
    assert three_dsr.variant_of("VIN6MS3J-flip") == ("VIN6MS3J", "", True)
    assert three_dsr.variant_of("a-b-flip-3") == ("a-b", "3", True)


def test_3dsrbench_counts_a_question_only_with_all_its_variants() -> None:
    above, higher = "location_above", "height_higher"
    rows = [
        ("q", above, 1.0), ("q-1", above, 1.0), ("q-flip", above, 1.0), ("q-flip-1", above, 0.0),
        ("r", higher, 1.0), ("r-1", higher, 1.0),
    ]  # fmt: skip
    result = three_dsr.aggregate(rows)
    assert result["vanilla"] == pytest.approx(5 / 6)
    assert result["flip"] == pytest.approx(3 / 4)  # q & q-flip; q-1 & q-flip-1 (wrong); r; r-1
    assert result["circular"] == pytest.approx(2 / 3)  # q; q-flip (wrong); r
    assert result["circular_flip"] == 0.5  # r alone
    assert (result["circular_flip/location"], result["circular_flip/height"]) == (0, 1)
    assert result["vanilla/location_above"] == 0.75
    assert set(three_dsr.aggregate(rows[4:5])) == {"vanilla", "vanilla/height", "vanilla/height_higher"}
    with pytest.raises(ValueError, match=r"unknown categories of 3DSRBench \['colour'\]"):
        three_dsr.aggregate([("q", "colour", 1.0)])


# --- the common interface --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" (b) two", "B"),
        ("C. three", "C"),
        ("Because", "B"),  # the first letter, whatever follows
        ("((D", "D"),
        ("1 (A)", ""),
        ("", ""),
        ("[A]", ""),
    ],
)
def test_cvbench_letters(answer: str, letter: str) -> None:
    assert cvbench.read_letter(answer) == letter


def test_cvbench_averages_sources_and_not_questions() -> None:
    assert [cvbench.score_answer(a, "(B)") for a in ("B", "(b)", "A", "")] == [1, 1, 0, 0]
    scores = {
        "ADE20K/Count": [1.0, 1.0, 1.0],
        "ADE20K/Relation": [0.0],
        "COCO/Count": [0.0, 1.0],
        "Omni3D/Depth": [1.0],
        "Omni3D/Distance": [0.0, 0.0, 0.0],
    }
    # 2D (0.75 + 0.5) / 2, 3D 0.25; the mean of those two, where 5 of 10 answers are right.
    expected = {
        "ADE20K": 0.75, "COCO": 0.5, "Omni3D": 0.25, "Count": 0.8, "Relation": 0.0, "Depth": 1.0, "Distance": 0.0,
        "2D": 0.625, "3D": 0.25, "combined": 0.4375, "accuracy": 0.5,
    }  # fmt: skip
    assert cvbench.aggregate(scores) == pytest.approx(expected)
    part = cvbench.aggregate({"COCO/Count": [1.0], "Omni3D/Depth": [0.0]})
    assert part == {"COCO": 1.0, "Omni3D": 0.0, "Count": 1.0, "Depth": 0.0, "3D": 0.0, "accuracy": 0.5}
    assert cvbench.aggregate({}) == {}
    for wrong in ("COCO", "COCO/Taste", "SUN/Count"):
        with pytest.raises(ValueError, match=f"unknown type '{wrong}' of CV-Bench"):
            cvbench.aggregate({wrong: [1.0]})


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("b. left", "B"),
        ("B\nno, it is (D)", "D"),  # the last line alone
        ("B\n", ""),  # which may be empty
        ("The answer is a chair, C", "A"),  # the article counts, as published
        ("Both", ""),
        ("E or D", "D"),
        ("", ""),
    ],
)
def test_viewspatial_letters(answer: str, letter: str) -> None:
    assert viewspatial.read_letter(answer) == letter


def test_viewspatial_averages_questions() -> None:
    assert [viewspatial.score_answer(a, "B. front-right") for a in ("B", "b. left", "A", "")] == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="the true answer 'front' states no letter"):
        viewspatial.score_answer("", "front")
    scores = {kind: [1.0] for kind in viewspatial.TYPES[1:]} | {viewspatial.TYPES[0]: [0.0, 0.0, 0.0, 1.0]}
    result = viewspatial.aggregate(scores)
    assert result[viewspatial.TYPES[0]] == 0.25
    assert result["accuracy"] == result["overall"] == 5 / 8
    part = viewspatial.aggregate({viewspatial.TYPES[2]: [1.0, 0.0]})
    assert part == {viewspatial.TYPES[2]: 0.5, "accuracy": 0.5}
    assert viewspatial.aggregate({}) == {}
    with pytest.raises(ValueError, match="unknown types of ViewSpatial-Bench"):
        viewspatial.aggregate({"Cat perspective": [1.0]})


def test_every_benchmark_scores_merges_and_computes() -> None:
    examples = {
        "vsibench": ("object_counting", "4", "4", ()),
        "vsibench-words": ("object_counting", "4", "there are four", ()),
        "blink": ("Counting", "B", "(B)", ("A. 1", "B. 2")),
        "cvbench": ("COCO/Count", "B", "(b) two", ("A. 1", "B. 2")),
        "viewspatial": (viewspatial.TYPES[0], "C", "so: c. left", ()),
        "sparbench": ("depth_prediction_oc", "2.0", "2.0 m", ()),
        "3dsrbench": ("height_higher", "A", "A", ("A. x", "B. y")),
        "seedbench": ("Spatial Relation", "C", "C", ()),
        "realworldqa": ("choice", "A", "A.", ()),
        "plain": ("colour", "red", "Red.", ()),
    }
    assert set(examples) == set(BENCHMARKS)
    for name, (kind, answer, right, options) in examples.items():
        first, second = scorer(name), scorer(name)
        assert first.add(id="a", type=kind, answer=answer, prediction=right, options=options) == 1
        assert second.add(id="b", type=kind, answer=answer, prediction="zzz", options=options) == 0
        first.merge(pickle.loads(pickle.dumps(second)))
        assert 0.5 in first.compute().values(), name
        assert first.headline == BENCHMARKS[name].headline
        assert BENCHMARKS[name].parser
        assert set(BENCHMARKS[name].variants) <= set(BENCHMARKS)
        # A question that a padded batch asks twice counts once.
        first.add(id="a", type=kind, answer=answer, prediction="zzz", options=options)
        assert len(first.rows) == 2
        assert scorer(name).compute() == {}


def test_the_two_readers_of_numbers_are_two_benchmarks() -> None:
    strict, words = scorer("vsibench"), scorer("vsibench-words")
    for one in (strict, words):
        one.add(id="a", type="object_counting", answer="3", prediction="three")
    assert strict.compute() == {"object_counting": 0.0}
    assert words.compute() == {"object_counting": 1.0}


def test_plain_questions() -> None:
    plain = scorer("plain")
    assert plain.add(id="1", type="side", answer="B", prediction=" b.", options=("A. left", "B. right")) == 1
    assert plain.add(id="2", type="count", answer="4", prediction="3") == pytest.approx(0.6)
    assert plain.add(id="3", type="count", answer="0", prediction="0") == 1
    assert plain.add(id="4", type="name", answer="a red chair", prediction="A red chair.") == 1
    result = plain.compute()
    assert result == {
        "side": 1.0,
        "count": pytest.approx(0.8),
        "name": 1.0,
        "mean": pytest.approx(2.8 / 3),
        "accuracy": pytest.approx(3.6 / 4),
    }


def test_errors_name_the_question_and_the_benchmark() -> None:
    with pytest.raises(ValueError, match="unknown benchmark 'mmlu'; there are vsibench"):
        scorer("mmlu")
    with pytest.raises(ValueError, match="question '7' of vsibench: unknown question type 'colour'"):
        scorer("vsibench").add(id="7", type="colour", answer="red", prediction="red")
    with pytest.raises(ValueError, match="scores of blink were added to those of vsibench"):
        scorer("vsibench").merge(scorer("blink"))
