"""Make the questions of a source, and write them as JSON lines in the conversation form of VSI-590K."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.schema import QuestionsConfig, RunConfig
from services.contracts import ImageRef, Question, ReferringExpression, Scene
from services.data.questions import choice, numeric, referring, route
from services.data.questions.balance import balance
from services.data.questions.blind import BlindScore, blind_scores, scene_of
from services.data.questions.draft import Draft
from services.data.questions.facts import Facts, gather
from services.data.questions.single import PRESENCE, SCENE_TYPE, SINGLE_TYPES, single_questions
from services.data.questions.views import ViewCaption, view_captions

OPENING = "The pictures were taken one after the other on a walk through one place."
ASK_NUMBER = "Answer with the number alone."
ASK_LETTER = "Answer with the letter of the right option alone."
ASK_WORD = "Answer in a word or two."
WORDS = frozenset({SCENE_TYPE, PRESENCE})
"""Types whose answers are words."""
DESCRIBE = ("Describe the place in one sentence.", "What kind of place is it, and how large is its floor?")


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """All that was made for a source, by scene id; ``questions`` are balanced over the source."""

    scenes: dict[str, Scene]
    questions: tuple[Question, ...]
    expressions: dict[str, tuple[ReferringExpression, ...]]
    captions: dict[str, tuple[str, ...]]
    view_captions: dict[str, tuple[ViewCaption, ...]]
    single: tuple[Question, ...]
    """Questions about single pictures, balanced over the source."""
    views: dict[str, tuple[int, ...]]
    """The views of each scene that all of this is about."""

    @cached_property
    def _by_scene(self) -> Mapping[str, list[Question]]:
        found: defaultdict[str, list[Question]] = defaultdict(list)
        for question in self.questions:
            found[scene_of(question)].append(question)
        return found

    def scene(self, scene_id: str) -> Scene:
        """The scene with its questions, captions and referring expressions attached."""
        return dataclasses.replace(
            self.scenes[scene_id],
            questions=tuple(self._by_scene[scene_id]),
            captions=self.captions[scene_id],
            expressions=self.expressions[scene_id],
        )


def draft_questions(facts: Facts, config: QuestionsConfig) -> list[Draft]:
    """All types of question about one scene, at most ``per_scene`` of each, before balancing."""
    seed, limit = config.seed, config.per_scene
    return [
        *numeric.object_counting(facts)[:limit],
        *numeric.object_abs_distance(facts, seed, limit),
        *numeric.object_size_estimation(facts)[:limit],
        *numeric.room_size_estimation(facts),
        *choice.object_rel_distance(facts, seed, limit),
        *choice.object_rel_direction(facts, seed, limit),
        *choice.obj_appearance_order(facts, seed, limit),
        *route.route_planning(facts, seed, limit),
    ]


def annotate(
    scenes: Iterable[Scene], config: QuestionsConfig, progress: Callable[[str], None] | None = None
) -> Annotations:
    """Questions, referring expressions and captions of scenes that have instances; other scenes are left out.

    DataError names a mask or mesh that cannot be read. ``progress`` is called with the id of each finished scene.
    """
    known: dict[str, Facts] = {}
    for scene in scenes:
        if not scene.instances or all(view.instance_path is None for view in scene.views):
            continue
        known[scene.id] = gather(scene, config)
        if progress is not None:
            progress(scene.id)
    seed, limit = config.seed, config.per_scene
    labels = sorted({thing.label for facts in known.values() for thing in facts.visible})
    drafts = [draft for facts in known.values() for draft in draft_questions(facts, config)]
    single = [draft for facts in known.values() for draft in single_questions(facts, labels, seed, limit)]
    return Annotations(
        scenes={name: facts.scene for name, facts in known.items()},
        questions=tuple(balance(drafts, seed)),
        expressions={
            name: tuple(referring.referring_expressions(facts, seed, 2 * limit)) for name, facts in known.items()
        },
        captions={name: referring.captions(facts) for name, facts in known.items()},
        view_captions={name: view_captions(facts, seed) for name, facts in known.items()},
        single=tuple(balance(single, seed)),
        views={name: facts.views for name, facts in known.items()},
    )


def conversation(scene: Scene, question: Question) -> dict[str, Any]:
    """One line: a conversation of two turns, with one ``<image>`` for each entry of ``images``, and plain fields."""
    views = question.views or tuple(range(len(scene.views)))
    alone = question.type in SINGLE_TYPES
    lines = ["<image>" * len(views), *(() if alone else (OPENING,)), question.text]
    if question.options:
        lines += ["Options:", *question.options, ASK_LETTER]
    else:
        lines.append(ASK_WORD if question.type in WORDS else ASK_NUMBER)
    return {
        **_exchange(question.id, scene, "\n".join(lines), question.answer, views),
        "question_type": question.type,
        "question": question.text,
        "options": list(question.options),
        "answer": question.answer,
    }


def caption_of_view(scene: Scene, caption: ViewCaption) -> dict[str, Any]:
    """One line: a conversation about one picture."""
    asked = f"<image>\n{caption.prompt}"
    return _exchange(f"{scene.id}/view/{caption.view}", scene, asked, caption.text, (caption.view,))


def caption_of_scene(scene: Scene, number: int, text: str, views: Sequence[int]) -> dict[str, Any]:
    """One line: a conversation that describes the whole place."""
    asked = "\n".join(["<image>" * len(views), OPENING, DESCRIBE[number % len(DESCRIBE)]])
    return _exchange(f"{scene.id}/caption/{number}", scene, asked, text, views)


def _exchange(name: str, scene: Scene, asked: str, answered: str, views: Sequence[int]) -> dict[str, Any]:
    return {
        "id": name,
        "scene": scene.id,
        "split": None if scene.split is None else str(scene.split),
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}],
        "images": [_image(scene.views[view].image) for view in views],
        "views": list(views),
    }


def _image(ref: ImageRef) -> str | dict[str, Any]:
    """A path, or for a frame of a video or a member of a container what names it."""
    named = {name: value for name, value in dataclasses.asdict(ref).items() if value is not None}
    return ref.path if set(named) == {"path"} else named


def write_jsonl(lines: Iterable[dict[str, Any]], path: Path) -> int:
    """Write JSON lines such that ``path`` holds either all of them or what it held before; returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def write_annotations(annotations: Annotations, folder: Path) -> dict[str, dict[str, BlindScore]]:
    """Write everything into ``folder``; returns the blind scores by split and question type, as in ``blind.jsonl``.

    Conversations for each split: ``questions-<split>.jsonl`` (about whole scenes), ``single-<split>.jsonl`` (about
    single pictures), ``views-<split>.jsonl`` (captions of single pictures) and ``scenes-<split>.jsonl`` (captions of
    whole scenes). For all of them: ``expressions.jsonl``, ``captions.jsonl``, ``blind.jsonl``.
    """
    by_split = _questions_by_split(annotations, annotations.questions)
    for file, asked in (("questions", by_split), ("single", _questions_by_split(annotations, annotations.single))):
        for name, questions in asked.items():
            lines = (conversation(annotations.scenes[scene_of(question)], question) for question in questions)
            write_jsonl(lines, folder / f"{file}-{name}.jsonl")
    scores = {name: blind_scores(questions) for name, questions in by_split.items()}
    write_jsonl(
        (
            {"scene": scene, "text": expression.text, "spans": [list(span) for span in expression.spans]}
            for scene, expressions in annotations.expressions.items()
            for expression in expressions
        ),
        folder / "expressions.jsonl",
    )
    for name, scenes in _by_split(annotations).items():
        write_jsonl(
            (caption_of_view(scene, one) for scene in scenes for one in annotations.view_captions[scene.id]),
            folder / f"views-{name}.jsonl",
        )
        write_jsonl(
            (
                caption_of_scene(scene, number, text, annotations.views[scene.id])
                for scene in scenes
                for number, text in enumerate(annotations.captions[scene.id])
            ),
            folder / f"scenes-{name}.jsonl",
        )
    write_jsonl(
        ({"scene": scene, "caption": text} for scene, texts in annotations.captions.items() for text in texts),
        folder / "captions.jsonl",
    )
    rows = [
        {"split": name, "type": kind, **dataclasses.asdict(score), "best": score.best}
        for name, by_type in scores.items()
        for kind, score in by_type.items()
    ]
    write_jsonl(rows, folder / "blind.jsonl")
    return scores


def _split_name(scene: Scene) -> str:
    return "all" if scene.split is None else str(scene.split)


def _questions_by_split(annotations: Annotations, questions: Sequence[Question]) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(_split_name(annotations.scenes[scene_of(question)]), []).append(question)
    return dict(sorted(found.items()))


def _by_split(annotations: Annotations) -> dict[str, list[Scene]]:
    found: dict[str, list[Scene]] = {}
    for scene in annotations.scenes.values():
        found.setdefault(_split_name(scene), []).append(scene)
    return found


def blind_table(scores: dict[str, dict[str, BlindScore]]) -> Sequence[str]:
    """Lines for a terminal: best score without images beside chance, by split and type."""
    lines = [f"{'split':<6} {'type':<28} {'questions':>9} {'chance':>7} {'blind':>7}  best strategy"]
    for split, by_type in scores.items():
        for kind, score in by_type.items():
            name = max(score.strategies, key=lambda key: score.strategies[key])
            lines.append(f"{split:<6} {kind:<28} {score.questions:>9} {score.chance:>7.3f} {score.best:>7.3f}  {name}")
    return lines


def run_questions(config: RunConfig, out: Path, progress: Callable[[str], None] | None = None) -> list[str]:
    """`loom3d data questions`: annotate all sources of the config below ``out/<source>``; returns lines to print."""
    from services.data.sources import open_sources

    lines: list[str] = []
    for name, manifest in open_sources(config).items():
        if config.data.sources[name].format == "questions":
            continue
        scenes = (manifest.scene(entry.id) for entry in manifest.entries if entry.kind == "scene")
        annotations = annotate((s for s in scenes if isinstance(s, Scene)), config.data.questions, progress)
        if not annotations.scenes:
            lines.append(f"{name}: no scene has instances with masks, no questions")
            continue
        scores = write_annotations(annotations, out / name)
        count = len(annotations.questions)
        lines.append(f"{name}: {count} questions about {len(annotations.scenes)} scenes in {out / name}")
        lines += blind_table(scores)
    return lines
