"""Corpora of pictures and conversations, each under its own option: from the published files to supervised tokens."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import configs
from services.contracts import Item
from services.data.images import load_image
from services.data.sources import open_sources
from services.streams.text import TextColumns

TOKENS = 4


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path, *names: str) -> None:
    for value, name in enumerate(names, start=1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def write_list(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(records)))
    return f"root={path}"


def write_lcs558k(folder: Path) -> list[str]:
    """Pictures beside the list, numbered folders, the mark before or behind the request."""
    write_pictures(folder, "00453/004539375.png", "00149/001490210.png")
    records = [
        {"id": "00453", "image": "00453/004539375.png", "conversations": talk("Describe.\n<image>", "a sofa")},
        {"id": "00149", "image": "00149/001490210.png", "conversations": talk("<image>\nWhat is it?", "a lamp")},
    ]
    return [write_list(folder / "blip_laion_cc_sbu_558k.json", records)]


def write_sharegpt4v(folder: Path) -> list[str]:
    """Pictures of several collections under a folder of their own; records without a picture; several turns."""
    write_pictures(folder / "images", "coco/train2017/000000000009.png", "sam/images/sa_1.png")
    records = [
        {
            "id": "000000000009",
            "image": "coco/train2017/000000000009.png",
            "conversations": talk("<image>\nWhat is there?", "a tray", "And in it?", "fruit"),
        },
        {"id": "sa_1", "image": "sam/images/sa_1.png", "conversations": talk("<image>\nDescribe.", "a room")},
        {"id": "text-1", "conversations": talk("Add 2 and 3.", "5")},
    ]
    root = write_list(folder / "lists" / "sharegpt4v_mix.json", records)
    return [root, f"options.images={folder / 'images'}"]


def write_allava(folder: Path) -> list[str]:
    """As published, with fields that nothing here reads."""
    write_pictures(folder / "images", "allava_laion/images/7.png")
    record = {
        "id": "allava_laion_inst_7",
        "image": "allava_laion/images/7.png",
        "conversations": talk("<image>\nHow many doors?", "Two."),
        "url": "nowhere",
    }
    return [write_list(folder / "ALLaVA-Instruct.json", [record]), f"options.images={folder / 'images'}"]


def write_spar(folder: Path) -> list[str]:
    """JSON lines in folders; several pictures, marked or not."""
    write_pictures(folder / "images", "scannet/a.png", "scannet/b.png")
    lines = {
        "scannet/one.jsonl": {"id": "1", "image": ["scannet/a.png"], "conversations": talk("How far is it?", "2.1")},
        "scannet/two.jsonl": {
            "id": "2",
            "image": ["scannet/a.png", "scannet/b.png"],
            "conversations": talk("<image>\n<image>\nWhich is nearer?", "the chair"),
        },
    }
    for name, record in lines.items():
        path = folder / "qa" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n")
    return [f"root={folder / 'qa'}", f"options.images={folder / 'images'}"]


def write_emova(folder: Path) -> list[str]:
    """Parquet with the pictures' bytes in it."""
    pictures = [{"bytes": png(1), "path": "1.png"}, {"bytes": png(2), "path": "2.png"}]
    said = [talk("<image>\nWhat colour?", "black"), talk("<image>\nIs it dark?", "yes", "Why?", "night")]
    table = pa.table({"id": ["e1", "e2"], "image": pictures, "conversations": said})
    (folder / "part").mkdir(parents=True)
    pq.write_table(table, folder / "part" / "train-00000.parquet")
    return [f"root={folder / 'part'}"]


@pytest.mark.parametrize(
    ("name", "write", "answers", "reds"),
    [
        ("lcs558k", write_lcs558k, {"00453": "a sofa", "00149": "a lamp"}, {"00453": [1], "00149": [2]}),
        (
            "sharegpt4v",
            write_sharegpt4v,
            {"000000000009": "a trayfruit", "sa_1": "a room", "text-1": "5"},
            {"000000000009": [1], "sa_1": [2], "text-1": []},
        ),
        ("allava", write_allava, {"allava_laion_inst_7": "Two."}, {"allava_laion_inst_7": [1]}),
        ("spar", write_spar, {"1": "2.1", "2": "the chair"}, {"1": [1], "2": [1, 2]}),
        ("emova", write_emova, {"e1": "black", "e2": "yesnight"}, {"e1": [1], "e2": [2]}),
    ],
)
def test_a_corpus_by_its_name(
    name: str, write: Any, answers: dict[str, str], reds: dict[str, list[int]], tmp_path: Path
) -> None:
    given = [f"data.sources.{name}.{setting}" for setting in write(tmp_path / "data")]
    config = configs.load([f"data={name}", *given, f"storage.root={tmp_path / 'storage'}"])
    manifest = open_sources(config)[name]
    assert sorted(manifest.ids) == sorted(answers)
    columns = TextColumns(config, TOKENS)
    for record_id, answer in answers.items():
        item = manifest.scene(record_id)
        assert isinstance(item, Item)
        assert [load_image(image)[0, 0].tolist() for image in item.images] == [[red, 0, 0] for red in reds[record_id]]
        record = columns.conversation(item)
        ids, supervised = record["input_ids"].data, record["supervised"].data
        assert columns.decode(ids[supervised]) == answer
        assert columns.pieces(ids).count("<|image|>") == TOKENS * len(item.images)
