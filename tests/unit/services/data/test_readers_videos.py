"""Conversations about videos, in the forms of their published files: which frames they show, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.schema import ChecksConfig, SourceConfig, TextConfig
from services.contracts import Item, Split, Turn
from services.data.checks.findings import Fault
from services.data.checks.run import check_source
from services.data.images import load_image
from services.data.ingest import index_reader
from services.data.readers import open_reader
from services.data.readers.base import Reader
from services.errors import ConfigError, DataError, QuarantineLimitError
from tests.support.films import write_video
from tests.support.layouts import save_color


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return path


def corpus(path: Path, **options: Any) -> Reader:
    return open_reader(path, SourceConfig(format="corpus", options=options))


def item(reader: Reader, name: str) -> Item:
    found = reader.read(name)
    assert isinstance(found, Item)
    return found


def asks(text: str, **media: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "four"}]
    return {**media, "conversations": turns}


def film(path: Path, frames: int, fps: int = 10) -> None:
    write_video(path, [np.full((16, 16, 3), 5 * n, np.uint8) for n in range(frames)], fps=fps)


def folder(path: Path, frames: int) -> None:
    for number in range(frames):
        save_color(path / f"{number}.png", np.full((4, 4, 3), number, np.uint8))


@pytest.mark.parametrize("name", ["vsi.jsonl", "vsi.json"])
def test_frames_of_a_video_file_stand_in_the_place_of_its_mark(tmp_path: Path, name: str) -> None:
    film(tmp_path / "media/scannet/scene0191_00.mp4", 40, fps=4)  # 10 s
    records = [
        asks("<image>\nThese are frames of a video.\nHow many?", video="scannet/scene0191_00.mp4"),
        asks("<video>\nHow many?", video="scannet/scene0191_00.mp4", num_tokens=1300),
        asks("How many?", video="scannet/scene0191_00.mp4"),
    ]
    reader = corpus(write(tmp_path / name, records), images=str(tmp_path / "media"), tag="3d")
    published, marked, unmarked = (item(reader, number) for number in "012")
    # Five frames of ten seconds: 0, 9.75, 19.5, 29.25, 39.
    assert [ref.frame for ref in published.images] == [0, 9, 19, 29, 39]
    assert [int(load_image(ref)[8, 8, 0]) for ref in marked.images] == pytest.approx([0, 45, 95, 145, 195], abs=3)
    assert published.turns[0].text == "<image>" * 5 + "These are frames of a video.\nHow many?"
    assert marked.turns == (Turn(role="user", text="<image>" * 5 + "How many?"), Turn(role="assistant", text="four"))
    assert unmarked.turns[0].text == "How many?"
    assert (published.tokens, marked.tokens, marked.label) == (0, 1300, "3d")


def test_a_moving_gif_is_a_video_where_one_is_named_and_a_picture_elsewhere(tmp_path: Path) -> None:
    shown = [Image.fromarray(np.full((16, 16, 3), 30 * n, np.uint8)) for n in range(6)]
    shown[0].save(tmp_path / "walk.gif", save_all=True, append_images=shown[1:], duration=500)
    film(tmp_path / "walk.mp4", 6, fps=2)
    (tmp_path / "walk.m4v").write_bytes((tmp_path / "walk.mp4").read_bytes())
    records = [asks("<video>What?", video=f"walk.{kind}") for kind in ("gif", "m4v")]
    reader = corpus(write(tmp_path / "a.json", [*records, asks("<image>What?", image="walk.gif")]))
    for name, step in (("0", 30), ("1", 5)):  # three seconds: the least number of frames
        images = item(reader, name).images
        assert [ref.frame for ref in images] == [0, 1, 3, 5]
        seen = [int(load_image(ref)[8, 8, 0]) for ref in images]
        assert seen == pytest.approx([0, step, 3 * step, 5 * step], abs=3)
    (picture,) = item(reader, "2").images
    assert picture.frame is None


def test_a_folder_of_frames_is_a_video_at_one_frame_a_second(tmp_path: Path) -> None:
    folder(tmp_path / "walk", 12)
    (tmp_path / "walk/poses.txt").write_text("no picture")
    path = write(tmp_path / "a.json", [asks("<video>\nWhat?", video="walk"), asks("What?", video=["walk"])])
    chosen = [Path(ref.path).stem for ref in item(corpus(path), "0").images]
    assert chosen == ["0", "2", "4", "6", "8", "11"]  # by number, not by name
    assert len(item(corpus(path), "1").images) == 6
    assert len(item(corpus(path, folder_fps=4.0), "0").images) == 4
    evaluation = item(corpus(path, most_frames=32, least_frames=32), "0")
    assert [Path(ref.path).stem for ref in evaluation.images] == [str(n) for n in range(12)]


def test_settings_of_videos_are_refused_before_any_record_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [asks("What?")])
    with pytest.raises(ConfigError, match=r"^options\.least_frames=9 must not be above options\.most_frames=8"):
        corpus(path, least_frames=9).prepare()


def test_turns_may_be_written_with_role_and_content(tmp_path: Path) -> None:
    folder(tmp_path / "walk", 4)
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A door."}]
    reader = corpus(write(tmp_path / "a.json", [{"video": "walk", "conversations": turns}]))
    assert item(reader, "0").turns[0].text == "<image>" * 4 + "What?"
    broken = write(tmp_path / "b.json", [{"conversations": [{"role": "user", "value": "?"}]}])
    with pytest.raises(DataError, match=r"record 0 .*a turn needs 'from' and 'value', or 'role' and 'content'"):
        corpus(broken).read("0")


def test_lists_of_images_with_one_mark_of_a_video_are_thinned(tmp_path: Path) -> None:
    folder(tmp_path, 20)
    names = [f"{number}.png" for number in range(20)]
    marks = "<image>" * 20
    path = write(tmp_path / "a.json", [asks("<video>\nWhat?", images=names), asks(f"{marks}What?", images=names)])
    thinned, whole = item(corpus(path), "0"), item(corpus(path), "1")
    assert [Path(ref.path).stem for ref in thinned.images] == ["0", "2", "5", "8", "10", "13", "16", "19"]
    assert thinned.turns[0].text == "<image>" * 8 + "What?"
    assert len(whole.images) == 20


def test_marks_that_do_not_match_the_frames_are_named(tmp_path: Path) -> None:
    folder(tmp_path / "walk", 4)
    records = [
        asks("<video> or <video>?", video="walk"),
        asks("<image><image>What?", video="walk"),
        asks("<image><image>What?", image="walk/0.png"),
        asks("<video><image>What?", images=["walk/0.png", "walk/1.png"]),
        asks("<video>What?", video="walk", image="walk/0.png"),
        asks("<image><image><image><image>What?", video="walk"),
        asks("Is <video> a tag of HTML?"),
        asks("What?", video="walk", num_tokens="many"),
    ]
    reader = corpus(write(tmp_path / "a.jsonl", records))
    for name, message in (
        ("0", r"a\.jsonl: line 1: 2 marks <video> and 0 marks <image> for one video of 4 chosen frames"),
        ("1", "0 marks <video> and 2 marks <image> for one video of 4 chosen frames"),
        ("2", "has 2 marks <image> and 1 images"),
        ("3", "has 1 marks <video> and 1 marks <image> for 2 images"),
        ("4", "has 'video' and 'image'; which of them its marks mean is not known"),
        ("7", "num_tokens='many' must be a whole number"),
    ):
        with pytest.raises(DataError, match=message):
            reader.read(name)
    assert item(reader, "5").turns[0].text == "<image>" * 4 + "What?"
    assert item(reader, "6").turns[0].text == "Is <video> a tag of HTML?"


def test_a_video_that_is_missing_broken_or_empty_is_left_out_by_name(tmp_path: Path) -> None:
    folder(tmp_path / "walk", 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "notes.txt").write_text("x")
    names = ["walk", "empty", "broken.mp4", "gone.mp4", "notes.txt"]
    reader = corpus(write(tmp_path / "a.json", [asks("<video>What?", video=name) for name in names]))
    for name, message in (
        ("1", r"empty: the folder holds no pictures .*record 1"),
        ("2", r"broken\.mp4: not a readable video"),
        ("3", r"gone\.mp4: there is no such video .*options\.images names the folder of the media"),
        ("4", r"notes\.txt: is no video .*\.mp4"),
    ):
        with pytest.raises(DataError, match=message):
            reader.read(name)
    manifest = index_reader("videos", reader, "", max_broken=0.9)
    assert (manifest.ids, sorted(manifest.facts.broken)) == (["0"], ["1", "2", "3", "4"])
    with pytest.raises(QuarantineLimitError, match=r"4 of 5 scenes or items cannot be read, data\.max_broken=0\.5"):
        index_reader("videos", reader, "", max_broken=0.5)


def test_a_video_that_ends_early_breaks_only_what_needs_its_end(tmp_path: Path) -> None:
    film(tmp_path / "whole.mp4", 40)
    data = bytearray((tmp_path / "whole.mp4").read_bytes())
    start = data.index(b"mdat")
    size = int.from_bytes(data[start - 4 : start], "big")
    # The second half of the pictures; the index of the file, which lies apart, stays whole.
    data[start + size // 2 : start + size - 8] = bytes(size - 8 - size // 2)
    (tmp_path / "damaged.mp4").write_bytes(data)
    reader = corpus(write(tmp_path / "a.json", [asks("<video>What?", video="damaged.mp4")]))
    refs = item(reader, "0").images
    assert load_image(refs[0]).shape == (16, 16, 3)
    with pytest.raises(DataError, match=r"damaged\.mp4: frame 39 does not decode; the video is truncated or damaged"):
        load_image(refs[-1])


def test_a_question_without_an_answer_is_found_and_no_sample(tmp_path: Path) -> None:
    from configs.schema import DataConfig, RunConfig
    from services.streams.text import TextColumns

    folder(tmp_path / "walk", 4)
    silent = {"video": "walk", "conversations": [{"from": "human", "value": "<video>How many?"}]}
    empty = {"video": "walk", "conversations": [*silent["conversations"], {"from": "gpt", "value": " "}]}  # type: ignore[misc]
    reader = corpus(write(tmp_path / "a.json", [silent, empty, asks("<video>How many?", video="walk")]))
    report = check_source(index_reader("videos", reader, "", max_broken=0.0), ChecksConfig())
    faults = {finding.scene: finding.reason for finding in report.findings if finding.fault is Fault.NO_ANSWER}
    assert faults == {
        "0": "the conversation has no answer: its turns are ['user']",
        "1": "the answer in turn 1 of the conversation is empty",
    }
    texts = TextColumns(RunConfig(data=DataConfig(text=TextConfig(tokenizer="bytes"))), 2)
    with pytest.raises(DataError, match="item '0': the conversation has no answer"):
        texts.conversation(item(reader, "0"))
    assert texts.conversation(item(reader, "2"))["supervised"].data.any()


def test_questions_about_one_video_are_of_one_split(tmp_path: Path) -> None:
    for name in "abcdef":
        folder(tmp_path / name, 2)
    records = [asks(f"<video>{number}?", video=name) for name in "abcdef" for number in range(5)]
    manifest = index_reader("videos", corpus(write(tmp_path / "a.json", records)), "", max_broken=0.0)
    splits = [entry.split for entry in manifest.entries]
    assert all(len(set(splits[5 * n : 5 * n + 5])) == 1 for n in range(6))
    assert Split.TRAIN in splits


def test_a_length_that_the_source_states_is_the_planned_one(tmp_path: Path) -> None:
    folder(tmp_path / "walk", 2)
    records = [asks("<video>How many?", video="walk", num_tokens=777), asks("<video>How many?", video="walk")]
    manifest = index_reader("videos", corpus(write(tmp_path / "a.json", records)), "", max_broken=0.0)
    assert manifest.entry("0").length == 777
    # "<image><image>How many?" and "four" are 27 bytes, a quarter of them rounded up.
    assert manifest.entry("1").length == 7
    assert manifest.scene("0") == item(corpus(tmp_path / "a.json"), "0")


def test_a_share_of_the_records_is_the_same_every_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [asks("What?") for _ in range(200)])
    whole = corpus(path).list_ids()
    some, fewer = corpus(path, percent=25).list_ids(), corpus(path, percent=5).list_ids()
    assert (len(some), len(fewer)) == (50, 10)
    assert some == corpus(path, percent=25).list_ids() == [name for name in whole if name in set(some)]
    assert set(fewer) < set(some)
    assert len(corpus(path, percent=0.1).list_ids()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percent": 0}, r"options\.percent=0 must be a number above 0 and at most 100"),
        ({"percent": "10"}, r"options\.percent='10' must be a number"),
        ({"least_frames": 9}, r"options\.least_frames=9 must not be above options\.most_frames=8"),
        ({"most_frames": 2.5}, r"options\.most_frames=2\.5 must be a whole number above 0"),
        ({"frame_seconds": -1}, r"options\.frame_seconds=-1 must be a number above 0"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder(tmp_path / "walk", 2)
    reader = corpus(write(tmp_path / "a.json", [asks("<video>What?", video="walk")]), **options)
    with pytest.raises(ConfigError, match=message):
        reader.read(reader.list_ids()[0])


#: Name of a registered set -> whether its records show videos.
REGISTERED = {
    "spar": False, "spar_234k": False, "llava_hound": True, "llava_hound_64k": True, "scannet_det": False,
    "scanrefer": False, "scan2cap": False, "vlm3r_scannet": True, "vlm3r_scannetpp": True, "vlm3r_route_plan": True,
    "vsi_590k": True, "cambrian_737k": False, "mp_doc": False, "clevr_mc": True, "videochatgpt": True,
}  # fmt: skip


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_sets(tmp_path: Path, name: str) -> None:
    import configs

    folder(tmp_path / "media/walk", 6)
    media = {"video": "walk"} if REGISTERED[name] else {"images": ["walk/0.png", "walk/1.png"]}
    marks = "<video>" if REGISTERED[name] else "<image><image>"
    path = write(tmp_path / "a.jsonl", [asks(f"{marks}What?", **media)])
    key = f"data.sources.{name}"
    config = configs.load(
        [f"data={name}", f"{key}.root={path}", f"+{key}.options.images={tmp_path}/media", f"storage.root={tmp_path}"]
    )
    shown = item(open_reader(config.data.sources[name].root, config.data.sources[name]), "0")
    assert (len(shown.images), shown.turns[0].text) == (
        (4, "<image>" * 4 + "What?") if REGISTERED[name] else (2, "<image><image>What?")
    )
    assert shown.label in ("2d", "3d")
