"""Questions of a source of scenes as a source of its own: made on demand, split by scene, scored by what they carry."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import configs
from configs.schema import DataConfig, QuestionsConfig, RoomsConfig, RunConfig, SourceConfig, StorageConfig
from services.contracts import Item, Question, Scene, Split
from services.data.checks import run_check
from services.data.images import load_ids
from services.data.manifest import Manifest
from services.data.questions.draft import plural
from services.data.questions.facts import Facts, Thing
from services.data.questions.single import single_questions
from services.data.questions.views import view_captions
from services.data.readers import open_reader
from services.data.show import run_show
from services.data.sources import open_sources, run_index
from services.errors import ConfigError, DataError
from services.streams.text import TextColumns


def asked(**options: Any) -> SourceConfig:
    return SourceConfig(format="questions", options={"of": "rooms", **options})


def with_sources(config: RunConfig, **sources: SourceConfig) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    data = DataConfig(
        # In this order: what is made of rooms is named before them.
        sources={
            "questions": asked(),
            "rooms": SourceConfig(),
            "captions": asked(questions=False, views=True, scenes=True),
        },
        rooms=RoomsConfig(scenes=3, views=6, width=80, height=60, seed=2),
        max_broken=0.0,
    )
    return RunConfig(storage=StorageConfig(root=str(tmp_path_factory.mktemp("storage"))), data=data)


@pytest.fixture(scope="module")
def manifests(config: RunConfig) -> dict[str, Manifest]:
    return open_sources(config)


def items(manifest: Manifest) -> list[Item]:
    found = [manifest.scene(entry_id) for entry_id in manifest.ids]
    assert all(isinstance(item, Item) for item in found)
    return found  # type: ignore[return-value]


def test_questions_are_conversations_about_the_pictures_of_their_scene(manifests: dict[str, Manifest]) -> None:
    assert list(manifests) == ["questions", "rooms", "captions"]
    assert len(manifests["questions"]) > 20
    for item in items(manifests["questions"]):
        question = item.question
        assert question is not None
        scene = manifests["rooms"].scene(item.id.rsplit("/", 2)[0])
        assert isinstance(scene, Scene)
        assert item.split == scene.split
        assert [image.path for image in item.images] == [scene.views[view].image.path for view in question.views]
        asking, answer = item.turns
        assert (asking.role, answer.role) == ("user", "assistant")
        assert asking.text.count("<image>") == len(item.images)
        assert question.text in asking.text
        assert all(option in asking.text for option in question.options)
        assert answer.text == question.answer
        assert question.id == item.id
    assert set(manifests["questions"].splits()) == {"train", "val", "test"}


def test_pictures_keep_their_digests(manifests: dict[str, Manifest]) -> None:
    """So that features of a picture are computed once, whichever source shows it."""
    scenes = {digest for entry in manifests["rooms"].entries for digest in entry.digests}
    shown = {digest for entry in manifests["questions"].entries for digest in entry.digests}
    assert shown == scenes


def test_captions_name_what_the_masks_show(manifests: dict[str, Manifest]) -> None:
    checked = 0
    for item in items(manifests["captions"]):
        assert item.question is None
        scene_id, kind, number = item.id.rsplit("/", 2)
        scene = manifests["rooms"].scene(scene_id)
        assert isinstance(scene, Scene)
        if kind == "caption":
            assert len(item.images) == len(scene.views)
            continue
        view = scene.views[int(number)]
        assert [image.path for image in item.images] == [view.image.path]
        assert view.instance_path is not None
        ids = load_ids(view.instance_path)
        share = {i.label.lower(): 0.0 for i in scene.instances}
        for instance in scene.instances:
            share[instance.label.lower()] += float((ids == instance.id).mean())
        largest = max(share, key=lambda label: share[label])
        text = item.turns[-1].text
        assert text.endswith(".")
        first = text.removesuffix(".").split(",")[0].split(" and ")[0].lower()
        assert largest in first or first.split()[-1].startswith(largest[:4]), (text, share)
        checked += 1
    assert checked >= 15


def test_captions_of_views_by_hand() -> None:
    things = [
        Thing(id=1, label="chair", box=None, share=np.array([0.1, 0.0, 0.001])),
        Thing(id=2, label="chair", box=None, share=np.array([0.1, 0.3, 0.0])),
        Thing(id=3, label="armchair", box=None, share=np.array([0.15, 0.0, 0.001])),
        Thing(id=4, label="bed", box=None, share=np.array([0.002, 0.001, 0.0])),
    ]
    facts = Facts(scene=Scene(id="s", views=()), views=(0, 5, 9), things=tuple(things), min_visible=0.002)
    captions = view_captions(facts, 0)
    assert {c.view: c.text for c in captions} == {0: "Two chairs, an armchair and a bed.", 5: "A chair."}
    assert view_captions(facts, 0) == captions
    assert len({c.prompt for seed in range(20) for c in view_captions(facts, seed)}) > 1


def test_questions_about_one_picture_by_hand() -> None:
    things = [
        Thing(id=1, label="chair", box=None, share=np.array([0.1, 0.0, 0.001])),
        Thing(id=2, label="chair", box=None, share=np.array([0.1, 0.3, 0.0])),
        Thing(id=3, label="bed", box=None, share=np.array([0.2, 0.001, 0.0])),
    ]
    scene = Scene(id="s", views=(), scene_type="Bedroom")
    facts = Facts(scene=scene, views=(0, 5, 9), things=tuple(things), min_visible=0.002)
    drafts = single_questions(facts, ["bed", "chair", "oven"], 0, 8)
    assert {(d.views[0], d.answer) for d in drafts if d.type == "scene_type"} == {(0, "bedroom"), (5, "bedroom")}
    # Of the bed in view 5 and the chair in view 9 a little can be seen: nobody is asked whether they are there.
    assert {(d.views[0], d.text, d.answer) for d in drafts if d.type == "object_presence"} == {
        (0, "Is there a chair in the picture?", "yes"),
        (0, "Is there a bed in the picture?", "yes"),
        (5, "Is there a chair in the picture?", "yes"),
        (0, "Is there an oven in the picture?", "no"),
        (5, "Is there an oven in the picture?", "no"),
        (9, "Is there an oven in the picture?", "no"),
        (9, "Is there a bed in the picture?", "no"),
    }
    assert {(d.views[0], d.text, d.answer) for d in drafts if d.type == "object_count"} == {
        (0, "How many chairs are in the picture?", "2"),
        (0, "How many beds are in the picture?", "1"),
        (5, "How many chairs are in the picture?", "1"),
    }
    assert single_questions(facts, ["oven", "chair", "bed"], 0, 8) == drafts
    assert len([d for d in single_questions(facts, ["oven"], 0, 1) if d.type == "scene_type"]) == 1


def test_questions_about_one_picture_are_true_and_balanced(config: RunConfig) -> None:
    single = asked(questions=False, single=True)
    many = dataclasses.replace(config.data, questions=QuestionsConfig(per_scene=200))
    manifests = open_sources(with_sources(dataclasses.replace(config, data=many), rooms=SourceConfig(), single=single))
    words: Counter[tuple[str, str, str]] = Counter()
    for item in items(manifests["single"]):
        question = item.question
        assert question is not None
        assert len(item.images) == 1
        assert item.turns[-1].text == question.answer
        scene = manifests["rooms"].scene(item.id.rsplit("/", 2)[0])
        assert isinstance(scene, Scene)
        (view,) = question.views
        assert item.images[0].path == scene.views[view].image.path
        if question.type == "scene_type":
            assert question.answer == (scene.scene_type or "").lower()
            continue
        mask = scene.views[view].instance_path
        assert mask is not None
        ids = load_ids(mask)
        shown = Counter(i.label.lower() for i in scene.instances if (ids == i.id).any())
        said = question.text.removeprefix("Is there a").removeprefix("How many").removeprefix("n ").lstrip()
        there = {label: count for label, count in shown.items() if said.startswith((label, plural(label)))}
        if question.type == "object_count":
            assert int(question.answer) in there.values(), (question, shown)
        else:
            words[item.split or "", question.text, question.answer] += 1
            assert (question.answer == "yes") == bool(there), (question, shown)
    assert sum(words.values()) >= 8
    for split, text, answer in list(words):
        assert words[split, text, "yes"] == words[split, text, "no"], (split, text, answer)


def test_they_are_made_once(config: RunConfig, manifests: dict[str, Manifest]) -> None:
    folder = Path(manifests["questions"].root)
    made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = open_sources(config)
    assert {name: m.digest for name, m in again.items()} == {name: m.digest for name, m in manifests.items()}
    assert open_sources(config, revalidate=False)["questions"].digest == manifests["questions"].digest
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    assert [report.source for report in run_index(config)] == ["questions", "rooms", "captions"]
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, questions=QuestionsConfig(seed=1)))
    assert open_sources(other)["questions"].digest != manifests["questions"].digest


def test_fewer_pictures(config: RunConfig) -> None:
    few = open_sources(with_sources(config, rooms=SourceConfig(), few=asked(max_views=2)))["few"]
    assert len(few) > 0
    assert {entry.n_views for entry in few.entries} <= {1, 2}
    assert {item.question.views for item in items(few) if item.question} <= {(0, 5), (0,), (5,)}


def test_a_limit_that_no_scene_reaches_changes_nothing(config: RunConfig, manifests: dict[str, Manifest]) -> None:
    same = open_sources(with_sources(config, rooms=SourceConfig(), questions=asked(max_views=6)))["questions"]
    assert same.root == manifests["questions"].root


def test_they_pass_the_check(config: RunConfig, tmp_path: Path) -> None:
    """Questions share pictures: that is no repetition."""
    reports = {report.source: report.lines()[-1] for report in run_check(config, tmp_path)}
    assert reports == dict.fromkeys(config.data.sources, "  no faults")


def test_every_conversation_becomes_tokens(config: RunConfig, manifests: dict[str, Manifest]) -> None:
    columns = TextColumns(config, 4)
    for item in [*items(manifests["questions"]), *items(manifests["captions"])]:
        record = columns.conversation(item)
        ids, supervised = record["input_ids"].data, record["supervised"].data
        assert columns.decode(ids[supervised]) == item.turns[-1].text
        assert columns.pieces(ids).count("<|image|>") == 4 * len(item.images)


def test_what_cannot_be_asked_about_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.q\.options\.of='room' is not one of the sources rooms"):
        open_sources(
            with_sources(config, rooms=SourceConfig(), q=SourceConfig(format="questions", options={"of": "room"}))
        )
    with pytest.raises(ConfigError, match=r"max_views=-1 must be a whole number"):
        open_sources(with_sources(config, rooms=SourceConfig(), q=asked(max_views=-1)))
    with pytest.raises(ConfigError, match="choose nothing: set one of questions, single, views, scenes to true"):
        open_sources(with_sources(config, rooms=SourceConfig(), q=asked(questions=False)))
    with pytest.raises(ConfigError, match="splits of format questions are those of the scenes"):
        open_sources(with_sources(config, rooms=SourceConfig(), q=dataclasses.replace(asked(), splits={"train": "x"})))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    bare = SourceConfig(format="corpus", root=str(tmp_path))
    with pytest.raises(DataError, match="no scene has instances with masks"):
        open_sources(with_sources(config, bare=bare, q=SourceConfig(format="questions", options={"of": "bare"})))


def test_the_config_names_the_source(tmp_path: Path) -> None:
    loaded = configs.load(["data=rooms-qa", f"storage.root={tmp_path}"])
    assert loaded.data.sources["questions"].options == {"of": "rooms", "max_views": 8}
    with pytest.raises(ConfigError, match=r"questions\.options\.of='roms' names no source.*Did you mean.*rooms"):
        configs.load(["data=rooms-qa", "data.sources.questions.options.of=roms"])
    with pytest.raises(ConfigError, match=r"q\.options\.of is empty: Name the source"):
        configs.load(["data=rooms", "data.sources.q.format=questions"])


@pytest.mark.parametrize("name", ["lcs558k", "sharegpt4v", "allava", "spar", "emova"])
def test_a_corpus_needs_its_place(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.sources\.{name}\.root has no value"):
        configs.load([f"data={name}"])


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_scored_questions_in_a_corpus(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "B"}]
    blind = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "B"}]
    scored = {"question_type": "depth", "answer": "B", "options": ["A. near", "B. far"]}
    path = write_lines(
        tmp_path / "data.jsonl",
        {"id": "scored", "image": "a.png", "conversations": talk, "split": "test", **scored},
        {"id": "plain", "image": [{"path": "a.png"}], "conversations": talk},
        {"id": "odd", "conversations": blind, **scored, "options": "AB"},
        {"id": "lost", "conversations": blind, "split": "later"},
        {"id": "marked", "conversations": talk},
        {"id": "wrong", "image": [{"file": "a.png"}], "conversations": talk},
    )
    reader = open_reader(path, SourceConfig(format="corpus"))
    item = reader.read("scored")
    assert isinstance(item, Item)
    assert item.question == Question(
        id="scored", type="depth", text="Which?", answer="B", options=("A. near", "B. far")
    )
    assert item.split == Split.TEST
    plain = reader.read("plain")
    assert isinstance(plain, Item)
    assert (plain.question, plain.images[0].path) == (None, str(tmp_path / "a.png"))
    for record_id, message in (
        ("odd", "line 3: 'options' must be a list of texts, got 'AB'"),
        ("lost", "line 4: split='later' is not one of train, val, test"),
        ("marked", "line 5: has 1 marks <image> and 0 images"),
        ("wrong", "line 6: an image is a name, or an object with path"),
    ):
        with pytest.raises(DataError, match=message):
            reader.read(record_id)


def test_a_folder_of_json_lines(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    write_lines(tmp_path / "a/one.jsonl", {"id": "x", "conversations": talk})
    write_lines(tmp_path / "b/two.jsonl", {"id": "x", "conversations": talk}, {"id": "y", "conversations": talk})
    reader = open_reader(tmp_path, SourceConfig(format="corpus", options={"layout": "jsonl"}))
    assert reader.list_ids() == ["x", "x-1", "y"]
    assert all(len(reader.read(record_id).turns) == 2 for record_id in reader.list_ids())  # type: ignore[union-attr]


def test_a_question_is_shown_token_by_token(config: RunConfig, manifests: dict[str, Manifest], tmp_path: Path) -> None:
    item = next(i for i in items(manifests["questions"]) if i.question and i.question.options)
    assert item.question is not None
    page = run_show(config, f"questions/{item.id}", tmp_path / "page").read_text()
    assert f"answer {item.question.answer}" in page
    assert f'<span class="yes">{item.question.answer}</span><span class="yes">&lt;|im_end|&gt;</span>' in page
    assert page.count('<span class="no">&lt;|image|&gt;</span>') == len(item.images)
    silent = write_lines(tmp_path / "silent.jsonl", {"id": "s", "conversations": [{"from": "human", "value": "Hi"}]})
    corpus = with_sources(config, mine=SourceConfig(format="corpus", root=str(silent)))
    with pytest.raises(DataError, match="item 's': the conversation has no answer"):
        run_show(corpus, "s", tmp_path / "silent")
