"""The form of lmms-eval's files, against what that harness writes for the same answers."""

from __future__ import annotations

import hashlib
import json

import pytest

from models.metrics import harness
from models.metrics.benchmarks import BENCHMARKS, scorer
from models.metrics.harness import Reply, Task
from models.metrics.vsibench import QUESTION_TYPES

#: Keys of a results file, and of a line of samples, as the harness's tracker writes them.
RESULT_KEYS = {
    "results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "git_hash",
    "date", "task_hashes", "model_source", "model_name", "model_name_sanitized", "system_instruction",
    "system_instruction_sha", "fewshot_as_multiturn", "chat_template", "chat_template_sha",
    "total_evaluation_time_seconds",
}  # fmt: skip
SAMPLE_KEYS = {"doc_id", "target", "filtered_resps", "doc_hash", "prompt_hash", "target_hash", "input"}


def reply(name: str, kind: str, answer: str, prediction: str, score: float) -> Reply:
    return Reply(
        id=name, type=kind, question="How many?", options=(), prompt="These are frames.\nHow many?", answer=answer,
        prediction=prediction, score=score,
    )  # fmt: skip


def task(benchmark: str, *replies: tuple[str, str, str], possible: int = 10) -> Task:
    found = scorer(benchmark)
    scored = [
        reply(str(n), kind, answer, given, found.add(id=str(n), type=kind, answer=answer, prediction=given))
        for n, (kind, answer, given) in enumerate(replies)
    ]
    protocol = {"parser": BENCHMARKS[benchmark].parser, "frames": {"32": len(scored)}}
    return Task(
        benchmark=benchmark, replies=scored, scores=found.compute(), headline=found.headline, possible=possible,
        protocol=protocol,
    )  # fmt: skip


def results(*tasks: Task) -> dict[str, object]:
    return harness.results(
        tasks, model="spa3/vlm", model_args="pretrained=x", generation={"max_new_tokens": 16}, date="20260131_235959",
        seconds=2.5,
    )  # fmt: skip


def test_vsibench_has_the_harnesss_names() -> None:
    whole = task("vsibench", *((kind, "4", "4") for kind in QUESTION_TYPES))
    found = results(whole)
    assert set(found) == RESULT_KEYS
    score = found["results"]["vsibench"]["vsibench_score,none"]  # type: ignore[index]
    assert score == {
        "object_rel_distance_accuracy": 1.0, "route_planning_accuracy": 1.0, "obj_appearance_order_accuracy": 1.0,
        "object_rel_direction_accuracy": 1.0, "object_counting_MRA:.5:.95:.05": 1.0,
        "object_abs_distance_MRA:.5:.95:.05": 1.0, "object_size_estimation_MRA:.5:.95:.05": 1.0,
        "room_size_estimation_MRA:.5:.95:.05": 1.0, "overall": 1.0,
    }  # fmt: skip
    assert found["results"]["vsibench"]["vsibench_score_stderr,none"] == "N/A"  # type: ignore[index]
    assert found["n-samples"] == {"vsibench": {"original": 10, "effective": 10}}
    assert found["configs"]["vsibench"]["metadata"]["frames"] == {"32": 10}  # type: ignore[index]
    assert (found["model_name"], found["model_name_sanitized"]) == ("spa3/vlm", "spa3__vlm")
    assert json.loads(json.dumps(found)) == found


def test_a_part_of_a_benchmark_has_no_overall() -> None:
    found = results(task("vsibench", ("object_counting", "4", "3")))["results"]["vsibench"]  # type: ignore[index]
    assert found["vsibench_score,none"] == {"object_counting_MRA:.5:.95:.05": pytest.approx(0.6)}
    assert found["object_counting,none"] == pytest.approx(0.6)


def test_several_tasks_in_one_file_each_once() -> None:
    cv = task("cvbench", ("ADE20K/Count", "A", "A"), ("COCO/Count", "A", "B"), ("Omni3D/Depth", "B", "(B)"))
    spatial = task("viewspatial", ("Camera perspective - Relative Direction", "A", "A"))
    found = results(spatial, cv)
    assert list(found["results"]) == ["cv_bench", "viewspatial"]  # type: ignore[call-overload]
    assert found["results"]["cv_bench"]["cv_bench_acc,none"] == 0.75  # type: ignore[index]
    assert found["results"]["viewspatial"]["overall_accuracy,none"] is None  # type: ignore[index]
    assert found["results"]["viewspatial"]["accuracy,none"] == 1.0  # type: ignore[index]
    assert found["higher_is_better"]["cv_bench"] == {"cv_bench_acc": True}  # type: ignore[index]
    with pytest.raises(ValueError, match=r"has each task once, got \['cv_bench', 'cv_bench'\]"):
        results(cv, cv)


def test_sparbench_is_scaled_as_the_harness_scales_it() -> None:
    whole = Task(benchmark="sparbench", replies=(), scores={"overall": 0.584}, headline="overall", possible=7000)
    found = results(whole)["results"]["sparbench"]  # type: ignore[index]
    assert (found["sparbench_score,none"], found["overall,none"]) == (58.4, 0.584)


def test_lines_of_samples() -> None:
    one = task("vsibench", ("object_counting", "4", "3"), ("route_planning", "B", "b. left"))
    first, second = harness.samples(one)
    assert set(first) == SAMPLE_KEYS | {"vsibench_score"}
    assert (first["doc_id"], first["target"], first["filtered_resps"]) == (0, "4", ["3"])
    assert first["vsibench_score"]["MRA:.5:.95:.05"] == pytest.approx(0.6)
    assert first["vsibench_score"]["question_type"] == "object_counting"
    assert second["vsibench_score"]["accuracy"] == 1.0
    assert first["prompt_hash"] == hashlib.sha256(b"These are frames.\nHow many?").hexdigest()
    assert first["target_hash"] == hashlib.sha256(b"4").hexdigest()
    hashes = "".join(f"sample_{n}{line['doc_hash']}" for n, line in enumerate((first, second)))
    assert results(one)["task_hashes"] == {"vsibench": hashlib.sha256(hashes.encode()).hexdigest()}
    (line,) = harness.samples(task("cvbench", ("COCO/Count", "A", "B")))
    assert line["cv_bench_acc"] == {"id": "0", "type": "COCO/Count", "answer": "A", "prediction": "B", "score": 0.0}
