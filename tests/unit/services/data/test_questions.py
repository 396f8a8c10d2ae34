"""Every type of question against a second way to compute its answer, on random rooms."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import QuestionsConfig
from models.metrics import vsibench
from services.contracts import Instance, Question, Scene, Split
from services.data.questions import Annotations, annotate, blind_scores, write_annotations
from services.data.questions.blind import right_option, scene_of
from services.data.questions.boxes import Box, floor_area
from services.data.questions.choice import direction, is_certain_order
from services.data.questions.draft import plural, with_article
from services.data.questions.facts import Thing
from services.data.questions.referring import compose
from services.data.questions.route import turn
from services.errors import DataError
from tests.unit.services.data import toy_scene

CONFIG = QuestionsConfig()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Annotations:
    folder = tmp_path_factory.mktemp("rooms")
    return annotate([toy_scene.write(toy_scene.furnished(i), folder / str(i), f"toy/{i}") for i in range(10)], CONFIG)


def of_type(source: Annotations, kind: str) -> list[tuple[Scene, Question]]:
    found = [(source.scenes[scene_of(q)], q) for q in source.questions if q.type == kind]
    assert len(found) >= 5, f"too few questions of type {kind} to test"
    return found


def named(scene: Scene, label: str) -> Instance:
    """The one object of a label: that questions name only unique objects is part of every test here."""
    found = [instance for instance in scene.instances if instance.label == label]
    assert len(found) == 1, f"{label} is not unique"
    return found[0]


def labels_in(pattern: str, question: Question) -> tuple[str, ...]:
    match = re.search(pattern, question.text)
    assert match, question.text
    return match.groups()


def to_box(instance: Instance, point: np.ndarray) -> np.ndarray:
    """Projection of a point onto a box."""
    assert instance.box is not None
    axes, center = np.array(instance.box.axes), np.array(instance.box.center)
    half = np.array(instance.box.size) / 2
    return center + axes @ np.clip(axes.T @ (point - center), -half, half)


def gap(a: Instance, b: Instance) -> float:
    """Distance by alternating projections, which converge to the closest points of two convex bodies."""
    q, before = np.zeros(3), np.inf
    while True:
        p = to_box(a, q)
        q = to_box(b, p)
        now = float(np.linalg.norm(p - q))
        if before - now < 1e-9:
            return now
        before = now


def floor_point(instance: Instance) -> complex:
    assert instance.box is not None
    return complex(instance.box.center[0], instance.box.center[1])


def heading(a: complex, b: complex) -> float:
    return float(np.degrees(np.angle(b - a)))


def turned(before: float, after: float) -> float:
    return (after - before + 180) % 360 - 180


def pixel_counts(scene: Scene, instance: Instance) -> list[int]:
    return [int((np.array(Image.open(view.instance_path)) == instance.id).sum()) for view in scene.views]


def test_object_counting(source: Annotations) -> None:
    for scene, question in of_type(source, "object_counting"):
        (name,) = labels_in(r"How many (.+) are there", question)
        of_label = [i for i in scene.instances if plural(i.label) == name]
        seen = {int(v) for view in scene.views for v in np.unique(np.array(Image.open(view.instance_path)))}
        assert int(question.answer) == len([i for i in of_label if i.id in seen]) == len(of_label) >= 2


def test_object_abs_distance(source: Annotations) -> None:
    for scene, question in of_type(source, "object_abs_distance"):
        a, b = labels_in(r"between the (.+) and the (.+), measured", question)
        expected = gap(named(scene, a), named(scene, b))
        assert float(question.answer) == pytest.approx(expected, abs=0.05 + 1e-4, rel=0)
        assert float(question.answer) == pytest.approx(expected, rel=0.031)


def test_object_size_estimation(source: Annotations) -> None:
    for scene, question in of_type(source, "object_size_estimation"):
        (name,) = labels_in(r"does the (.+) measure", question)
        corners = Box.of(named(scene, name).box, np.eye(4)).corners()
        edges = [np.linalg.norm(corners[0] - corners[i]) for i in (1, 2, 4)]  # corners that differ in one sign
        assert float(question.answer) == pytest.approx(100 * max(edges), abs=0.5 + 1e-6)


def test_room_size_estimation(source: Annotations) -> None:
    for scene, question in of_type(source, "room_size_estimation"):
        room = toy_scene.furnished(int(scene.id.split("/")[1]))
        assert float(question.answer) == pytest.approx(room.width * room.length, abs=0.05 + 0.05)


def test_object_rel_distance(source: Annotations) -> None:
    for scene, question in of_type(source, "object_rel_distance"):
        (target,) = labels_in(r"nearest to the (.+)\?", question)
        names = [option.split(". ")[1] for option in question.options]
        gaps = sorted((gap(named(scene, target), named(scene, name)), name) for name in names)
        assert right_option(question) == gaps[0][1]
        assert gaps[1][0] - gaps[0][0] > 0.14
        assert len({target, *names}) == 5


@pytest.mark.parametrize("kind", ["easy", "medium", "hard"])
def test_object_rel_direction(source: Annotations, kind: str) -> None:
    for scene, question in of_type(source, f"object_rel_direction_{kind}"):
        a, b, c = labels_in(r"where the (.+) is and face the (.+)\. .* the (.+?)(?: on your left|:|\?)", question)
        at, facing, target = (floor_point(named(scene, name)) for name in (a, b, c))
        expected = set()
        for error in (-10, 0, 10):  # degrees: the margin keeps the answer
            angle = turned(heading(at, facing), heading(at, target)) + error
            if kind == "easy":
                expected.add("left" if 0 < angle < 180 else "right")
            elif kind == "medium":
                expected.add("back" if abs(angle) >= 135 else "left" if angle > 0 else "right")
            else:
                expected.add(("front" if abs(angle) < 90 else "back") + ("-left" if 0 < angle < 180 else "-right"))
        assert expected == {right_option(question)}


def test_obj_appearance_order(source: Annotations) -> None:
    for scene, question in of_type(source, "obj_appearance_order"):
        (names,) = labels_in(r"in the pictures: (.+)\?", question)
        first = {}
        for name in names.split(", "):
            counts = np.array([pixel_counts(scene, i) for i in scene.instances if i.label == name]).max(0)
            seen = counts[list(question.views)] >= CONFIG.min_visible * toy_scene.WIDTH * toy_scene.HEIGHT
            assert seen.any()
            first[name] = int(np.argmax(seen))
        assert list(question.views) == sorted(set(question.views))
        ordered = sorted(first, key=lambda name: first[name])
        assert right_option(question) == ", ".join(ordered)
        assert len(set(first.values())) == 4
        assert len(set(question.options)) == 4


def test_route_planning_by_walking(source: Annotations) -> None:
    amounts = {"turn left": 90.0, "turn right": -90.0, "turn back": 180.0}
    lengths = set()
    for scene, question in of_type(source, "route_planning"):
        a, b, goal = labels_in(r"at the (.+), faces the (.+) and is to go to the (.+)\. Its", question)
        stops = re.findall(r"Go straight on to the (.+?)\.", question.text)
        assert stops[-1] == goal
        assert question.text.count("[fill in]") == len(stops) + 1  # one in the explanation
        lengths.add(len(stops))
        points = [floor_point(named(scene, name)) for name in (a, *stops)]
        start = heading(points[0], floor_point(named(scene, b)))
        arrived = []
        for plan in product(amounts, repeat=len(stops)):
            facing, reached = start, True
            for (here, there), action in zip(pairwise(points), plan, strict=True):
                facing += amounts[action]
                reached &= abs(turned(facing, heading(here, there))) < 45
                facing = heading(here, there)
            arrived += [", ".join(plan)] * reached
        assert arrived == [right_option(question)]
        for (here, there), ends in zip(pairwise(points), pairwise((a, *stops)), strict=True):
            for other in (i for i in scene.instances if i.label not in ends):
                height = other.box.center[2]
                line = [np.array([p.real, p.imag, height]) for p in here + np.linspace(0, 1, 100) * (there - here)]
                assert min(np.linalg.norm(to_box(other, p) - p) for p in line) > 0.1
    assert lengths == {1, 2}


def test_options_and_views_are_well_formed(source: Annotations) -> None:
    for question in source.questions:
        assert question.views == tuple(range(8)) or question.type == "obj_appearance_order"
        assert question.type in vsibench.QUESTION_TYPES
        if question.type in vsibench.CHOICE_TYPES:
            assert [option[:3] for option in question.options] == [f"{c}. " for c in "ABCD"[: len(question.options)]]
            assert len({option[3:] for option in question.options}) == len(question.options)
            assert vsibench.score_answer(question.type, question.answer, question.answer) == 1
        else:
            assert question.options == ()
            assert vsibench.score_answer(question.type, question.answer, question.answer) == 1
    assert len({question.id for question in source.questions}) == len(source.questions)


def test_guessing_without_images_gains_little(source: Annotations) -> None:
    scores = blind_scores(source.questions)
    for kind in vsibench.CHOICE_TYPES:
        for count in (2, 3, 4):
            letters = Counter(q.answer for q in source.questions if q.type == kind and len(q.options) == count)
            assert max(letters.values(), default=0) - min((letters[c] for c in "ABCD"[:count]), default=0) <= 1
        assert scores[kind].best <= scores[kind].chance + 0.15, (kind, scores[kind])
    assert scores["object_abs_distance"].best < 0.6


def test_the_questions_do_not_depend_on_the_frame_of_the_world(source: Annotations, tmp_path: Path) -> None:
    """A scene whose world has another orientation, with its axis alignment, gets the same questions."""
    room = toy_scene.furnished(3)
    scene = toy_scene.write(room, tmp_path, "toy/3", mesh=False)
    turn_world = np.eye(4)
    turn_world[:3, :3] = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]  # z up becomes y up
    turn_world[:3, 3] = [5, -2, 1]
    instances = []
    for instance in scene.instances:
        center = turn_world @ [*instance.box.center, 1]
        axes = turn_world[:3, :3] @ np.array(instance.box.axes)
        box = dataclasses.replace(
            instance.box, center=tuple(float(v) for v in center[:3]), axes=toy_scene.as_matrix(axes)
        )
        instances.append(dataclasses.replace(instance, box=box))
    other = dataclasses.replace(
        scene, instances=tuple(instances), axis_alignment=toy_scene.as_matrix(np.linalg.inv(turn_world))
    )
    assert annotate([other], CONFIG).questions == annotate([scene], CONFIG).questions
    assert annotate([other], CONFIG).expressions == annotate([scene], CONFIG).expressions


def test_same_seed_same_questions_other_seed_others(source: Annotations, tmp_path: Path) -> None:
    scenes = [source.scenes[f"toy/{i}"] for i in range(3)]
    once, again = annotate(scenes, CONFIG), annotate(scenes[::-1], CONFIG)
    assert once.questions == again.questions
    assert once.expressions == again.expressions
    assert annotate(scenes, dataclasses.replace(CONFIG, seed=1)).questions != once.questions


def test_what_cannot_be_seen_is_not_asked(tmp_path: Path) -> None:
    room = toy_scene.furnished(1)
    room.cameras = room.cameras[:1]
    scene = toy_scene.write(room, tmp_path)
    seen = {i.label for i in scene.instances if max(pixel_counts(scene, i)) > 0}
    hidden = {i.label for i in scene.instances} - seen
    assert hidden
    asked = " ".join(q.text + " ".join(q.options) for q in annotate([scene], CONFIG).questions)
    assert asked
    assert not any(re.search(rf"\b{label}\b", asked) for label in hidden)


@pytest.mark.parametrize(
    ("angle", "easy", "medium", "hard"),
    [
        (45, "left", "left", "front-left"),
        (-45, "right", "right", "front-right"),
        (110, "left", "left", "back-left"),
        (-160, None, "back", "back-right"),
        (5, None, None, None),
        (130, None, None, "back-left"),
        (140, None, None, "back-left"),
        (80, "left", "left", None),
        (175, None, "back", None),
    ],
)
def test_direction_of_an_angle(angle: float, easy: str | None, medium: str | None, hard: str | None) -> None:
    answers = [direction(angle, f"object_rel_direction_{kind}") for kind in ("easy", "medium", "hard")]
    assert answers == [easy, medium, hard]


@pytest.mark.parametrize(
    ("angle", "expected"),
    [
        (90, "turn left"),
        (-90, "turn right"),
        (120, "turn left"),
        (135, None),
        (180, "turn back"),
        (-150, "turn back"),
        (20, None),
    ],
)
def test_turn_of_an_angle(angle: float, expected: str | None) -> None:
    assert turn(angle) == expected


@pytest.mark.parametrize(
    ("clear", "hint", "certain"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], None, True),
        ([[1, 0, 0], [0, 1, 0], [0, 1, 1]], None, False),  # the last two come at once
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 1, 1]], False),  # the third can be guessed at
        ([[0, 1, 0], [0, 0, 1], [0, 0, 0]], None, False),  # the third never comes
    ],
)
def test_an_order_is_certain_only_without_earlier_hints(clear: list, hint: list | None, certain: bool) -> None:
    rows = np.array(clear, bool)
    assert is_certain_order([0, 1, 2], rows, rows if hint is None else np.array(hint, bool)) is certain


def test_floor_area_of_an_l_shape_with_an_unseen_patch_and_a_wall() -> None:
    def rectangle(x0: float, y0: float, x1: float, y1: float, z: float = 0.0) -> tuple[list, list]:
        return [[x0, y0, z], [x1, y0, z], [x1, y1, z], [x0, y1, z]], [[0, 1, 2], [0, 2, 3]]

    parts = [
        rectangle(0, 0, 4, 1), rectangle(0, 1.3, 4, 2), rectangle(0, 1, 1.8, 1.3), rectangle(2.2, 1, 4, 1.3),
        rectangle(0, 2, 2, 5), rectangle(-1, -1, 6, 6, z=2.5),
    ]  # fmt: skip
    vertices = np.concatenate([np.array(v, float) for v, _ in parts])
    faces = np.concatenate([np.array(f) + 4 * i for i, (_, f) in enumerate(parts)])
    assert floor_area(vertices, faces) == pytest.approx(4 * 2 + 2 * 3, abs=0.15)
    wall = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 2.0]])
    assert floor_area(wall, np.array([[0, 1, 2]])) is None


def test_referring_expressions_name_what_they_point_at(source: Annotations) -> None:
    checked = 0
    for scene_id, expressions in source.expressions.items():
        scene = source.scenes[scene_id]
        by_id = {instance.id: instance for instance in scene.instances}
        assert expressions
        for expression in expressions:
            for start, end, instance in expression.spans:
                assert expression.text[start:end] == by_id[instance].label
            target, *anchors = (by_id[i] for _, _, i in expression.spans)
            rivals = [i for i in scene.instances if i.label == target.label]
            assert all(named(scene, anchor.label) for anchor in anchors)
            if "closest to" in expression.text or "farthest from" in expression.text:
                gaps = {rival.id: gap(rival, anchors[0]) for rival in rivals}
                pick = min if "closest" in expression.text else max
                assert target.id == pick(gaps, key=lambda i: gaps[i])
                checked += 1
            elif "largest" in expression.text or "smallest" in expression.text:
                volumes = {rival.id: np.prod(rival.box.size) for rival in rivals}
                pick = min if "smallest" in expression.text else max
                assert target.id == pick(volumes, key=lambda i: volumes[i])
                checked += 1
            elif "beside" in expression.text:
                assert 0 < gap(target, anchors[0]) <= 0.5
                checked += 1
    assert checked > 40


def test_between_and_on_top_of(tmp_path: Path) -> None:
    room = toy_scene.Room(
        things=[
            toy_scene.Thing("bed", 1, 4, (1, 1, 0.5)),
            toy_scene.Thing("table", 5, 4, (1, 1, 0.7)),
            toy_scene.Thing("chair", 3, 4.1),
            toy_scene.Thing("chair", 3, 2.5),
            toy_scene.Thing("lamp", 5, 4, (0.2, 0.2, 0.4), bottom=0.7),
            toy_scene.Thing("lamp", 1.5, 2.5, (0.2, 0.2, 0.4)),
        ],
        cameras=[((3, 0.3, 1.6), (3, 4, 0.6)), ((2.6, 0.3, 1.6), (1, 4, 0.6)), ((3.2, 0.3, 1.6), (5, 4, 0.6))],
    )
    scene = toy_scene.write(room, tmp_path)
    expressions = annotate([scene], CONFIG).expressions["toy"]
    by_text = {expression.text: [i for _, _, i in expression.spans] for expression in expressions}
    assert by_text["the chair between the bed and the table"] == [3, 1, 2]
    assert by_text["the lamp that stands on the table"] == [5, 2]


def test_compose_keeps_spans_with_repeated_labels() -> None:
    things = [Thing(id=i, label=label, box=None, share=np.zeros(1)) for i, label in ((4, "bed"), (9, "bed lamp"))]
    expression = compose("the {} near the {}", *things)
    assert expression.text == "the bed near the bed lamp"
    assert expression.spans == ((4, 7, 4), (17, 25, 9))


def test_words() -> None:
    assert [plural(word) for word in ("chair", "bench", "bookshelf", "balcony", "tray", "box")] == [
        "chairs", "benches", "bookshelves", "balconies", "trays", "boxes",
    ]  # fmt: skip
    assert (with_article("oven"), with_article("sofa"), with_article("clothes")) == ("an oven", "a sofa", "clothes")


def test_captions_say_what_is_there(source: Annotations) -> None:
    words = {2: "two", 3: "three"}
    for scene_id, (caption, size) in source.captions.items():
        scene = source.scenes[scene_id]
        visible = [i.label for i in scene.instances if max(pixel_counts(scene, i)) >= 0.002 * 64 * 48]
        listed = re.split(", | and ", caption.removeprefix("A living room with ").removesuffix("."))
        assert len(listed) == min(6, len(set(visible)))
        for label in set(visible):
            count = visible.count(label)
            phrase = with_article(label) if count == 1 else f"{words[count]} {plural(label)}"
            assert phrase in listed or len(set(visible)) > 6
        room = toy_scene.furnished(int(scene_id.split("/")[1]))
        (stated,) = re.findall(r"A living room of about (\d+) square metres\.", size)
        assert float(stated) == pytest.approx(room.width * room.length, abs=0.6)


def test_files(source: Annotations, tmp_path: Path) -> None:
    scenes = {
        name: dataclasses.replace(s, split=Split.TEST if name == "toy/0" else Split.TRAIN)
        for name, s in source.scenes.items()
    }
    annotations = annotate(scenes.values(), CONFIG)
    scores = write_annotations(annotations, tmp_path / "out")
    assert sorted(scores) == ["test", "train"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "questions-test.jsonl").read_text().splitlines()]
    assert lines
    assert {line["scene"] for line in lines} == {"toy/0"}
    for line in lines:
        human, gpt = line["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].count("<image>") == len(line["images"]) == len(line["views"])
        assert gpt["value"] == line["answer"]
        assert all(option in human["value"] for option in line["options"])
        assert all(Path(image).is_file() for image in line["images"])
        assert line["question_type"] in vsibench.QUESTION_TYPES
    expressions = [json.loads(line) for line in (tmp_path / "out" / "expressions.jsonl").read_text().splitlines()]
    assert len(expressions) == sum(len(e) for e in annotations.expressions.values())
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")] == []
    attached = annotations.scene("toy/0")
    assert {q.id for q in attached.questions} == {line["id"] for line in lines}
    assert attached.captions
    assert attached.expressions


def test_a_scene_without_instances_is_left_out_and_a_broken_mask_is_named(source: Annotations, tmp_path: Path) -> None:
    scene = source.scenes["toy/0"]
    assert annotate([dataclasses.replace(scene, instances=())], CONFIG).questions == ()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    views = (dataclasses.replace(scene.views[0], instance_path=str(tmp_path / "broken.png")), *scene.views[1:])
    with pytest.raises(DataError, match=r"broken\.png"):
        annotate([dataclasses.replace(scene, views=views)], CONFIG)
    (tmp_path / "mesh.ply").write_bytes(b"ply\nnonsense")
    with pytest.raises(DataError, match=r"mesh\.ply"):
        annotate([dataclasses.replace(scene, mesh_path=str(tmp_path / "mesh.ply"))], CONFIG)
