"""Pictures without poses, and corpora of images and conversations."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.schema import SourceConfig
from services.contracts import Item, Scene, Split, Turn
from services.data.images import load_image
from services.data.ingest import index_reader
from services.data.manifest import Manifest
from services.data.readers import Reader, open_reader
from services.errors import ConfigError, DataError
from tests.support.analytic import poses, shots
from tests.support.films import write_video
from tests.support.layouts import RIGHT, save_color


def picture(value: int) -> np.ndarray:
    return np.full((6, 8, 3), value, np.uint8)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(value)).save(buffer, format="PNG")
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def corpus(root: Path, **options: Any) -> Reader:
    return open_reader(root, SourceConfig(format="corpus", options=options))


def item(reader: Reader, item_id: str) -> Item:
    found = reader.read(item_id)
    assert isinstance(found, Item)
    return found


# --- images ----------------------------------------------------------------------------------------------------------


def test_folders_and_videos_are_scenes(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        save_color(tmp_path / f"walk/frame{number}.png", picture(number))
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "clip.mp4", [np.full((48, 64, 3), 40 * number + 20, np.uint8) for number in range(5)])
    reader = open_reader(tmp_path, SourceConfig(format="images", frame_stride=2))
    assert reader.list_ids() == ["clip", "walk"]
    walk, clip = reader.read("walk"), reader.read("clip")
    assert isinstance(walk, Scene)
    assert isinstance(clip, Scene)
    assert [Path(view.image.path).name for view in walk.views] == ["frame1.png", "frame10.png"]
    assert [view.image.frame for view in clip.views] == [0, 2, 4]
    assert [view.timestamp for view in clip.views] == pytest.approx([0.0, 0.2, 0.4])
    assert all(view.K is None and view.pose is None for view in walk.views + clip.views)


def test_a_folder_of_views_is_read_to_the_pixel_and_in_order(tmp_path: Path) -> None:
    """Without poses, the order is all the geometry there is: with the true cameras the views reproject."""
    from tests.support.analytic import K, reprojection_error

    truth = shots()
    for number, shot in enumerate(truth):
        save_color(tmp_path / f"{number + 8}.png", shot.color)
    scene = open_reader(tmp_path, SourceConfig(format="images")).read(tmp_path.name)
    assert isinstance(scene, Scene)
    sides = [
        (load_image(view.image), shot.depth, K, pose)
        for view, shot, pose in zip(scene.views, truth, poses(), strict=True)
    ]
    assert max(reprojection_error(sides[i], sides[j])[0] for i in range(4) for j in range(4) if i != j) < RIGHT
    swapped = (sides[0], (sides[2][0], *sides[1][1:]))
    assert reprojection_error(*swapped)[0] > 10 * RIGHT


def test_one_video_is_one_scene_with_a_digest_a_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", [picture(50)] * 4)
    reader = open_reader(tmp_path / "clip.mp4", SourceConfig(format="images"))
    manifest = index_reader("video", reader, "", max_broken=0.0)
    assert manifest.ids == ["clip"]
    entry = manifest.entry("clip")
    assert entry.n_views == len(set(entry.digests)) == 4
    scene = manifest.scene("clip")
    assert isinstance(scene, Scene)
    assert load_image(scene.views[3].image).shape == (6, 8, 3)


# --- corpora ---------------------------------------------------------------------------------------------------------


def test_folders_are_classes_and_splits(tmp_path: Path) -> None:
    save_color(tmp_path / "train/cat/1.png", picture(1))
    save_color(tmp_path / "val/dog/1.jpg", picture(2))
    save_color(tmp_path / "val/dog/1.png", picture(2))
    reader = corpus(tmp_path)
    assert reader.list_ids() == ["train/cat/1", "val/dog/1", "val/dog/1.png"]
    cat, dog = item(reader, "train/cat/1"), item(reader, "val/dog/1")
    assert (cat.label, cat.split, dog.label, dog.split) == ("cat", Split.TRAIN, "dog", Split.VAL)
    assert load_image(cat.images[0]).tolist() == picture(1).tolist()


LLAVA = {
    "id": "17",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A wall."}],
}


def test_llava_json(tmp_path: Path) -> None:
    save_color(tmp_path / "images/a.png", picture(5))
    text_only = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]}
    both = {**LLAVA, "image": ["a.png", "a.png"]}
    (tmp_path / "data.json").write_text(json.dumps([LLAVA, text_only, both]))
    reader = corpus(tmp_path / "data.json", images="images")
    assert reader.list_ids() == ["17", "1", "17-2"]
    first = item(reader, "17")
    assert first.turns == (Turn(role="user", text="<image>\nWhat?"), Turn(role="assistant", text="A wall."))
    assert load_image(first.images[0])[0, 0].tolist() == [5, 5, 5]
    assert item(reader, "1").images == ()
    assert item(reader, "1").turns[0].role == "system"
    assert len(item(reader, "17-2").images) == 2


def test_json_lines(tmp_path: Path) -> None:
    save_color(tmp_path / "a.png", picture(6))
    lines = [
        {"id": "x", "image": "a.png", "caption": "A grey wall, größer."},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "data.jsonl").write_text(text.replace("\n", "\n\n") + "\n")
    reader = corpus(tmp_path / "data.jsonl")
    assert reader.list_ids() == ["x", "1"]
    assert item(reader, "x").turns == (Turn(role="assistant", text="A grey wall, größer."),)
    assert item(reader, "1").turns[0] == Turn(role="user", text="q")


def test_webdataset_archives(tmp_path: Path) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as archive:
            add(archive, "0001.png", png(10 * number + 1))
            add(archive, "0001.txt", b"a caption\n")
            add(archive, "dir/0002.json", json.dumps({"conversations": LLAVA["conversations"]}).encode())
            add(archive, "dir/0002.left.png", png(3))
            add(archive, "dir/0002.right.png", png(4))
            add(archive, "dir/0002.cls", b"7")
    reader = corpus(tmp_path)
    assert reader.list_ids() == ["shard-0/0001", "shard-0/dir/0002", "shard-1/0001", "shard-1/dir/0002"]
    one, two = item(reader, "shard-1/0001"), item(reader, "shard-0/dir/0002")
    assert load_image(one.images[0])[0, 0, 0] == 11
    assert one.turns[0].text == "a caption"
    assert [int(load_image(ref)[0, 0, 0]) for ref in two.images] == [3, 4]
    assert two.label == "7"
    assert two.turns[1].text == "A wall."


@pytest.mark.parametrize("images", ["struct", "bytes", "paths"])
def test_parquet(tmp_path: Path, images: str) -> None:
    save_color(tmp_path / "a.png", picture(9))
    column = {
        "struct": [{"bytes": png(9), "path": None}, {"bytes": png(8), "path": None}],
        "bytes": [png(9), png(8)],
        "paths": ["a.png", "a.png"],
    }[images]
    table = {"image": column, "caption": ["one", "two"], "label": [3, 4]}
    pq.write_table(pa.table(table), tmp_path / "part.parquet")
    reader = corpus(tmp_path)
    assert reader.list_ids() == ["part-0", "part-1"]
    two = item(reader, "part-1")
    assert (two.label, two.turns[0].text) == ("4", "two")
    assert load_image(two.images[0])[0, 0, 0] == (9 if images == "paths" else 8)


def test_an_item_without_turns_or_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "e"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: line 1: the record has neither an image nor text"):
        corpus(tmp_path / "a.jsonl").read("e")
    with pytest.raises(ConfigError, match=r"options\.layout='zip' is not one of"):
        corpus(tmp_path / "a.jsonl", layout="zip").list_ids()


def test_items_in_a_manifest(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(40):
            add(archive, f"{number:04d}.png", png(number))
            add(archive, f"{number:04d}.txt", b"12345678" * (number + 1))
    reader = corpus(tmp_path)
    manifest = index_reader("corpus", reader, "", max_broken=0.0)
    manifest.save(tmp_path / "m.arrow")
    loaded = Manifest.load(tmp_path / "m.arrow")
    entry = loaded.entry("0007")
    assert (entry.kind, entry.n_views, entry.length) == ("item", 1, 16)
    assert loaded.scene("0007") == item(reader, "0007")
    # 80/10/10 by the hash of the id: the same whatever else is in the source.
    splits = {e.id: e.split for e in loaded.entries}
    assert set(splits.values()) == set(Split)
    only = open_reader(tmp_path, SourceConfig(format="corpus", limit=5))
    assert {i: only.split_of(i) for i in only.list_ids()} == {i: splits[i] for i in only.list_ids()}
    assert not loaded.revalidate()
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        add(archive, "9999.png", png(1))
    changes = loaded.revalidate()
    assert len(changes.changed) == 40
    assert set(changes.changed.values()) == {"a.tar"}
