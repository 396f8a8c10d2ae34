"""One way to score any benchmark of questions: add answers one by one, merge over ranks, compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.metrics import blink, cvbench, realworldqa, seedbench, sparbench, three_dsr, viewspatial, vsibench

Row = tuple[str, str, float]
"""(id, type, score) of one answer."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How one benchmark scores an answer, and what it makes of all scores."""

    score: Callable[[str, str, Sequence[str], str], float]
    """(type, true answer, options, prediction) -> score in [0, 1]."""
    aggregate: Callable[[Sequence[Row]], dict[str, float]]
    headline: str
    """The score that the benchmark is compared by; absent where a part of the benchmark is missing."""
    parser: str
    """How an answer is read, in a few words; recorded with every score."""
    variants: tuple[str, ...] = ()
    """Other definitions in use, which score the same answers differently; reported beside it under their names."""


def by_type(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Scores by type, in their order."""
    scores: dict[str, list[float]] = defaultdict(list)
    for _, kind, score in rows:
        scores[kind].append(score)
    return dict(scores)


def score_plain(kind: str, truth: str, options: Sequence[str], prediction: str) -> float:  # noqa: ARG001 - as others
    """For questions of no benchmark: with options the letter by VSI-Bench's rule; a positive number by MRA; else
    equality ignoring case, surrounding blanks and trailing full stops.
    """
    if options:
        return vsibench.score_choice(prediction.strip(), truth)
    number = vsibench.read_number(truth)
    if number is not None and number > 0:
        return vsibench.mean_relative_accuracy(vsibench.read_number(prediction.strip()), number)
    return float(prediction.strip().rstrip(".").lower() == truth.strip().rstrip(".").lower())


def aggregate_plain(rows: Sequence[Row]) -> dict[str, float]:
    """Mean by type, ``mean`` of the types, ``accuracy`` over all answers."""
    means = {kind: float(np.mean(scores)) for kind, scores in by_type(rows).items()}
    if not means:
        return {}
    return means | {"mean": float(np.mean(list(means.values()))), "accuracy": float(np.mean([r[2] for r in rows]))}


_NUMBERS: Mapping[str, str] = {
    "strict": "float() of it (the benchmark's own reader)",
    "words": "the first digits or number words of the answer in lower case (a later harness's reader)",
}


def _vsibench(reader: str) -> Benchmark:
    return Benchmark(
        score=lambda kind, truth, _, prediction: vsibench.score_answer(kind, prediction, truth, reader=reader),
        aggregate=lambda rows: vsibench.aggregate(by_type(rows)),
        headline="overall",
        parser=f"first word without trailing full stops; numbers: {_NUMBERS[reader]}",
        variants=("vsibench-words",) if reader == "strict" else (),
    )


BENCHMARKS: Mapping[str, Benchmark] = {
    "vsibench": _vsibench("strict"),
    "vsibench-words": _vsibench("words"),
    "blink": Benchmark(
        score=lambda _, truth, options, prediction: blink.score_answer(prediction, truth, len(options)),
        aggregate=lambda rows: blink.aggregate(by_type(rows)),
        headline="overall",
        parser='the first of: a first line that is a letter; the last "answer (is) X"; the last "(X)"; a first letter',
    ),
    "cvbench": Benchmark(
        score=lambda _, truth, __, prediction: cvbench.score_answer(prediction, truth),
        aggregate=lambda rows: cvbench.aggregate(by_type(rows)),
        headline="combined",
        parser="first letter of the answer after an optional bracket",
    ),
    "viewspatial": Benchmark(
        score=lambda _, truth, __, prediction: viewspatial.score_answer(prediction, truth),
        aggregate=lambda rows: viewspatial.aggregate(by_type(rows)),
        headline="overall",
        parser="first stand-alone A-D of the last line, ignoring case",
    ),
    "sparbench": Benchmark(
        score=lambda kind, truth, _, prediction: sparbench.score_answer(kind, prediction, truth),
        aggregate=lambda rows: sparbench.aggregate(by_type(rows)),
        headline="overall",
        parser="numbers: the last for *_mv tasks, else the first; choices: equal, contained, or the first character; "
        "changes of view: five signed axes of name:value pairs",
    ),
    "3dsrbench": Benchmark(
        score=lambda _, truth, __, prediction: three_dsr.score_answer(prediction, truth),
        aggregate=three_dsr.aggregate,
        headline="circular_flip",
        parser='a capital A-D by rules in order: at the start, after "answer", "(X)", "X.", a word of its own',
    ),
    "seedbench": Benchmark(
        score=lambda _, truth, __, prediction: seedbench.score_answer(prediction, truth),
        aggregate=lambda rows: seedbench.aggregate(by_type(rows)),
        headline="image",
        parser="first character, ignoring case",
    ),
    "realworldqa": Benchmark(
        score=lambda _, truth, __, prediction: realworldqa.score_answer(prediction, truth),
        aggregate=lambda rows: realworldqa.aggregate([row[2] for row in rows]),
        headline="accuracy",
        parser="letters ranked by their place; else equality in lower case without trailing full stops",
    ),
    "plain": Benchmark(
        score=score_plain,
        aggregate=aggregate_plain,
        headline="accuracy",
        parser="options: the first word; a positive number: float() of the first word; else equality ignoring case",
    ),
}
"""``plain`` is for questions of no benchmark. ``vsibench`` reads numbers as the benchmark does, ``vsibench-words`` as
a later harness: two scores that differ."""


@dataclass
class Scorer:
    """Scores of one benchmark's answers so far. Made by :func:`scorer`."""

    name: str
    rows: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Id -> (type, score)."""

    def add(self, *, id: str, type: str, answer: str, prediction: str, options: Sequence[str] = ()) -> float:  # noqa: A002
        """Score one prediction; returns its score in [0, 1].

        Args:
            id: of the question; a second answer to it is scored, but does not count.
            type: task, dimension or category, as the benchmark names it.
            answer: the true one: letter, number or text.
            prediction: what the model said, as it said it.
            options: of a multiple-choice question.

        ValueError names the question whose type or true answer the benchmark does not know.
        """
        try:
            score = BENCHMARKS[self.name].score(type, answer, options, prediction)
        except ValueError as error:
            raise ValueError(f"question {id!r} of {self.name}: {error}") from error
        self.rows.setdefault(id, (type, score))
        return score

    def merge(self, other: Scorer) -> None:
        """Add what another rank scored. ValueError when that was another benchmark."""
        if other.name != self.name:
            raise ValueError(f"scores of {other.name} were added to those of {self.name}")
        for key, row in other.rows.items():
            self.rows.setdefault(key, row)

    def compute(self) -> dict[str, float]:
        """The benchmark's scores by its own averages; see the module of each."""
        return BENCHMARKS[self.name].aggregate([(key, kind, score) for key, (kind, score) in self.rows.items()])

    @property
    def headline(self) -> str:
        """Name of the score that the benchmark is compared by."""
        return BENCHMARKS[self.name].headline


def scorer(name: str) -> Scorer:
    """An empty scorer of a benchmark. ValueError with the list of names when there is none."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return Scorer(name)
