"""Benchmarks in their own files, made by hand: what is asked, what is shown, and what the answers score."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.schema import SourceConfig
from models.metrics.benchmarks import BENCHMARKS as SCORERS
from models.metrics.benchmarks import scorer
from models.metrics.seedbench import IMAGE_DIMENSIONS, VIDEO_DIMENSIONS
from services.contracts import Item, Split
from services.data.images import load_image
from services.data.ingest import index_reader
from services.data.manifest import Manifest
from services.data.readers import open_reader
from services.data.readers.base import Reader
from services.data.readers.benchmarks import BENCHMARKS as READERS
from services.data.readers.benchmarks import protocol
from services.errors import ConfigError, DataError
from tests.support.films import write_video


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def picture(value: int) -> dict[str, Any]:
    """A picture as Parquet files of data sets hold it."""
    return {"bytes": png(value), "path": f"{value}.png"}


def grey(item: Item) -> list[int]:
    """The value of each of an item's pictures, which are of one."""
    return [int(load_image(ref)[0, 0, 0]) for ref in item.images]


def benchmark(root: Path, name: str, cache: Path | None = None, **options: Any) -> Reader:
    return open_reader(root, SourceConfig(format="benchmark", options={"name": name, **options}), cache=cache)


def item(reader: Reader, name: str) -> Item:
    found = reader.read(name)
    assert isinstance(found, Item)
    assert found.question is not None
    assert found.question.id == name
    assert found.split is Split.TEST
    assert found.turns[-1].text == found.question.answer
    return found


def score(reader: Reader, name: str, predictions: Mapping[str, str]) -> dict[str, float]:
    """The benchmark's scores of predictions by question."""
    scores = scorer(name)
    for question_id, prediction in predictions.items():
        q = item(reader, question_id).question
        assert q is not None
        scores.add(id=q.id, type=q.type, answer=q.answer, options=q.options, prediction=prediction)
    return scores.compute()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


# --- VSI-Bench -------------------------------------------------------------------------------------------------------

VSI = [
    {
        "id": 0, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": "object_counting",
        "question": "How many chairs are in this room?", "ground_truth": "4", "options": None,
    },
    {
        "id": 1, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": "object_rel_distance",
        "question": "Which is closest to the door?", "ground_truth": "B", "options": ["A. lamp", "B. chair"],
    },
]  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_vsibench(tmp_path: Path, form: str) -> None:
    (tmp_path / "scannet").mkdir()
    write_video(tmp_path / "scannet/scene0011_00.mp4", [np.full((16, 16, 3), 20 * n, np.uint8) for n in range(9)])
    if form == "jsonl":
        (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in VSI) + "\n")
    else:
        write_rows(tmp_path / "test-00000-of-00001.parquet", VSI)
    reader = benchmark(tmp_path, "vsibench", frames=3)
    assert reader.list_ids() == ["0", "1"]
    count, choice = item(reader, "0"), item(reader, "1")
    assert [ref.frame for ref in count.images] == [0, 4, 8]
    assert count.turns[0].text == (
        "These are frames of a video.\nHow many chairs are in this room?\n"
        "Please answer the question using a single word or phrase."
    )
    assert choice.turns[0].text == (
        "These are frames of a video.\nWhich is closest to the door?\nOptions:\nA. lamp\nB. chair\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert choice.question is not None
    assert choice.question.options == ("A. lamp", "B. chair")
    # 3 for 4: error 0.25 passes six of ten thresholds.
    scores = score(reader, "vsibench", {"0": "3", "1": "b."})
    assert scores == {"object_counting": pytest.approx(0.6), "object_rel_distance": 1.0}


def test_a_line_ends_where_the_file_breaks_it_and_not_at_other_separators(tmp_path: Path) -> None:
    odd = VSI[1] | {"question": "Which of these\u2028is closest\x85to the door?"}
    write_video(tmp_path / "scannet/scene0011_00.mp4", [np.zeros((16, 16, 3), np.uint8)])
    text = json.dumps(VSI[0], ensure_ascii=False) + "\r\n" + json.dumps(odd, ensure_ascii=False) + "\n"
    (tmp_path / "test.jsonl").write_text(text, encoding="utf-8", newline="")
    reader = benchmark(tmp_path, "vsibench")
    assert reader.list_ids() == ["0", "1"]
    assert "Which of these\u2028is closest" in item(reader, "1").turns[0].text


@pytest.mark.parametrize("truth", ["0", "-1", "many", "inf"])
def test_vsibench_leaves_out_a_number_without_a_relative_error(tmp_path: Path, truth: str) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(VSI[0] | {"ground_truth": truth}))
    with pytest.raises(DataError, match=rf"line 1: ground_truth='{truth}' .*must be a positive number"):
        benchmark(tmp_path, "vsibench").read("0")


def test_vsibench_names_what_is_wrong(tmp_path: Path) -> None:
    wrong = [VSI[0], VSI[1] | {"options": []}, VSI[0] | {"id": 2, "question_type": "colour"}]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in wrong))
    reader = benchmark(tmp_path, "vsibench")
    for name, message in (
        ("0", r"scene0011_00\.mp4: there is no such video .*test\.jsonl: line 1.*options\.videos"),
        ("1", r"line 2: a question of type object_rel_distance has options, this one has none"),
        ("2", r"line 3: question_type='colour' is not one of"),
        ("9", r"vsibench has no question '9'"),
    ):
        with pytest.raises(DataError, match=message):
            reader.read(name)
    (tmp_path / "test.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="line 1: broken JSON"):
        benchmark(tmp_path, "vsibench").list_ids()


# --- benchmarks in Parquet -------------------------------------------------------------------------------------------


def blink_row(idx: str, task: str, answer: str, pictures: list[int]) -> dict[str, Any]:
    images = {f"image_{n}": picture(pictures[n - 1]) if n <= len(pictures) else None for n in range(1, 5)}
    choices = ["the left one", "the right one"]
    asked = "Which is nearer? Select from the following choices.\n(A) the left one\n(B) the right one"
    row = {"idx": idx, "question": "Which is nearer?", "sub_task": task, "choices": choices, "answer": answer}
    return {**row, **images, "prompt": asked, "explanation": ""}


def test_blink(tmp_path: Path) -> None:
    one = [blink_row("val_Jigsaw_1", "Jigsaw", "(B)", [1, 2, 3, 4]), blink_row("val_Jigsaw_2", "Jigsaw", "(A)", [5])]
    write_rows(tmp_path / "Jigsaw/val-00000-of-00001.parquet", one)
    write_rows(tmp_path / "Jigsaw/test-00000-of-00001.parquet", [blink_row("test_Jigsaw_1", "Jigsaw", "hidden", [6])])
    write_rows(tmp_path / "Counting/val-00000-of-00001.parquet", [blink_row("val_C_1", "Counting", "(A)", [7, 8])])
    reader = benchmark(tmp_path, "blink")
    assert reader.list_ids() == ["val_C_1", "val_Jigsaw_1", "val_Jigsaw_2"]
    first = item(reader, "val_Jigsaw_1")
    assert grey(first) == [1, 2, 3, 4]
    assert grey(item(reader, "val_C_1")) == [7, 8]
    assert first.turns[0].text.startswith("Which is nearer? Select from the following choices.\n(A) the left one")
    assert first.question is not None
    assert (first.question.type, first.question.answer) == ("Jigsaw", "B")
    assert first.question.options == ("A. the left one", "B. the right one")
    scores = score(reader, "blink", {"val_C_1": "(A)", "val_Jigsaw_1": "The answer is B.", "val_Jigsaw_2": "C"})
    assert scores == {"Counting": 1.0, "Jigsaw": 0.5, "mean": 0.75, "accuracy": pytest.approx(2 / 3)}
    with pytest.raises(DataError, match=r"row 0: the answer 'hidden' is no letter of its 2 choices .*hidden"):
        benchmark(tmp_path / "Jigsaw/test-00000-of-00001.parquet", "blink").read("test_Jigsaw_1")


def test_sparbench(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "task": "depth_prediction_oc_mv", "question": "How deep?", "answer": "2.0"},
        {"id": "b", "task": "position_matching", "question": "Which box?\nA. [1, 2]\nB. [3, 4]", "answer": "B"},
        {"id": "c", "task": "view_change_infer", "question": "How did it move?", "answer": "move_right:1.0"},
        {"id": "d", "task": "smelling", "question": "?", "answer": "A"},
    ]
    pictures = [[picture(1), picture(2)], [picture(3)], [picture(4)], []]
    rows = [{**row, "image": images} for row, images in zip(rows, pictures, strict=True)]
    write_rows(tmp_path / "data/test-00000-of-00001.parquet", rows)
    reader = benchmark(tmp_path, "sparbench")
    depth, box, move = (item(reader, name) for name in "abc")
    assert (grey(depth), grey(box), grey(move)) == ([1, 2], [3], [4])
    assert depth.turns[0].text.endswith("How deep?\nPlease answer the question using a single word or phrase.")
    assert "normalized to a 0-1000 scale" in box.turns[0].text
    assert move.turns[0].text == "How did it move?"
    assert box.question is not None
    assert box.question.options == ("A. [1, 2]", "B. [3, 4]")
    scores = score(reader, "sparbench", {"a": "first 9, then 2.0", "b": "A", "c": "move_right:2.0"})
    assert scores == {
        "depth_prediction_oc_mv": 1.0,
        "position_matching": 0.0,
        "view_change_infer": pytest.approx((0.1 + 4) / 5),
    }
    with pytest.raises(DataError, match="row 3: task='smelling' is not one of"):
        reader.read("d")


def test_realworldqa(tmp_path: Path) -> None:
    asked = "Where is the car?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option."
    rows = [
        {"image": picture(9), "question": asked, "answer": "B"},
        {"image": picture(8), "question": "How many lanes are there?", "answer": "3"},
        {"image": None, "question": "Where?", "answer": "A"},
    ]
    write_rows(tmp_path / "data/test-00000-of-00002.parquet", rows[:1])
    write_rows(tmp_path / "data/test-00001-of-00002.parquet", rows[1:])
    reader = benchmark(tmp_path, "realworldqa")
    first, second, third = reader.list_ids()
    assert (first, third) == ("test-00000-of-00002-0", "test-00001-of-00002-1")
    choice, number = item(reader, first), item(reader, second)
    assert choice.turns[0].text == asked
    assert choice.question is not None
    assert (choice.question.type, choice.question.options) == ("choice", ("A. Left", "B. Right"))
    assert number.question is not None
    assert (number.question.type, number.question.options, grey(number)) == ("open", (), [8])
    assert score(reader, "realworldqa", {first: "B. Right", second: "three"}) == {"accuracy": 0.5}
    with pytest.raises(DataError, match="row 1 has no picture in image"):
        reader.read(third)


def test_pictures_as_plain_bytes(tmp_path: Path) -> None:
    rows = [{"image": png(7), "question": "What?", "answer": "A"}]
    write_rows(tmp_path / "test.parquet", rows)
    assert grey(item(benchmark(tmp_path, "realworldqa"), "test-0")) == [7]


# --- SEED-Bench ------------------------------------------------------------------------------------------------------


def seed_question(number: str, kind: int, answer: str, **fields: Any) -> dict[str, Any]:
    choices = {f"choice_{letter}": text for letter, text in zip("abcd", ("One", "Two", "Three", "Four"), strict=True)}
    question = {"question_id": number, "question_type_id": kind, "question": "How many?", "answer": answer}
    return {**question, **choices, "data_type": "image", "data_id": "pic_1", **fields}


def test_seedbench(tmp_path: Path) -> None:
    (tmp_path / "SEED-Bench-image").mkdir()
    (tmp_path / "SEED-Bench-image/pic_1").write_bytes(png(11))
    film = {"data_type": "video", "data_id": "clip.mp4"}
    questions = [
        seed_question("101", 5, "B"),
        seed_question("102", 1, "A"),
        seed_question("103", 5, "D"),
        seed_question("v1", 10, "C", **film),
        seed_question("v2", 11, "C", **film, segment=[0.25, 0.65]),
        seed_question("v3", 12, "A", **film, segment=[2, 4]),
        seed_question("v4", 11, "A", **film, segment=[50, 60]),
        seed_question("104", 2, "A", data_id="none"),
    ]
    names = {name: number for number, name in enumerate(IMAGE_DIMENSIONS + VIDEO_DIMENSIONS, start=1)}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": names}))
    reader = benchmark(tmp_path, "seedbench")
    assert reader.list_ids() == ["101", "102", "103", "104"]
    first = item(reader, "101")
    assert grey(first) == [11]
    assert first.turns[0].text == (
        "How many?\nA. One\nB. Two\nC. Three\nD. Four\nAnswer with the option's letter from the given choices directly."
    )
    scores = score(reader, "seedbench", {"101": "B", "102": "a dog", "103": "The fourth"})
    assert scores["image"] == scores["all"] == pytest.approx(2 / 3)
    assert (scores["Instances Counting"], scores["Scene Understanding"]) == (0.5, 1.0)
    with pytest.raises(DataError, match=r"none: there is no such file .*question '104'.*options\.images"):
        reader.read("104")
    (tmp_path / "films").mkdir()
    write_video(tmp_path / "films/clip.mp4", [np.full((16, 16, 3), 20 * n, np.uint8) for n in range(10)])
    videos = benchmark(tmp_path, "seedbench", part="video", videos="films", frames=2)
    assert [ref.frame for ref in item(videos, "v1").images] == [0, 9]
    whole = benchmark(tmp_path, "seedbench", part="video", videos="films", frames=100)
    assert [ref.frame for ref in item(whole, "v2").images] == [3, 4, 5, 6]  # seconds, at 10 frames a second
    assert [ref.frame for ref in item(whole, "v3").images] == [2, 3, 4]  # frames
    with pytest.raises(
        DataError, match=r"no frame of .*clip\.mp4 lies within its segment \[50, 60\]; the last one is 0"
    ):
        whole.read("v4")
    other = {"questions": questions, "question_type": {"Instance Location": 5, "Action Recognition": 10}}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(other))
    moved = item(benchmark(tmp_path, "seedbench"), "101").question
    assert moved is not None
    assert moved.type == "Instance Location"
    with pytest.raises(DataError, match=r"question '102'.*question_type_id=1 is not one of \[5, 10\]"):
        benchmark(tmp_path, "seedbench").read("102")
    with pytest.raises(ConfigError, match=r"options\.part='sound' is not one of image, video, all"):
        benchmark(tmp_path, "seedbench", part="sound").list_ids()


# --- 3DSRBench -------------------------------------------------------------------------------------------------------

COLUMNS = ["index", "qid", "question", "A", "B", "C", "D", "answer", "category", "image", "image_url"]


def noisy_png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def dsr_row(index: int, qid: str, answer: str, image: str, **fields: str) -> dict[str, str]:
    row = {"question": 'Which is "higher",\nthe lamp or the cup?', "A": "the lamp", "B": "the cup", "C": "nan", "D": ""}
    return {
        **row,
        "index": str(index),
        "qid": qid,
        "answer": answer,
        "category": "height_higher",
        "image": image,
        **fields,
    }


def test_3dsrbench(tmp_path: Path) -> None:
    shown, mirrored = (base64.b64encode(noisy_png(seed)).decode() for seed in (1, 2))
    rows = [
        dsr_row(0, "VIN6MS3J", "A", shown),
        dsr_row(1, "VIN6MS3J-1", "B", "0", A="the cup", B="the lamp"),  # the picture of row 0
        dsr_row(2, "VIN6MS3J-flip", "A", mirrored),
        dsr_row(3, "VIN6MS3J-flip-1", "B", mirrored, A="the cup", B="the lamp"),
        dsr_row(4, "QQQQQQQQ", "A", shown, category="location_above"),
    ]
    write_table(tmp_path / "3dsrbench_v1_vlmevalkit_circular.tsv", rows)
    cache = tmp_path / "cache"
    reader = benchmark(tmp_path, "3dsrbench", cache)
    assert reader.list_ids() == [row["qid"] for row in rows]
    first, rotated, flip = (item(reader, row["qid"]) for row in rows[:3])
    assert load_image(first.images[0]).shape == (6, 8, 3)
    assert first.images == rotated.images != flip.images
    assert Path(first.images[0].path).read_bytes() == noisy_png(1)
    assert Path(flip.images[0].path).read_bytes() == noisy_png(2)
    assert first.turns[0].text == (
        'Question: Which is "higher",\nthe lamp or the cup?\nOptions:\nA. the lamp\nB. the cup\n'
        "Please select the correct answer from the options above."
    )
    assert rotated.question is not None
    assert rotated.question.options == ("A. the cup", "B. the lamp")
    # All variants of the first question are right but one; the second has one variant.
    answers = {"VIN6MS3J": "A", "VIN6MS3J-1": "B", "VIN6MS3J-flip": "B", "VIN6MS3J-flip-1": "(B)", "QQQQQQQQ": "A."}
    scores = score(reader, "3dsrbench", answers)
    assert scores["vanilla"] == pytest.approx(4 / 5)
    assert scores["circular_flip"] == pytest.approx(1 / 2)
    assert (scores["circular_flip/height"], scores["circular_flip/location"]) == (0.0, 1.0)
    assert len(list(cache.iterdir())) == 2


def test_3dsrbench_in_a_manifest(tmp_path: Path) -> None:
    shown = base64.b64encode(noisy_png(1)).decode()
    write_table(tmp_path / "a.tsv", [dsr_row(0, "VIN6MS3J", "A", shown)])
    manifest = index_reader("dsr", benchmark(tmp_path, "3dsrbench", tmp_path / "cache"), "", max_broken=0.0)
    manifest.save(tmp_path / "m.arrow")
    loaded = Manifest.load(tmp_path / "m.arrow")
    record = loaded.scene("VIN6MS3J")
    assert isinstance(record, Item)
    assert record.question is not None
    assert record.question.answer == "A"
    assert loaded.entry("VIN6MS3J").split is Split.TEST
    assert loaded.entry("VIN6MS3J").length > 0


def test_3dsrbench_with_pictures_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/000000000139.png").write_bytes(png(3))
    url = "http://images.cocodataset.org/val2017/000000000139.png"
    rows = [dsr_row(0, "q", "A", "", image_url=url), dsr_row(1, "r", "B", "", image_url="x/missing.png")]
    write_table(tmp_path / "3dsrbench_v1.csv", rows)
    reader = benchmark(tmp_path / "3dsrbench_v1.csv", "3dsrbench", images="coco")
    assert grey(item(reader, "q")) == [3]
    with pytest.raises(DataError, match=r"missing\.png: there is no such file .*options\.images"):
        reader.read("r")


def test_3dsrbench_names_what_is_wrong(tmp_path: Path) -> None:
    shown = base64.b64encode(noisy_png(1)).decode()
    rows = [
        dsr_row(0, "a", "C", shown),
        dsr_row(1, "b", "A", "7"),
        dsr_row(2, "c", "A", shown[:80] + "?" + shown[81:]),
        dsr_row(3, "d", "A", shown, category="colour"),
        dsr_row(4, "e", "A", ""),
    ]
    write_table(tmp_path / "t.tsv", rows)
    reader = benchmark(tmp_path, "3dsrbench", tmp_path / "cache")
    for name, message in (
        ("a", "question 'a': the answer 'C' is no letter of its 2 options"),
        ("b", "its picture is that of row '7', which has none"),
        ("c", "its picture is no base64 text"),
        ("d", "category='colour' is not one of"),
        ("e", "neither 'image' nor 'image_url' says where the picture is"),
    ):
        with pytest.raises(DataError, match=message):
            reader.read(name)
    (tmp_path / "t.tsv").write_text("qid\tquestion\nq\n")
    with pytest.raises(DataError, match=r"t\.tsv: row 2 has 1 cells, the header names 2"):
        benchmark(tmp_path, "3dsrbench").list_ids()


# --- CV-Bench --------------------------------------------------------------------------------------------------------


def cv_row(idx: int, source: str, task: str, answer: str, **fields: Any) -> dict[str, Any]:
    kind = "3D" if source == "Omni3D" else "2D"
    asked = "How many?\nSelect from the following choices.\n(A) 1\n(B) 2"
    row = {"idx": idx, "type": kind, "task": task, "question": "How many?", "choices": ["1", "2"], "answer": answer}
    return {**row, "prompt": asked, "source": source, "filename": f"{kind}/{idx}.png", **fields}


CV = [
    cv_row(0, "ADE20K", "Count", "(A)"),
    cv_row(1, "COCO", "Relation", "(B)"),
    cv_row(2638, "Omni3D", "Depth", "(B)"),
]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_cvbench(tmp_path: Path, form: str) -> None:
    if form == "parquet":
        write_rows(tmp_path / "test_2d.parquet", [row | {"image": picture(row["idx"] + 1)} for row in CV[:2]])
        write_rows(tmp_path / "test_3d.parquet", [CV[2] | {"image": picture(9)}])
    else:
        for row, value in zip(CV, (1, 2, 9), strict=True):
            path = tmp_path / "img" / row["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(value))
        (tmp_path / "test_2d.jsonl").write_text("\n".join(json.dumps(row) for row in CV[:2]) + "\n")
        (tmp_path / "test_3d.jsonl").write_text(json.dumps(CV[2]))
    reader = benchmark(tmp_path, "cvbench")
    assert reader.list_ids() == ["0", "1", "2638"]
    first, last = item(reader, "0"), item(reader, "2638")
    assert (grey(first), grey(last)) == ([1], [9])
    assert first.turns[0].text == (
        "How many?\nSelect from the following choices.\n(A) 1\n(B) 2\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert first.question is not None
    assert (first.question.type, first.question.answer) == ("ADE20K/Count", "A")
    assert first.question.options == ("A. 1", "B. 2")
    scores = score(reader, "cvbench", {"0": "(A)", "1": "A", "2638": "b) 2"})
    # 2D (1 + 0) / 2, 3D 1.
    assert (scores["2D"], scores["3D"], scores["combined"]) == (0.5, 1.0, 0.75)
    one = benchmark(tmp_path / f"test_3d.{form}", "cvbench")
    assert one.list_ids() == ["2638"]
    assert grey(item(one, "2638")) == [9]


def test_cvbench_names_what_is_wrong(tmp_path: Path) -> None:
    rows = [cv_row(0, "SUN", "Count", "(A)"), cv_row(1, "COCO", "Taste", "(A)"), cv_row(2, "COCO", "Count", "(C)")]
    write_rows(tmp_path / "test_2d.parquet", [row | {"image": picture(1)} for row in rows])
    reader = benchmark(tmp_path, "cvbench")
    for name, message in (
        ("0", r"test_2d\.parquet: row 0: source='SUN' is not one of ADE20K, COCO, Omni3D"),
        ("1", "row 1: task='Taste' is not one of Count"),
        ("2", "row 2: the answer 'C' is no letter of its 2 choices"),
    ):
        with pytest.raises(DataError, match=message):
            reader.read(name)
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/test_2d.jsonl").write_text(json.dumps(cv_row(0, "COCO", "Count", "(A)")))
    with pytest.raises(DataError, match=r"2D/0\.png: there is no such file .*line 1.*options\.images"):
        benchmark(tmp_path / "lines", "cvbench").read("0")


# --- ViewSpatial-Bench -----------------------------------------------------------------------------------------------


def seen(kind: str, answer: str, names: list[str]) -> dict[str, Any]:
    choices = "A. left\nB. front-up\nC. back\nD. right"
    question = "Where is the lamp?"
    return {"question_type": kind, "image_path": names, "question": question, "answer": answer, "choices": choices}


@pytest.mark.parametrize("layout", ["repository", "download", "parquet"])
def test_viewspatial(tmp_path: Path, layout: str) -> None:
    names = [f"ViewSpatial-Bench/scannetv2_val/scene0011_00/original_images/{n}.jpg" for n in (20, 280)]
    person = "Person perspective - Scene Simulation Relative Direction"
    records = [
        seen("Camera perspective - Relative Direction", "B. front-up", names[:1]),
        seen(person, "A. left", names),
    ]
    if layout == "parquet":
        shown = [[picture(20)], [picture(20), picture(28)]]
        rows = [
            {k: v for k, v in record.items() if k != "image_path"} | {"images": images}
            for record, images in zip(records, shown, strict=True)
        ]
        write_rows(tmp_path / "data/test-00000-of-00001.parquet", rows)
    else:
        # The code's repository has the folder beside eval/, a download is the folder itself.
        home = tmp_path / "eval" if layout == "repository" else tmp_path
        for name, value in zip(names, (20, 28), strict=True):
            place = tmp_path / (name if layout == "repository" else Path(name).relative_to("ViewSpatial-Bench"))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(value))
        home.mkdir(exist_ok=True)
        (home / "ViewSpatial-Bench.json").write_text(json.dumps(records))
    reader = benchmark(tmp_path, "viewspatial")
    first, second = reader.list_ids()
    one, two = item(reader, first), item(reader, second)
    assert (grey(one), grey(two)) == ([20], [20, 28])
    assert one.turns[0].text == (
        "Question: Where is the lamp?\nChoices: A. left\nB. front-up\nC. back\nD. right\n"
        "Reply only to the corresponding option.\nAnswer:"
    )
    assert one.question is not None
    assert (one.question.answer, one.question.options[1]) == ("B", "B. front-up")
    scores = score(reader, "viewspatial", {first: "B. front-up", second: "It is D"})
    assert scores == {"Camera perspective - Relative Direction": 1.0, person: 0.0, "accuracy": 0.5}


def test_viewspatial_names_what_is_wrong(tmp_path: Path) -> None:
    kind = "Camera perspective - Relative Direction"
    records = [
        seen("Cat perspective", "A. left", ["x.jpg"]),
        seen(kind, "A. up", ["x.jpg"]),
        seen(kind, "A. left", []),
        seen(kind, "A. left", ["ViewSpatial-Bench/gone.jpg"]),
    ]
    (tmp_path / "x.jpg").write_bytes(png(1))
    (tmp_path / "ViewSpatial-Bench.json").write_text(json.dumps(records))
    reader = benchmark(tmp_path, "viewspatial")
    for name, message in (
        ("0", "question 0: question_type='Cat perspective' is not one of"),
        ("1", r"question 1: the answer 'A\. up' is not one of its choices"),
        ("2", "question 2: 'image_path' must be a list of names"),
        ("3", r"gone\.jpg: there is no such file .*question 3.*options\.images"),
    ):
        with pytest.raises(DataError, match=message):
            reader.read(name)
    (tmp_path / "ViewSpatial-Bench.json").write_text("{}")
    with pytest.raises(DataError, match="must hold a list of questions, holds dict"):
        benchmark(tmp_path, "viewspatial").list_ids()


# --- settings --------------------------------------------------------------------------------------------------------


def test_how_a_benchmark_is_asked_can_be_told() -> None:
    assert set(READERS) == set(SCORERS) - {"plain", "vsibench-words"}
    for name in READERS:
        told = protocol({"name": name})
        assert told["frames"] == 32
        assert told["prompt"]
        assert told["frame_choice"]
    assert protocol({"name": "vsibench", "frames": 8})["frames"] == 8
    assert [name for name in READERS if protocol({"name": name})["max_new_tokens"]] == ["vsibench"]
    assert "linspace" in protocol({"name": "vsibench"})["frame_choice"]
    with pytest.raises(ConfigError, match="did you mean 'cvbench'"):
        protocol({"name": "cv_bench"})


def test_names_and_numbers_of_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"options\.name='blnk' is not one of .*did you mean 'blink'"):
        benchmark(tmp_path, "blnk").list_ids()
    with pytest.raises(ConfigError, match=r"options\.frames=0 must be a whole number of at least 1"):
        benchmark(tmp_path, "blink", frames=0).list_ids()
    with pytest.raises(ConfigError, match=r"options\.frames=True must be a whole number of at least 1"):
        benchmark(tmp_path, "blink", frames=True).list_ids()
    with pytest.raises(DataError, match=r"no benchmark scenes or items below it \(blink: expected <Task>/val"):
        benchmark(tmp_path, "blink").list_ids()
