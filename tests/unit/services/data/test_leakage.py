"""Training data is held against the scenes of evaluation sets: by their names in paths, in lists and in benchmarks."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import configs
from configs import ConfigError, RunConfig
from configs.schema import DataConfig, EncoderConfig, SourceConfig, StorageConfig
from services.data.checks import EvaluationSet, Fault, run_check
from services.data.checks.evaluation_sets import scenes_in
from services.data.leakage import find_leaks, refuse_leaks
from services.data.manifest import Manifest
from services.data.sources import open_sources
from services.errors import DataError
from tests.support.films import write_video
from tests.support.layouts import save_color

VSI = {"question_type": "object_counting", "question": "How many chairs?", "ground_truth": "4", "options": None}
QUESTIONS = [
    {"id": 0, "dataset": "scannet", "scene_name": "scene0011_00", **VSI},
    {"id": 1, "dataset": "arkitscenes", "scene_name": "41069021", **VSI},
    {"id": 2, "dataset": "scannetpp", "scene_name": "09c1414f1b", **VSI},
]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def folders(root: Path, *names: str) -> Path:
    """Videos as folders of two frames each."""
    for place, name in enumerate(names):
        for number in range(2):
            save_color(root / name / f"{number}.png", np.full((4, 4, 3), 20 * place + number, np.uint8))
    return root


def talk(video: str, split: str = "train") -> dict[str, Any]:
    turns = [{"from": "human", "value": "<video>How many?"}, {"from": "gpt", "value": "four"}]
    return {"id": video, "video": video, "split": split, "conversations": turns}


def corpus(root: Path, *videos: str, name: str = "a.jsonl", **splits: str) -> SourceConfig:
    folders(root, *videos)
    path = write_lines(root / name, [talk(video, splits.get(video, "train")) for video in videos])
    return SourceConfig(format="corpus", root=str(path))


def run(tmp_path: Path, sources: dict[str, SourceConfig], **data: Any) -> RunConfig:
    return RunConfig(
        storage=StorageConfig(root=str(tmp_path / "root")), data=DataConfig(sources=sources, max_broken=0.9, **data)
    )


def opened(config: RunConfig) -> dict[str, Manifest]:
    return open_sources(config)


@pytest.mark.parametrize(
    ("path", "scenes"),
    [
        ("scannet/scene0011_00.mp4", {"scene0011_00"}),
        ("ScanNet_v2/scans/Scene0191_02/color/000123.jpg", {"scene0191_02"}),
        ("spar/scannet_scene0000_01_120.jpg", {"scene0000_01"}),
        ("scannetpp/09c1414f1b/dslr/undistorted_images/DSC00021.JPG", {"09c1414f1b"}),
        ("arkitscenes/41069021.mp4", {"41069021"}),
        ("raw/Training/48458489/lowres_wide/48458489_3512.1.png", {"48458489"}),
        ("coco/000000041069.jpg", set()),
        ("scene00110_00/20240101/1.jpg", set()),
        ("0a9c1414f1b2/5.jpg", set()),
    ],
)
def test_scenes_are_told_by_their_ids_in_paths(path: str, scenes: set[str]) -> None:
    assert scenes_in(path) == scenes


def test_evaluation_sets_are_read_in_the_forms_of_their_files(tmp_path: Path) -> None:
    everything = frozenset({"scene0011_00", "41069021", "09c1414f1b"})
    lines = write_lines(tmp_path / "vsi/test.jsonl", QUESTIONS)
    assert EvaluationSet.read("vsi", lines).ids == everything
    pq.write_table(pa.Table.from_pylist(QUESTIONS), tmp_path / "test.parquet")
    assert EvaluationSet.read("vsi", tmp_path / "test.parquet").ids == everything
    named = [
        {"image_path": ["ViewSpatial-Bench/scannetv2_val/scene0011_00/original_images/280.jpg"]},
        {"video": "a.mp4"},
    ]
    (tmp_path / "view.json").write_text(json.dumps(named))
    assert EvaluationSet.read("view", tmp_path / "view.json").ids == {"scene0011_00"}
    # The official lists: one id a line for ScanNet and ScanNet++, a table for ARKitScenes.
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "scannetv2_val.txt").write_text("scene0011_00\nscene0015_00\n")
    (splits / "nvs_sem_val.txt").write_text("09c1414f1b\n")
    (splits / "3dod.csv").write_text("video_id,visit_id,fold\n41069021,1,Validation\n47333462,2,Training\n")
    (splits / "readme.md").write_text("scene0099_00")
    assert EvaluationSet.read("vsi", splits).ids == everything | {"scene0015_00"}


def test_evaluation_sets_that_name_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.jsonl").write_text("{broken\n")
    (tmp_path / "c.csv").write_text("id,kind\n1,2\n")
    (tmp_path / "d.json").write_text('[{"video": "kitchen.mp4"}]')
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.json", "must hold a list of records, holds dict"),
        ("b.jsonl", r"b\.jsonl: broken JSON"),
        ("c.csv", r"has a column of scene_name, .* and one of fold, split; this one has \['id', 'kind'\]"),
        ("d.json", "names no scene of the evaluation set 'bench'"),
        ("empty", "names no scene of the evaluation set 'bench'"),
        ("gone.json", "cannot be read"),
        ("gone.txt", "the list of ids cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            EvaluationSet.read("bench", tmp_path / name)


def test_training_on_scenes_of_a_benchmark_among_the_sources_is_refused_unless_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The three data sets of VSI-Bench's videos, and a second scan of one of its rooms."""
    for question in QUESTIONS:
        video = tmp_path / "vsi" / str(question["dataset"]) / f"{question['scene_name']}.mp4"
        write_video(video, [np.full((16, 16, 3), 9, np.uint8)] * 4)
    write_lines(tmp_path / "vsi/test.jsonl", QUESTIONS)
    bench = SourceConfig(format="benchmark", root=str(tmp_path / "vsi"), options={"name": "vsibench"})
    leaky = corpus(
        tmp_path / "train",
        "scannet/scene0011_01",
        "scannetpp/09c1414f1b",
        "arkitscenes/41069021",
        "scannet/scene0012_00",
    )
    fair = corpus(tmp_path / "fair", "scannet/scene0012_00")
    config = run(tmp_path, {"vsibench": bench, "qa": leaky, "fair": fair})
    manifests = opened(config)
    (leak,) = find_leaks(config, manifests)
    assert (leak.source, leak.evaluation) == ("source 'qa'", "vsibench")
    assert leak.scenes == ("09c1414f1b", "41069021", "scene0011_01")
    with pytest.raises(DataError) as caught:
        refuse_leaks(config, manifests)
    assert str(caught.value).splitlines()[1] == (
        "  - source 'qa' trains on 3 scenes of the evaluation set 'vsibench' (09c1414f1b, 41069021, scene0011_01)"
    )
    assert "data.allow_leak=[vsibench]" in str(caught.value)
    allowed = dataclasses.replace(config, data=dataclasses.replace(config.data, allow_leak=["vsibench"]))
    with caplog.at_level(logging.WARNING, "loom3d"):
        assert refuse_leaks(allowed, manifests) == [leak]
    assert "scores on vsibench are no held-out scores" in caplog.text
    alone = {name: manifests[name] for name in ("vsibench", "fair")}
    assert refuse_leaks(run(tmp_path, {"vsibench": bench, "fair": fair}), alone) == []


def test_only_what_is_trained_on_counts(tmp_path: Path) -> None:
    held_out = tmp_path / "val.txt"
    held_out.write_text("scene0011_00\n")
    source = corpus(tmp_path / "train", "scannet/scene0011_00", "scannet/scene0012_00")
    config = run(tmp_path, {"qa": source}, evaluation_sets={"val": str(held_out)})
    assert [leak.scenes for leak in find_leaks(config, opened(config))] == [("scene0011_00",)]
    unused = run(tmp_path, {"qa": dataclasses.replace(source, weight=0.0)}, evaluation_sets={"val": str(held_out)})
    assert find_leaks(unused, opened(unused)) == []
    (tmp_path / "out.txt").write_text("qa/scannet/scene0011_00\n")
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, quarantine=str(tmp_path / "out.txt")))
    assert find_leaks(without, opened(without)) == []
    judged = corpus(tmp_path / "judged", "scannet/scene0011_00", **{"scannet/scene0011_00": "val"})
    validated = run(tmp_path, {"qa": judged}, evaluation_sets={"val": str(held_out)})
    assert find_leaks(validated, opened(validated)) == []


def test_scenes_of_frames_and_names_of_other_lists(tmp_path: Path) -> None:
    folders(tmp_path / "walks", "scene0011_00", "kitchen_7", "hall")
    for name, lines in (("scannet", "scene0011_02\n"), ("own", "Kitchen_7\n")):
        (tmp_path / f"{name}.txt").write_text(lines)
    every = tmp_path / "train.txt"
    every.write_text("scene0011_00 kitchen_7 hall")
    source = SourceConfig(format="images", root=str(tmp_path / "walks"), splits={"train": str(every)})
    sets = {name: str(tmp_path / f"{name}.txt") for name in ("scannet", "own")}
    config = run(tmp_path, {"walks": source}, evaluation_sets=sets)
    found = {leak.evaluation: leak.scenes for leak in find_leaks(config, opened(config))}
    assert found == {"scannet": ("scene0011_00",), "own": ("kitchen_7",)}


def test_what_earlier_runs_trained_on_counts_too(tmp_path: Path) -> None:
    """An encoder that was trained on the scenes of a benchmark carries them into every run that reads it."""
    first = run(tmp_path, {"qa": corpus(tmp_path / "train", "scannet/scene0011_00")})
    opened(first)
    folder = tmp_path / "root/runs/first"
    (folder / "weights/encoder").mkdir(parents=True)
    # The saved form of a run's configuration; only its data matter here.
    saved = configs.load([f"storage.root={tmp_path}/root", "data.sources={}", "+data.sources.qa.format=corpus",
                          f"+data.sources.qa.root={tmp_path}/train/a.jsonl", "data.max_broken=0.9"])  # fmt: skip
    (folder / "config.yaml").write_text(configs.to_yaml(saved))
    (tmp_path / "val.txt").write_text("scene0011_00\n")
    second = dataclasses.replace(
        run(
            tmp_path,
            {"qa": corpus(tmp_path / "other", "scannet/scene0012_00")},
            evaluation_sets={"v": str(tmp_path / "val.txt")},
        ),
        encoders={"vit": EncoderConfig(weights=str(folder / "weights/encoder"))},
    )
    with pytest.raises(DataError, match="run 'first', which this one starts from, source 'qa' trains on 1 scenes"):
        refuse_leaks(second, opened(second))


def test_data_check_reports_them(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("scene0011_00\n")
    source = corpus(tmp_path / "train", "scannet/scene0011_00", "scannet/scene0011_03", "scannet/scene0012_00")
    config = run(tmp_path, {"qa": source}, evaluation_sets={"val": str(tmp_path / "val.txt")})
    (report,) = run_check(config, tmp_path / "out")
    found = {finding.scene: finding.reason for finding in report.findings if finding.fault is Fault.EVALUATION}
    assert found == {
        "scannet/scene0011_00": "the scene scene0011_00 is in the evaluation set val",
        "scannet/scene0011_03": (
            "scene0011_03 is another scan of the room of scene0011_00, which is in the evaluation set val"
        ),
    }
    # The list that it writes is the remedy that the refusal names.
    quarantine = str(tmp_path / "out/qa/quarantine.txt")
    remedied = dataclasses.replace(config, data=dataclasses.replace(config.data, quarantine=quarantine))
    assert refuse_leaks(remedied, opened(remedied)) == []
    allowed = dataclasses.replace(config, data=dataclasses.replace(config.data, allow_leak=["val"]))
    (report,) = run_check(allowed, tmp_path / "out")
    assert report.counts[Fault.EVALUATION] == 0


def test_a_plan_says_so(tmp_path: Path) -> None:
    from actors.preflight.checks import leak_problems

    (tmp_path / "val.txt").write_text("scene0011_00\n")
    source = corpus(tmp_path / "train", "scannet/scene0011_00")
    config = run(tmp_path, {"qa": source}, evaluation_sets={"val": str(tmp_path / "val.txt")})
    assert list(leak_problems(config)) == []  # not indexed yet
    opened(config)
    (problem,) = leak_problems(config)
    assert "source 'qa' trains on 1 scenes of the evaluation set 'val' (scene0011_00)" in problem
    allowed = dataclasses.replace(config, data=dataclasses.replace(config.data, allow_leak=["val"]))
    assert list(leak_problems(allowed)) == []


def test_a_run_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actors import driver, preflight
    from services.features import encode

    (tmp_path / "val.txt").write_text("scene0011_00\n")
    source = corpus(tmp_path / "train", "scannet/scene0011_00")
    config = run(tmp_path, {"qa": source}, evaluation_sets={"val": str(tmp_path / "val.txt")})
    monkeypatch.setattr(preflight, "check", lambda _: None)
    monkeypatch.setattr(encode, "pin_weights", lambda given: given)
    with pytest.raises(DataError, match=r"training data shares scenes with evaluation sets"):
        driver.train(config)


def test_names_that_allow_nothing(tmp_path: Path) -> None:
    base = ["recipe=probe", f"storage.root={tmp_path}", f"+data.evaluation_sets.vsibench={tmp_path}/test.jsonl"]
    config = configs.load([*base, "data.allow_leak=[vsibench]"])
    assert config.data.evaluation_sets == {"vsibench": f"{tmp_path}/test.jsonl"}
    with pytest.raises(ConfigError, match=r"data\.allow_leak has 'vsi_bench'.*Did you mean vsibench"):
        configs.load([*base, "data.allow_leak=[vsi_bench]"])
