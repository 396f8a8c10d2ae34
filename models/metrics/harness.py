"""Scores and answers in the form of lmms-eval's files, so that what reads those reads ours. Pure functions.

``<time>_results.json`` holds ``results`` (task -> ``<metric>,none``), ``configs``, ``versions``, ``n-shot``,
``n-samples`` and so on; ``<time>_samples_<task>.jsonl`` one answer a line. How a benchmark was asked and read stands in
``configs.<task>.metadata``. Where the harness scales or names a score in its own way, the metric of that name does so;
the benchmark's own scores stand beside it under ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.metrics.vsibench import CHOICE_TYPES, NUMERIC_TYPES


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One question with what was answered."""

    id: str
    type: str
    question: str
    options: Sequence[str]
    prompt: str
    """All that was asked, as it was asked."""
    answer: str
    """The true one."""
    prediction: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark that was asked."""

    benchmark: str
    """Name of the scorer (:mod:`models.metrics.benchmarks`)."""
    replies: Sequence[Reply]
    scores: Mapping[str, float]
    """What the scorer computed."""
    headline: str
    possible: int
    """Questions that the benchmark has, of which ``replies`` may be a part."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    """How its answers were made, where that is not so for all tasks of a file."""


#: Scorer -> the harness's name of the task, and of its metric.
NAMES: Mapping[str, tuple[str, str]] = {
    "vsibench": ("vsibench", "vsibench_score"),
    "cvbench": ("cv_bench", "cv_bench_acc"),
    "sparbench": ("sparbench", "sparbench_score"),
    "viewspatial": ("viewspatial", "overall_accuracy"),
    "blink": ("blink", "blink_acc"),
    "seedbench": ("seedbench", "seed_image"),
    "realworldqa": ("realworldqa", "exact_match"),
}
_MRA = "MRA:.5:.95:.05"
_PERCENT = frozenset({"sparbench"})
"""Tasks whose metric the harness multiplies by 100."""


def task_name(benchmark: str) -> str:
    """The harness's name of a benchmark, ours where it has none."""
    return NAMES.get(benchmark, (benchmark, benchmark))[0]


def metric_name(benchmark: str) -> str:
    """The harness's name of the benchmark's metric."""
    return NAMES.get(benchmark, (benchmark, benchmark))[1]


def results(
    tasks: Sequence[Task], *, model: str, model_args: str, generation: Mapping[str, Any], date: str, seconds: float
) -> dict[str, Any]:
    """The content of ``<date>_results.json``.

    Args:
        tasks: what was asked, each benchmark once. ValueError for one that is there twice.
        model: name of what answered.
        model_args: how it can be found, as "key=value,...".
        generation: how the answers of all tasks were made.
        date: as in the file's name, e.g. 20260131_235959.
        seconds: that it took.
    """
    names = [task_name(task.benchmark) for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"a file of results has each task once, got {names}")
    by_name = dict(sorted(zip(names, tasks, strict=True)))
    return {
        "results": {name: _result(name, task) for name, task in by_name.items()},
        "group_subtasks": {name: [] for name in by_name},
        "configs": {name: _config(name, task, generation) for name, task in by_name.items()},
        "versions": dict.fromkeys(by_name, "Yaml"),
        "n-shot": dict.fromkeys(by_name, 0),
        "higher_is_better": {name: {metric_name(task.benchmark): True} for name, task in by_name.items()},
        "n-samples": {
            name: {"original": task.possible, "effective": len(task.replies)} for name, task in by_name.items()
        },
        "config": {"model": model, "model_args": model_args, "batch_size": None, "device": None, "use_cache": None,
                   "limit": None, "bootstrap_iters": 0, "gen_kwargs": dict(generation)},
        "git_hash": None,
        "date": date,
        "task_hashes": {name: _task_hash(task) for name, task in by_name.items()},
        "model_source": "loom3d",
        "model_name": model,
        "model_name_sanitized": sanitized(model),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": False,
        "chat_template": None,
        "chat_template_sha": None,
        "total_evaluation_time_seconds": str(seconds),
    }  # fmt: skip


def samples(task: Task) -> list[dict[str, Any]]:
    """The lines of ``<date>_samples_<task>.jsonl``."""
    return [
        {
            "doc_id": place,
            "target": reply.answer,
            "filtered_resps": [reply.prediction],
            "doc_hash": _doc_hash(reply),
            "prompt_hash": _hash(reply.prompt),
            "target_hash": _hash(reply.answer),
            metric_name(task.benchmark): _sample_metric(task.benchmark, reply),
            "input": reply.prompt,
        }
        for place, reply in enumerate(task.replies)
    ]


def sanitized(model: str) -> str:
    """The name of a model as the name of a folder."""
    return "".join("_" if letter in '"<>:/\\|?*[]' else letter for letter in model.replace("/", "__"))


def vsibench_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """VSI-Bench's scores under the harness's names; the three difficulties of relative direction are one there."""
    single = [kind for kind in CHOICE_TYPES if not kind.startswith("object_rel_direction")]
    named = {f"{kind}_accuracy": kind for kind in (*single, "object_rel_direction")}
    named |= {f"{kind}_{_MRA}": kind for kind in NUMERIC_TYPES} | {"overall": "overall"}
    return {name: scores[kind] for name, kind in named.items() if kind in scores}


def _result(name: str, task: Task) -> dict[str, Any]:
    metric = metric_name(task.benchmark)
    value: Any = task.scores.get(task.headline)
    if task.benchmark == "vsibench":
        value = vsibench_scores(task.scores)
    elif value is not None and task.benchmark in _PERCENT:
        value = 100 * value
    own = {f"{score},none": found for score, found in task.scores.items()}
    return {"alias": name, **own, f"{metric},none": value, f"{metric}_stderr,none": "N/A"}


def _config(name: str, task: Task, generation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": name,
        "test_split": "test",
        "num_fewshot": 0,
        "output_type": "generate_until",
        "generation_kwargs": {**generation, **task.generation},
        "metric_list": [{"metric": metric_name(task.benchmark), "higher_is_better": True}],
        "metadata": dict(task.protocol),
    }


def _sample_metric(benchmark: str, reply: Reply) -> dict[str, Any]:
    """What the harness's scorer of a single answer returns, with the fields that it was made from."""
    if benchmark == "vsibench":
        score = {_MRA if reply.type in NUMERIC_TYPES else "accuracy": reply.score}
        return {**_document(reply), "question_type": reply.type, "prediction": reply.prediction, **score}
    return {"id": reply.id, "type": reply.type, "answer": reply.answer, "prediction": reply.prediction,
            "score": reply.score}  # fmt: skip


def _document(reply: Reply) -> dict[str, Any]:
    return {
        "id": reply.id,
        "question": reply.question,
        "options": list(reply.options) or None,
        "ground_truth": reply.answer,
    }


def _doc_hash(reply: Reply) -> str:
    return _hash(json.dumps({**_document(reply), "type": reply.type}, indent=2, ensure_ascii=False))


def _task_hash(task: Task) -> str:
    return _hash("".join(f"sample_{place}{_doc_hash(reply)}" for place, reply in enumerate(task.replies)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
