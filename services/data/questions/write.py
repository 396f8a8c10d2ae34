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

OPENING = "The pictures were taken one after the other on a walk through one place."
ASK_NUMBER = "Answer with the number alone."
ASK_LETTER = "Answer with the letter of the right option alone."


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """All that was made for a source, by scene id; ``questions`` are balanced over the source."""

    scenes: dict[str, Scene]
    questions: tuple[Question, ...]
    expressions: dict[str, tuple[ReferringExpression, ...]]
    captions: dict[str, tuple[str, ...]]

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
    kept: dict[str, Scene] = {}
    drafts: list[Draft] = []
    expressions, captions = {}, {}
    for scene in scenes:
        if not scene.instances or all(view.instance_path is None for view in scene.views):
            continue
        facts = gather(scene, config)
        kept[scene.id] = scene
        drafts += draft_questions(facts, config)
        expressions[scene.id] = tuple(referring.referring_expressions(facts, config.seed, 2 * config.per_scene))
        captions[scene.id] = referring.captions(facts)
        if progress is not None:
            progress(scene.id)
    questions = tuple(balance(drafts, config.seed))
    return Annotations(scenes=kept, questions=questions, expressions=expressions, captions=captions)


def conversation(scene: Scene, question: Question) -> dict[str, Any]:
    """One line: a conversation of two turns, with one ``<image>`` for each entry of ``images``, and plain fields."""
    views = question.views or tuple(range(len(scene.views)))
    lines = ["<image>" * len(views), OPENING, question.text]
    if question.options:
        lines += ["Options:", *question.options, ASK_LETTER]
    else:
        lines.append(ASK_NUMBER)
    return {
        "id": question.id,
        "scene": scene.id,
        "split": None if scene.split is None else str(scene.split),
        "question_type": question.type,
        "conversations": [
            {"from": "human", "value": "\n".join(lines)},
            {"from": "gpt", "value": question.answer},
        ],
        "options": list(question.options),
        "answer": question.answer,
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
    """Write ``questions-<split>.jsonl``, ``expressions.jsonl``, ``captions.jsonl`` and ``blind.jsonl`` into ``folder``.

    Returns the blind scores by split and question type, as in ``blind.jsonl``.
    """
    by_split: dict[str, list[Question]] = {}
    for question in annotations.questions:
        split = annotations.scenes[scene_of(question)].split
        by_split.setdefault("all" if split is None else str(split), []).append(question)
    for name, questions in sorted(by_split.items()):
        lines = (conversation(annotations.scenes[scene_of(question)], question) for question in questions)
        write_jsonl(lines, folder / f"questions-{name}.jsonl")
    scores = {name: blind_scores(questions) for name, questions in sorted(by_split.items())}
    write_jsonl(
        (
            {"scene": scene, "text": expression.text, "spans": [list(span) for span in expression.spans]}
            for scene, expressions in annotations.expressions.items()
            for expression in expressions
        ),
        folder / "expressions.jsonl",
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
