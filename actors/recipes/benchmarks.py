"""What stands beside the scores of a benchmark, whichever recipe answered: how it was asked, and files for others.

Every score of answers carries its protocol: the frames that were shown and how they were chosen, the form of the
prompt, the reader of the answers. Benchmarks' answers are also written in the form of lmms-eval's files.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import RunConfig
from models.metrics import harness
from models.metrics.benchmarks import BENCHMARKS, Scorer
from services.contracts import Question
from services.data.readers.benchmarks import protocol

FOLDER = "lmms_eval"
"""Below the run folder."""
GREEDY: Mapping[str, Any] = {"do_sample": False, "temperature": 0, "num_beams": 1}
"""How answers are decoded, in the harness's words."""
OWN_PROMPT = "the last user's turn of the conversation"
OWN_PICTURES = "all pictures of the conversation, in order"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question as it was asked, and the answer in words."""

    question: Question
    prompt: str
    pictures: int
    prediction: str


def is_benchmark(config: RunConfig, source: str) -> bool:
    """Whether a source is a published benchmark, in its own files."""
    return config.data.sources[source].format == "benchmark"


def longest_answer(config: RunConfig, source: str) -> int:
    """Tokens that an answer to a question of a source may have.

    A published benchmark has a limit of its own, or ``options.max_new_tokens`` of the source; all others, and those
    that state none, have the run's ``generate.max_new_tokens``.
    """
    own: int = protocol(config.data.sources[source].options)["max_new_tokens"] if is_benchmark(config, source) else 0
    return own or config.generate.max_new_tokens


def protocol_of(
    config: RunConfig, source: str, benchmark: str, answered: Sequence[Answered], *, possible: int
) -> dict[str, Any]:
    """How the questions of a source were asked and their answers read; stands beside every score of them.

    Args:
        config: the run.
        source: of the questions.
        benchmark: whose scores they get.
        answered: the questions that were asked.
        possible: questions that there are.

    Returns:
        ``benchmark``, ``parser``, ``prompt``, ``system``, ``frame_choice``, ``frames_at_most`` (benchmarks only),
        ``frames`` (pictures shown -> questions), ``decoding``, ``max_new_tokens``, ``questions``, ``of``.
    """
    asked: dict[str, Any] = {"prompt": OWN_PROMPT, "frame_choice": OWN_PICTURES}
    if is_benchmark(config, source):
        told = protocol(config.data.sources[source].options)
        asked = {"prompt": told["prompt"], "frame_choice": told["frame_choice"], "frames_at_most": told["frames"]}
    shown = Counter(one.pictures for one in answered)
    return {
        "benchmark": benchmark,
        "parser": BENCHMARKS[benchmark].parser,
        **asked,
        "system": config.data.text.system,
        "frames": {str(count): shown[count] for count in sorted(shown)},
        "decoding": "greedy",
        "max_new_tokens": longest_answer(config, source),
        "questions": len(answered),
        "of": possible,
    }


def harness_task(
    benchmark: str, found: Scorer, answered: Sequence[Answered], described: Mapping[str, Any], *, possible: int
) -> harness.Task:
    """A benchmark's answers and scores as the harness's files hold them."""
    replies = [
        harness.Reply(
            id=one.question.id,
            type=one.question.type,
            question=one.question.text,
            options=one.question.options,
            prompt=one.prompt,
            answer=one.question.answer,
            prediction=one.prediction,
            score=found.rows[one.question.id][1],
        )
        for one in answered
    ]
    return harness.Task(
        benchmark=benchmark,
        replies=replies,
        scores=found.compute(),
        headline=found.headline,
        possible=possible,
        protocol=described,
        generation={**GREEDY, "max_new_tokens": described["max_new_tokens"]},
    )


def write_harness(run: Path, config: RunConfig, tasks: Sequence[harness.Task], *, seconds: float = 0.0) -> list[Path]:
    """Write ``<run>/lmms_eval/<model>/<time>_results.json`` and ``<time>_samples_<task>.jsonl``; returns their paths.

    A task that is there twice (two sources of one benchmark) gets a file of results for each time.
    """
    folder = run / FOLDER / harness.sanitized(run.name)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for group in _each_once(tasks):
        date = _free_time(folder)
        content = harness.results(
            group,
            model=run.name,
            model_args=f"pretrained={run},recipe={config.recipe.name},size={config.size}",
            generation=GREEDY,
            date=date,
            seconds=seconds,
        )
        for task in group:
            lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in harness.samples(task))
            written.append(_write(folder / f"{date}_samples_{harness.task_name(task.benchmark)}.jsonl", lines))
        written.append(_write(folder / f"{date}_results.json", json.dumps(content, indent=2, ensure_ascii=False)))
    return written


def _each_once(tasks: Sequence[harness.Task]) -> list[list[harness.Task]]:
    groups: list[list[harness.Task]] = []
    for task in tasks:
        name = harness.task_name(task.benchmark)
        for group in groups:
            if all(harness.task_name(other.benchmark) != name for other in group):
                group.append(task)
                break
        else:
            groups.append([task])
    return groups


def _free_time(folder: Path) -> str:
    """The time as the harness writes it; a later second where files of this one are there."""
    now = time.time()
    while True:
        date = time.strftime("%Y%m%d_%H%M%S", time.gmtime(now))
        if not (folder / f"{date}_results.json").exists():
            return date
        now += 1


def _write(path: Path, text: str) -> Path:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
