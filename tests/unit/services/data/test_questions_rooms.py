"""Questions, checks and pictures on generated rooms, through the manifest: the way a user gets them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import DataConfig, RoomsConfig, RunConfig, SourceConfig, StorageConfig
from services.data.checks import run_check
from services.data.questions import run_questions
from services.data.rooms import build_room, plan_rooms
from services.data.show import run_show
from services.errors import DataError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    rooms = RoomsConfig(scenes=3, views=6, width=80, height=60, seed=2)
    data = DataConfig(sources={"rooms": SourceConfig()}, rooms=rooms)
    return RunConfig(storage=StorageConfig(root=str(tmp_path_factory.mktemp("storage"))), data=data)


@pytest.fixture(scope="module")
def questions(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("questions")
    printed = run_questions(config, out)
    assert printed[0].startswith("rooms: ")
    return [
        json.loads(line) for path in (out / "rooms").glob("questions-*.jsonl") for line in path.read_text().splitlines()
    ]


def test_answers_agree_with_the_generator(config: RunConfig, questions: list[dict]) -> None:
    """Room size, object size and counts from the plan of the room itself, without files, reader or alignment."""
    rooms = {plan.id: build_room(config.data.rooms, plan.index) for plan in plan_rooms(2, 3)}
    checked = 0
    for question in questions:
        room = rooms[question["scene"]]
        text, answer = question["conversations"][0]["value"], question["answer"]
        if question["question_type"] == "room_size_estimation":
            assert float(answer) == pytest.approx(room.size[0] * room.size[1], rel=0.03)
        elif question["question_type"] == "object_size_estimation":
            (label,) = re.findall(r"does the (.+?) measure", text)
            (instance,) = (i for i in room.instances if i.label == label)
            assert float(answer) == pytest.approx(100 * max(instance.box.size), abs=0.6)
        elif question["question_type"] == "object_counting":
            (name,) = re.findall(r"How many (.+?) are there", text)
            stem = {"bookshelves": "bookshelf"}.get(name, name.removesuffix("s"))
            assert int(answer) == sum(i.label == stem for i in room.instances)
        else:
            continue
        checked += 1
    assert checked >= 6


def test_directions_agree_with_the_placement_in_the_room(config: RunConfig, questions: list[dict]) -> None:
    """The angle computed from the boxes in the world frame, which for rooms is turned about z."""
    rooms = {plan.id: build_room(config.data.rooms, plan.index) for plan in plan_rooms(2, 3)}
    asked = [q for q in questions if q["question_type"].startswith("object_rel_direction")]
    assert len(asked) >= 5
    for question in asked:
        text = question["conversations"][0]["value"]
        a, b, c = re.search(r"where the (.+?) is and face the (.+?)\. .*?the (.+?)(?: on your left|:)", text).groups()
        place = {i.label: complex(*i.box.center[:2]) for i in rooms[question["scene"]].instances}
        angle = np.degrees(np.angle((place[c] - place[a]) / (place[b] - place[a])))
        answer = dict(option.split(". ") for option in question["options"])[question["answer"]]
        if answer == "back":
            assert abs(angle) > 135
        else:
            assert ("left" in answer) == (angle > 0)
            assert not answer.startswith("front") or abs(angle) < 90
            assert not answer.startswith("back-") or abs(angle) > 90


def test_the_rooms_pass_their_own_check(config: RunConfig, tmp_path: Path) -> None:
    (report,) = run_check(config, tmp_path)
    assert report.lines()[-1] == "  no faults"
    assert report.views == 18
    assert (tmp_path / "rooms" / "report.html").stat().st_size > 2000


def test_a_damaged_room_is_reported_and_not_raised(config: RunConfig, tmp_path: Path) -> None:
    source = next(p for p in (Path(config.storage.root) / "data").glob("rooms-*") if p.is_dir())
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    scans = sorted((copy / "scans").iterdir())
    image = next((scans[0] / "color").iterdir())
    image.write_bytes(image.read_bytes()[:200])
    depth = scans[1] / "depth" / "2.png"
    Image.fromarray((np.array(Image.open(depth)) // 10).astype(np.uint16)).save(depth)
    evaluation = tmp_path / "bench.txt"
    evaluation.write_text(f"{scans[2].name}\n")
    data = dataclasses.replace(config.data, sources={"mine": SourceConfig(format="scannet", root=str(copy))})
    damaged = dataclasses.replace(config, data=data)
    (report,) = run_check(damaged, tmp_path / "out", {"bench": evaluation})
    found = {(str(f.fault), f.scene) for f in report.findings}
    assert ("unreadable or truncated file", scans[0].name) in found
    assert ("wrong depth scale", scans[1].name) in found
    assert ("also in an evaluation set", scans[2].name) in found
    assert len(report.findings) == 3


def test_a_room_is_drawn(config: RunConfig, tmp_path: Path) -> None:
    name = plan_rooms(2, 3)[0].id
    page = run_show(config, f"rooms/{name}", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"above.png", "labels.png", "instances.png", "cloud.ply"}
    assert page.name == "index.html"
    with pytest.raises(DataError, match="no source has a scene or item 'nowhere'"):
        run_show(config, "nowhere", tmp_path)
