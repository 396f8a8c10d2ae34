"""Questions with one right answer, answered by the language model and scored as their benchmark does.

Each source of questions is judged by itself: a benchmark by its own rules, questions of VSI-Bench's types (ours about
procedural rooms among them) by VSI-Bench's, others plainly. The bar is the best of several strategies that read the
training split and see no picture (:mod:`services.data.questions.guesses`).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from actors.recipes.base import row
from actors.recipes.benchmarks import Answered, harness_task, is_benchmark, longest_answer, protocol_of, write_harness
from actors.recipes.pictures import Album
from actors.recipes.samples import load_samples, spread
from configs import RunConfig
from models.metrics.benchmarks import BENCHMARKS, Scorer, scorer
from models.metrics.harness import Task
from models.metrics.vsibench import QUESTION_TYPES
from models.uniugg.answers import generate_text
from models.uniugg.llm import CONVERSATION, UniuggLLM
from services.contracts import ImageRef, Item, PlanSample, Question, Role, Split, Turn, ViewRole
from services.data.questions.guesses import BlindBaseline, blind_baseline
from services.errors import DataError
from services.streams.sampling import sample_id
from services.streams.text import TextColumns
from services.telemetry import events

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

_log = logging.getLogger("loom3d")

BLIND, UNTAUGHT = "best image-blind baseline", "first option, or nothing"
"""What stands beside the answers; the second where the training split asks no question of these types."""
ASKED = "mean of the asked"
EXAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question of a source, and the conversation that asks it."""

    source: str
    item: Item
    question: Question

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns up to where the answer begins."""
        last = max(place for place, turn in enumerate(self.item.turns) if turn.role == "user")
        return self.item.turns[: last + 1]

    def answered(self, prediction: str) -> Answered:
        """The question with what was answered."""
        text = "\n".join(turn.text for turn in self.prompt if turn.role != "assistant")
        pictures = len(self.item.images)
        return Answered(question=self.question, prompt=text, pictures=pictures, prediction=prediction)

    @property
    def sample(self) -> PlanSample:
        """What the loader reads of it."""
        return PlanSample(
            id=sample_id(self.source, self.item.id, CONVERSATION, 0),
            source=self.source,
            item=self.item.id,
            kind=CONVERSATION,
            views=tuple(ViewRole(index=place, role=Role.CONTEXT) for place in range(len(self.item.images))),
            seed=0,
        )


def questions_of(feed: Feed, split: Split) -> dict[str, list[Asked]]:
    """Source -> its questions of the split, by type; sources without any are left out."""
    found: dict[str, list[Asked]] = {}
    for source, manifest in feed.manifests.items():
        entries = [entry.id for entry in manifest.of_split(split) if entry.kind == "item" and entry.length > 0]
        items = (manifest.scene(name) for name in entries if f"{source}/{name}" not in feed.quarantine)
        asked = [
            Asked(source=source, item=item, question=item.question)
            for item in items
            if isinstance(item, Item) and item.question is not None and any(t.role == "user" for t in item.turns)
        ]
        if asked:
            found[source] = sorted(asked, key=lambda one: one.question.type)
    return found


def benchmark_of(config: RunConfig, source: str, questions: Sequence[Question]) -> str:
    """Whose scores the questions of a source get."""
    settings = config.data.sources[source]
    if settings.format == "benchmark":
        return str(settings.options["name"])
    return "vsibench" if {question.type for question in questions} <= set(QUESTION_TYPES) else "plain"


def judge_answers(
    models: Mapping[str, nn.Module], judge: Feed, album: Album, *, split: Split, device: str, reader: Reader
) -> dict[str, dict[str, Any]]:
    """Answer at most ``evaluate.samples`` questions of each source; metrics by ``answers/<score>``.

    Args:
        models: name -> language role; the first is judged, the others stand beside it.
        judge: the feed of the judge.
        album: gets a table of questions with their answers, and one of scores by type. Answers to published
            benchmarks are also written below its folder as lmms-eval writes them, and scored by each definition that
            is in use.
        split: whose questions are asked.
        device: of the models.
        reader: how these models are asked.
    """
    metrics: dict[str, dict[str, Any]] = {}
    tasks: list[Task] = []
    began = time.monotonic()
    learnt = {source: [one.question for one in asked] for source, asked in questions_of(judge, Split.TRAIN).items()}
    judged = questions_of(judge, split)
    benchmarks = {name: benchmark_of(judge.config, name, [a.question for a in asked]) for name, asked in judged.items()}
    for source, all_asked in judged.items():
        asked, benchmark = spread(all_asked, judge.config.evaluate.samples), benchmarks[source]
        answers: dict[str, dict[str, str]] = {}
        for name, module in models.items():
            with events.span("answers", source=source, model=name):
                answers[name] = answer(module, asked, judge, reader, split=split, device=device)
        asked = [one for one in asked if one.question.id in next(iter(answers.values()))]
        if not asked:
            continue
        scores = {name: score(asked, given, benchmark) for name, given in answers.items()}
        blind = blind_baseline(learnt.get(source, []), [one.question for one in asked], benchmark)
        label, judged_row = _beside(benchmark, scores, blind)
        label = label if list(benchmarks.values()).count(benchmark) == 1 else f"{label} ({source})"
        replies = [one.answered(next(iter(answers.values()))[one.question.id]) for one in asked]
        told = protocol_of(judge.config, source, benchmark, replies, possible=len(all_asked))
        metrics[f"answers/{label}"] = judged_row | {"protocol": told}
        _tables(album, source, asked, answers, scores, blind)
        if is_benchmark(judge.config, source):
            found = next(iter(scores.values()))
            tasks.append(harness_task(benchmark, found, replies, told, possible=len(all_asked)))
            for variant in BENCHMARKS[benchmark].variants:
                metrics[f"answers/{label} as {variant}"] = _variant(variant, asked, answers, learnt.get(source, [])) | {
                    "protocol": told | {"benchmark": variant, "parser": BENCHMARKS[variant].parser}
                }
    if tasks:
        write_harness(album.folder, judge.config, tasks, seconds=time.monotonic() - began)
    return metrics


def _variant(
    benchmark: str, asked: Sequence[Asked], answers: Mapping[str, Mapping[str, str]], learnt: Sequence[Question]
) -> dict[str, Any]:
    """The same answers by another definition of their benchmark's score, beside the same bar by that definition."""
    scores = {name: score(asked, given, benchmark) for name, given in answers.items()}
    return _beside(benchmark, scores, blind_baseline(learnt, [one.question for one in asked], benchmark))[1]


def _beside(benchmark: str, scores: Mapping[str, Scorer], blind: BlindBaseline) -> tuple[str, dict[str, Any]]:
    """What the benchmark's score is called, and the first model's beside those of the others and of guessing."""
    values = {name: _headline(benchmark, found) for name, found in scores.items()}
    best = {kind: blind.scores[kind][way] for kind, way in blind.best.items()}
    label, guessed = headline(benchmark, blind.numbers, best)
    first, *others = values
    bar = UNTAUGHT if set(blind.untrained) == set(blind.best) else BLIND
    return label, row(values[first], guessed, bar, "higher", **{name: values[name] for name in others})


def headline(benchmark: str, numbers: Mapping[str, float], by_type: Mapping[str, float]) -> tuple[str, float]:
    """The benchmark's own score under its name; where a task was not asked, the mean over the types that were.

    Args:
        benchmark: a name of ``models.metrics.benchmarks``.
        numbers: what it makes of all scores.
        by_type: mean score of each question type that was asked.
    """
    own = BENCHMARKS[benchmark].headline
    return (benchmark, numbers[own]) if own in numbers else (f"{benchmark}, {ASKED}", fmean(by_type.values()))


def _headline(benchmark: str, found: Scorer) -> float:
    return headline(benchmark, found.compute(), {kind: fmean(values) for kind, values in by_type(found).items()})[1]


def by_type(found: Scorer) -> dict[str, list[float]]:
    """Question type -> scores of its answers."""
    scores: dict[str, list[float]] = defaultdict(list)
    for kind, value in found.rows.values():
        scores[kind].append(value)
    return dict(sorted(scores.items()))


def score(asked: Sequence[Asked], answers: Mapping[str, str], benchmark: str) -> Scorer:
    """The benchmark's scores of these answers (by id of the question)."""
    found = scorer(benchmark)
    for one in asked:
        question = one.question
        found.add(
            id=question.id,
            type=question.type,
            answer=question.answer,
            options=question.options,
            prediction=answers[question.id],
        )
    return found


class Reader(Protocol):
    """How a kind of language model is asked about pictures."""

    @property
    def texts(self) -> TextColumns:
        """Tokens to words, and the token that ends an answer."""
        ...

    def prompt(self, one: Asked, batch: Mapping[str, Any]) -> list[int]:
        """Token ids up to where the answer begins; ``batch`` holds the pictures. DataError when they are too many."""
        ...

    def generate(
        self,
        module: nn.Module,
        prompts: Sequence[Sequence[int]],
        batch: Mapping[str, Any],
        *,
        max_new_tokens: int,
        device: str,
    ) -> list[list[int]]:
        """Token ids, at most ``max_new_tokens``, of answers about the pictures of the only sample of a batch."""
        ...


class TokenReader:
    """How UniUGG's language model is asked: every picture is a block of the ViT's tokens."""

    def __init__(self, judge: Feed) -> None:
        _, rows, columns, _ = (int(axis or 0) for axis in judge.client.outputs("vit")["tokens"].shape)
        self._config, self.texts = judge.config, TextColumns(judge.config, rows * columns)

    def prompt(self, one: Asked, batch: Mapping[str, Any]) -> list[int]:  # noqa: ARG002
        """Token ids up to where the answer begins. DataError when they are too many."""
        ids: list[int] = self.texts.question(one.prompt, len(one.item.images))["input_ids"].data.tolist()
        return ids

    def generate(
        self,
        module: nn.Module,
        prompts: Sequence[Sequence[int]],
        batch: Mapping[str, Any],
        *,
        max_new_tokens: int,
        device: str,
    ) -> list[list[int]]:
        """Token ids, at most ``max_new_tokens``, of answers about the pictures of the only sample of a batch."""
        assert isinstance(module, UniuggLLM), "the recipe makes this model"
        views = int(batch["tokens_lengths"][0, 0])
        tokens: Tensor | None = batch["tokens"][0, :views, 0].to(device, torch.float32) if views else None
        return generate_text(
            module,
            prompts,
            tokens,
            max_new_tokens=max_new_tokens,
            stop=(self.texts.end_of_turn,),
            batch_size=self._config.generate.batch_size,
        )


def answer(
    module: nn.Module, asked: Sequence[Asked], judge: Feed, reader: Reader, *, split: Split, device: str
) -> dict[str, str]:
    """Id of each question -> the answer in words. One that is too long, or whose pictures are broken, is not there.

    Questions about the same pictures are asked together: the model reads the pictures once.
    """
    groups: dict[tuple[str, tuple[ImageRef, ...]], list[Asked]] = defaultdict(list)
    for one in asked:
        groups[one.source, one.item.images].append(one)
    first = {group[0].sample.id: group for group in groups.values()}
    answers: dict[str, str] = {}
    chosen = [group[0].sample for group in groups.values()]
    for batch, (sample,) in load_samples(_without_text(judge), chosen, split=split, batch_size=1):
        group = first[sample.id]
        if not float(batch["weight"][0]):
            _log.warning(
                "%d questions of %s are not asked: pictures of %s are broken", len(group), sample.source, sample.item
            )
            continue
        prompts = _prompts(group, reader, batch)
        longest = longest_answer(judge.config, sample.source)
        given = (
            reader.generate(module, list(prompts.values()), batch, max_new_tokens=longest, device=device)
            if prompts
            else []
        )
        answers |= {name: reader.texts.decode(ids) for name, ids in zip(prompts, given, strict=True)}
    return answers


def _prompts(group: Sequence[Asked], reader: Reader, batch: Mapping[str, Any]) -> dict[str, list[int]]:
    """Id of each question -> its prompt, without those that are too long."""
    prompts: dict[str, list[int]] = {}
    for one in group:
        try:
            prompts[one.question.id] = reader.prompt(one, batch)
        except DataError as error:
            _log.warning("question %s of %s is not asked: %s", one.question.id, one.source, error)
    return prompts


def _without_text(judge: Feed) -> Feed:
    """The same feed for pictures alone: one shows the pictures of many questions, whatever its own words are."""
    assert judge.texts is not None, "questions are text"
    words = judge.texts.specs(CONVERSATION)
    columns = {name: found for name, found in judge.columns[CONVERSATION].items() if name not in words}
    made = replace(judge.inputs[CONVERSATION], text=False)
    return replace(
        judge,
        inputs={**judge.inputs, CONVERSATION: made},
        columns={**judge.columns, CONVERSATION: columns},
    )


def _tables(
    album: Album,
    source: str,
    asked: Sequence[Asked],
    answers: Mapping[str, Mapping[str, str]],
    scores: Mapping[str, Scorer],
    blind: BlindBaseline,
) -> None:
    """Scores by type beside what guessing scores, and some questions with what was answered."""
    name = next(iter(scores))
    given, found = answers[name], scores[name].rows
    album.table(
        f"Answers about {source} by type",
        f"Mean score in [0, 1]. The last columns are the {BLIND}: the strategy that guesses best, and its score.",
        ("type", "questions", "score", "guessing", "strategy"),
        [
            (kind, len(values), fmean(values), blind.scores[kind][blind.best[kind]], blind.best[kind])
            for kind, values in by_type(scores[name]).items()
        ],
    )
    album.table(
        f"Questions about {source}",
        "Some of the questions that were asked, with the true answer and the one that was given.",
        ("type", "question", "options", "true", "given", "score"),
        [
            (
                one.question.type,
                one.question.text,
                "; ".join(one.question.options),
                one.question.answer,
                given[one.question.id],
                found[one.question.id][1],
            )
            for one in spread(asked, EXAMPLES)
        ],
    )
