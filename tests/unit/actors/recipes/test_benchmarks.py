"""What is recorded beside the scores of a benchmark, and the files that others read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from actors.recipes import uniugg_answers
from actors.recipes.benchmarks import (
    OWN_PICTURES,
    OWN_PROMPT,
    Answered,
    harness_task,
    longest_answer,
    protocol_of,
    write_harness,
)
from actors.recipes.pictures import Album
from actors.recipes.uniugg_answers import Asked, judge_answers
from configs import ConfigError, RunConfig
from configs.schema import DataConfig, GenerateConfig, SourceConfig, TextConfig
from models.metrics.benchmarks import scorer
from models.metrics.vsibench import QUESTION_TYPES
from services.contracts import ImageRef, Item, Question, Split, Turn

CONFIG = RunConfig(
    generate=GenerateConfig(max_new_tokens=50),
    data=DataConfig(
        text=TextConfig(system="You see rooms."),
        sources={
            "vsi": SourceConfig(format="benchmark", root="/b", options={"name": "vsibench", "frames": 8}),
            "again": SourceConfig(format="benchmark", root="/c", options={"name": "vsibench"}),
            "own": SourceConfig(format="questions", root="/q"),
        },
    ),
)


def question(name: str, kind: str, answer: str = "4") -> Question:
    return Question(id=name, type=kind, text="How many chairs?", answer=answer)


def answered(name: str, kind: str, prediction: str, pictures: int = 8) -> Answered:
    return Answered(question=question(name, kind), prompt="How many chairs?", pictures=pictures, prediction=prediction)


def test_a_protocol_says_frames_prompt_and_parser() -> None:
    replies = [
        answered("a", "object_counting", "4"),
        answered("b", "object_counting", "3", 5),
        answered("c", "x", "", 8),
    ]
    told = protocol_of(CONFIG, "vsi", "vsibench", replies, possible=5130)
    assert told["frames"] == {"5": 1, "8": 2}
    assert (told["frames_at_most"], told["questions"], told["of"]) == (8, 3, 5130)
    assert told["frame_choice"].startswith("frames of a video at linspace(0, frames - 1, n)")
    assert told["prompt"].startswith("These are frames of a video.\n{question}")
    assert "float() of it (the benchmark's own reader)" in told["parser"]
    assert (told["system"], told["decoding"]) == ("You see rooms.", "greedy")
    assert told["max_new_tokens"] == 16, "as published, not as the run has it"
    other = protocol_of(CONFIG, "own", "plain", replies, possible=3)
    assert (other["prompt"], other["frame_choice"]) == (OWN_PROMPT, OWN_PICTURES)
    assert "frames_at_most" not in other
    assert other["max_new_tokens"] == 50


def test_the_limit_of_a_benchmark_can_be_set() -> None:
    def longest(**options: Any) -> int:
        source = SourceConfig(format="benchmark", root="/b", options=options)
        return longest_answer(replace(CONFIG, data=DataConfig(sources={"asked": source})), "asked")

    assert longest(name="vsibench") == 16
    assert longest(name="vsibench", max_new_tokens=128) == 128
    assert longest(name="blink") == 50, "which states none"
    assert longest(name="blink", max_new_tokens=8) == 8
    with pytest.raises(ConfigError, match=r"options\.max_new_tokens=-1 must be a whole number of at least 0"):
        longest(name="vsibench", max_new_tokens=-1)


def test_files_of_the_harness(tmp_path: Path) -> None:
    found = scorer("vsibench")
    replies = [answered(str(n), kind, "4") for n, kind in enumerate(QUESTION_TYPES)]
    for one in replies:
        found.add(id=one.question.id, type=one.question.type, answer="4", prediction="4")
    told = protocol_of(CONFIG, "vsi", "vsibench", replies, possible=20)
    task = harness_task("vsibench", found, replies, told, possible=20)
    run = tmp_path / "spa3_vlm-tiny"
    samples, results = write_harness(run, CONFIG, [task], seconds=1.0)
    assert results.parent == samples.parent == run / "lmms_eval/spa3_vlm-tiny"
    date = results.name.removesuffix("_results.json")
    assert samples.name == f"{date}_samples_vsibench.jsonl"
    assert len(date) == len("20260131_235959")
    content = json.loads(results.read_text())
    assert content["results"]["vsibench"]["vsibench_score,none"]["overall"] == 1.0
    assert content["n-samples"]["vsibench"] == {"original": 20, "effective": 10}
    assert content["configs"]["vsibench"]["metadata"]["frames"] == {"8": 10}
    assert content["configs"]["vsibench"]["generation_kwargs"] == {
        "do_sample": False, "temperature": 0, "num_beams": 1, "max_new_tokens": 16
    }  # fmt: skip
    assert "max_new_tokens" not in content["config"]["gen_kwargs"], "tasks differ in it"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["vsibench_score"]["id"] for line in lines] == [str(n) for n in range(10)]
    # Two sources of one benchmark, and a second evaluation, overwrite nothing.
    more = write_harness(run, CONFIG, [task, task])
    assert len({samples, results, *more}) == 6
    assert len(list(results.parent.glob("*_results.json"))) == 3


def test_answers_are_as_long_as_their_source_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sources ask about the same pictures, one of them a benchmark with a limit of its own."""
    limits: list[int] = []

    def generate(_: Any, prompts: Sequence[Any], __: Any, *, max_new_tokens: int, device: str) -> list[list[int]]:
        limits.append(max_new_tokens)
        return [[7]] * len(prompts)

    texts = SimpleNamespace(decode=str)
    reader = cast("Any", SimpleNamespace(prompt=lambda *_: [1], generate=generate, texts=texts))
    turns = (Turn(role="user", text="How many chairs?"), Turn(role="assistant", text="4"))
    item = Item(id="0", images=(ImageRef(path="/v.mp4", frame=0),), turns=turns)
    asked = [Asked(source=name, item=item, question=question(name, "object_counting")) for name in ("vsi", "own")]
    monkeypatch.setattr(uniugg_answers, "_without_text", lambda judge: judge)
    monkeypatch.setattr(
        uniugg_answers, "load_samples", lambda _, chosen, **__: [({"weight": [1.0]}, (one,)) for one in chosen]
    )
    judge = cast("Any", SimpleNamespace(config=CONFIG))
    found = uniugg_answers.answer(torch.nn.Identity(), asked, judge, reader, split=Split.TEST, device="cpu")
    assert found == {"vsi": "[7]", "own": "[7]"}
    assert limits == [16, 50]


def test_an_evaluation_of_a_benchmark_reports_both_readers_and_writes_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of ten answers are number words, which the benchmark's own reader does not know."""

    def asked(source: str) -> list[Asked]:
        kinds = [*QUESTION_TYPES, "object_counting"]
        images = tuple(ImageRef(path="/v.mp4", frame=n) for n in range(8))
        turns = (Turn(role="user", text="How many chairs?"), Turn(role="assistant", text="4"))
        return [
            Asked(source=source, item=Item(id=str(n), images=images, turns=turns), question=question(str(n), kind))
            for n, kind in enumerate(kinds)
        ]

    def answers(_: Any, questions: Sequence[Asked], *__: Any, **___: Any) -> dict[str, str]:
        said = {"object_counting": "four", "room_size_estimation": "four"}
        return {one.question.id: said.get(one.question.type, "4") for one in questions}

    sources = {"vsi": asked("vsi"), "own": asked("own")}
    monkeypatch.setattr(uniugg_answers, "questions_of", lambda _, split: sources if split == Split.TEST else {})
    monkeypatch.setattr(uniugg_answers, "answer", answers)
    judge, reader = cast("Any", SimpleNamespace(config=CONFIG)), cast("Any", SimpleNamespace())
    models = {"trained": torch.nn.Identity()}
    metrics = judge_answers(models, judge, Album(tmp_path), split=Split.TEST, device="cpu", reader=reader)
    strict, words = metrics["answers/vsibench (vsi)"], metrics["answers/vsibench (vsi) as vsibench-words"]
    # Two of eight tasks score nothing by the strict reader.
    assert (strict["value"], words["value"]) == (0.75, 1.0)
    assert strict["protocol"]["benchmark"] == "vsibench"
    assert words["protocol"]["benchmark"] == "vsibench-words"
    assert strict["protocol"]["parser"] != words["protocol"]["parser"]
    assert strict["protocol"]["frames"] == words["protocol"]["frames"] == {"8": 11}
    own = metrics["answers/vsibench (own)"]
    assert own["protocol"]["prompt"] == OWN_PROMPT
    assert not any("own" in name and "words" in name for name in metrics)
    (results,) = tmp_path.glob("lmms_eval/*/*_results.json")
    score = json.loads(results.read_text())["results"]["vsibench"]["vsibench_score,none"]
    assert (score["overall"], score["object_counting_MRA:.5:.95:.05"]) == (0.75, 0.0)
    (samples,) = tmp_path.glob("lmms_eval/*/*_samples_vsibench.jsonl")
    assert len(samples.read_text().splitlines()) == 11
    assert json.loads(json.dumps(metrics)) == metrics
