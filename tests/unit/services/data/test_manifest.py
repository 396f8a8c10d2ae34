"""Manifests: what they name, that they survive a move and notice a change, and that a damaged one says so."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.schema import SourceConfig, StorageConfig
from services.contracts import ImageRef, Item, Scene, Split, Turn, View
from services.data.codec import BLOCK, decode_views, encode
from services.data.images import load_depth, load_image
from services.data.ingest import index_reader
from services.data.manifest import Facts, Manifest
from services.data.readers import open_reader
from services.data.rows import Row
from services.data.sources import index_source
from services.errors import DataError
from tests.support.layouts import SMALL_K, save_color, small_views, write_scannet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name, split in (("a", "train"), ("b", "train"), ("c", "val"), ("d", "test")):
        write_scannet(folder, name, views=small_views(), camera=SMALL_K, split=split)
    # Scenes that are the same to the pixel would hide a mix-up of rows.
    save_color(folder / "scans/b/color/0.png", np.full((18, 24, 3), 7, np.uint8))
    return folder


def index(root: Path, **settings: object) -> Manifest:
    reader = open_reader(root, SourceConfig(format="scannet", **settings))
    return index_reader("mine", reader, "settings", max_broken=0.0)


def test_entries_splits_and_scenes(root: Path) -> None:
    manifest = index(root)
    assert manifest.ids == ["a", "b", "c", "d"]
    assert [entry.id for entry in manifest.of_split(Split.TRAIN)] == ["a", "b"]
    assert manifest.splits() == {"train": 2, "val": 1, "test": 1}
    entry = manifest.entry("b")
    assert (entry.kind, entry.split, entry.n_views, entry.scene_type) == ("scene", Split.TRAIN, 2, "office")
    picture = root / "scans/b/color/0.png"
    assert entry.digests[0] == hashlib.sha256(picture.read_bytes()).hexdigest()
    assert entry.digests[1] == manifest.entry("a").digests[1]
    assert list(manifest.entries)[1] == manifest.entries[-3] == entry
    assert manifest.count_views() == 8
    assert manifest.classes[2] == "chair"


def test_scenes_come_back_whole_with_absolute_paths(root: Path) -> None:
    manifest = index(root)
    reader = open_reader(root, SourceConfig(format="scannet"))
    assert manifest.scene("c") == reader.read("c")
    scene = manifest.scene("b")
    assert isinstance(scene, Scene)
    assert load_image(scene.views[0].image)[0, 0].tolist() == [7, 7, 7]
    assert scene.views[0].depth is not None
    assert load_depth(scene.views[0].depth).shape == (18, 24)


def long_row(record: Scene | Item) -> Row:
    """A row of a record whose files nobody reads."""
    refs = [view.image for view in record.views] if isinstance(record, Scene) else record.images
    bare, views = encode(record, lambda path: path.removeprefix("/base/"))
    return Row(
        id=record.id,
        kind="scene" if isinstance(record, Scene) else "item",
        split=record.split,
        scene_type=record.scene_type if isinstance(record, Scene) else record.label,
        length=0,
        digests=tuple(hashlib.sha256(ref.path.encode()).digest() for ref in refs),
        content=bytes(32),
        record=bare,
        views=views,
        guards=(),
    )


def test_single_views_come_without_the_rest_of_their_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    images = tuple(ImageRef(path=f"/base/s/{i}.png") for i in range(2 * BLOCK + 3))
    scene = Scene(
        id="s",
        views=tuple(View(image=image, timestamp=i / 7) for i, image in enumerate(images)),
        scene_type="office",
    )
    item = Item(id="i", images=images, label="cat")
    bare = Item(id="text", turns=(Turn(role="user", text="hello"),))
    manifest = Manifest.build(Facts(name="mine", root="/base", settings=""), map(long_row, (scene, item, bare)))
    assert [manifest.scene(record.id) for record in (scene, item, bare)] == [scene, item, bare]
    places = [0, 2 * BLOCK + 2, BLOCK - 1, BLOCK, 3, 3]
    assert manifest.digests("s", places) == [manifest.entry("s").digests[place] for place in places]
    assert manifest.views("i", places) == [View(image=images[place]) for place in places]
    assert manifest.scene_types == ("cat", "office")
    assert [manifest.scene_type(name) for name in ("s", "i", "text")] == ["office", "cat", None]
    decoded = []
    monkeypatch.setattr(
        "services.data.manifest.decode_views", lambda *block: decoded.append(block) or decode_views(*block)
    )
    assert manifest.views("s", places) == [scene.views[place] for place in places]
    assert manifest.views("s", places[::-1]) == [scene.views[place] for place in places[::-1]]
    assert len(decoded) == 3
    for wrong in (-1, 2 * BLOCK + 3):
        for ask in (manifest.views, manifest.digests):
            with pytest.raises(DataError, match=rf"'mine': 's' has 19 views, not \[{wrong}\]; index the source again"):
                ask("s", [0, wrong])
    with pytest.raises(DataError, match=r"'text' has 0 views, not \[0\]"):
        manifest.views("text", [0])


def test_saved_and_loaded_it_is_the_same(root: Path, tmp_path: Path) -> None:
    manifest = index(root)
    path = tmp_path / "m/manifest.arrow"
    manifest.save(path)
    loaded = Manifest.load(path)
    assert (loaded.digest, loaded.facts, loaded.classes) == (manifest.digest, manifest.facts, manifest.classes)
    assert list(loaded.entries) == list(manifest.entries)
    assert loaded.scene("d") == manifest.scene("d")
    assert list(loaded.rows(loaded.ids)) == list(manifest.rows(manifest.ids))
    assert [p.name for p in path.parent.iterdir()] == ["manifest.arrow"]
    sent = pickle.loads(pickle.dumps(loaded))
    assert (sent.digest, sent.scene("b")) == (manifest.digest, manifest.scene("b"))


def test_the_digest_is_of_content_and_not_of_places_or_times(root: Path, tmp_path: Path) -> None:
    digest = index(root).digest
    moved = shutil.copytree(root, tmp_path / "elsewhere/copy")
    for path in moved.rglob("*.png"):
        os.utime(path, (1, 1))
    assert index(moved).digest == digest


@pytest.mark.parametrize("change", ["pixels", "pose", "depth", "mask", "split", "id", "label table"])
def test_the_digest_names_everything_that_is_found(root: Path, change: str) -> None:
    before = index(root).digest
    scene = root / "scans/c"
    if change == "pixels":
        save_color(scene / "color/0.png", np.zeros((18, 24, 3), np.uint8))
    elif change == "pose":
        text = (scene / "pose/0.txt").read_text()
        (scene / "pose/0.txt").write_text(text.replace("1.4", "1.5"))
    elif change == "depth":
        shutil.copy(scene / "depth/10.png", scene / "depth/0.png")
    elif change == "mask":
        shutil.copy(scene / "label-filt/10.png", scene / "label-filt/0.png")
    elif change == "split":
        (root / "splits/val.txt").rename(root / "splits/keep.txt")
    elif change == "id":
        scene.rename(root / "scans/e")
        for path in (root / "scans/e").glob("c*"):
            path.rename(path.with_name(path.name.replace("c", "e", 1)))
    else:
        table = root / "scannetv2-labels.combined.tsv"
        table.write_text(table.read_text().replace("chair\t4", "stool\t4"))
    assert index(root).digest != before


def test_revalidation_reads_only_what_another_stamp_points_at(root: Path) -> None:
    manifest = index(root)
    unchanged = manifest.revalidate()
    assert not unchanged
    assert (unchanged.touched, unchanged.rehashed) == (0, 0)

    os.utime(root / "scans/a/color/0.png", (1, 1))
    touched = manifest.revalidate()
    assert not touched
    assert (touched.touched, touched.rehashed) == (1, 1)
    assert touched.manifest.digest == manifest.digest
    # The new stamp is kept, so the next time nothing is read.
    assert touched.manifest.revalidate().rehashed == 0

    save_color(root / "scans/b/color/10.png", np.zeros((18, 24, 3), np.uint8))
    (root / "scans/d/pose/0.txt").unlink()
    changed = touched.manifest.revalidate()
    assert changed.changed == {"b": "scans/b/color/10.png", "d": "scans/d/pose/0.txt"}
    assert changed.rehashed == 1
    assert changed.shared == ()


def test_a_frame_that_is_added_is_noticed(root: Path) -> None:
    manifest = index(root)
    color = root / "scans/b/color"
    shutil.copy(color / "0.png", color / "20.png")
    assert manifest.revalidate().changed == {"b": "scans/b/color"}


def test_a_file_of_all_scenes_that_changes_concerns_all(root: Path) -> None:
    manifest = index(root)
    with (root / "splits/test.txt").open("a") as file:
        file.write("e\n")
    changes = manifest.revalidate()
    assert changes
    assert changes.shared == ("splits/test.txt",)


def test_indexing_again_rereads_only_what_changed(root: Path, tmp_path: Path) -> None:
    source, storage = SourceConfig(format="scannet", root=str(root)), StorageConfig(root=str(tmp_path / "storage"))
    first, report = index_source("mine", source, storage, max_broken=0.0)
    assert (report.reused, report.entries, report.views) == (0, 4, 8)
    again, report = index_source("mine", source, storage, max_broken=0.0)
    assert again.digest == first.digest
    assert (report.reused, report.changed) == (4, {})

    shutil.copy(root / "scans/c/pose/10.txt", root / "scans/c/pose/0.txt")
    third, report = index_source("mine", source, storage, max_broken=0.0)
    assert third.digest != first.digest
    assert report.reused == 3
    assert report.changed == {"c": "scans/c/pose/0.txt"}
    assert third.digest == index(root).digest

    shutil.rmtree(root / "scans/a")
    write_scannet(root, "e", views=small_views(), camera=SMALL_K, split="train")
    last, _ = index_source("mine", source, storage, max_broken=0.0)
    assert last.ids == ["b", "c", "d", "e"]
    assert Manifest.load(report.path).digest == last.digest


def test_a_list_of_all_scenes_that_appears_is_noticed(root: Path, tmp_path: Path) -> None:
    source, storage = SourceConfig(format="scannet", root=str(root)), StorageConfig(root=str(tmp_path / "storage"))
    table = root / "scannetv2-labels.combined.tsv"
    text = table.read_text()
    table.unlink()
    first, _ = index_source("mine", source, storage, max_broken=0.0)
    assert first.classes == ()
    table.write_text(text)
    second, report = index_source("mine", source, storage, max_broken=0.0)
    assert second.classes[2] == "chair"
    assert report.reused == 0


def test_a_storage_that_cannot_be_written_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = SourceConfig(format="scannet", root=str(root))
    with pytest.raises(DataError, match=r"file/manifests/mine-.*storage\.root must be a folder"):
        index_source("mine", source, StorageConfig(root=str(tmp_path / "file")), max_broken=0.0)


def test_settings_have_manifests_of_their_own(root: Path, tmp_path: Path) -> None:
    storage = StorageConfig(root=str(tmp_path / "storage"))
    sizes = {}
    for stride in (1, 2):
        source = SourceConfig(format="scannet", root=str(root), frame_stride=stride)
        manifest, report = index_source("mine", source, storage, max_broken=0.0)
        sizes[report.path] = manifest.count_views()
    assert sorted(sizes.values()) == [4, 8]


def test_a_damaged_manifest_is_named_and_made_again(root: Path, tmp_path: Path) -> None:
    source, storage = SourceConfig(format="scannet", root=str(root)), StorageConfig(root=str(tmp_path / "storage"))
    manifest, report = index_source("mine", source, storage, max_broken=0.0)
    path = Path(report.path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", bytes(flipped), whole + b"x", b"no manifest at all" * 9):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"mine-.*\.arrow.*damaged.*makes it again"):
            Manifest.load(path)
        again, report = index_source("mine", source, storage, max_broken=0.0)
        assert again.digest == manifest.digest
        assert report.reused == 0
    with pytest.raises(DataError, match="no such manifest"):
        Manifest.load(tmp_path / "none.arrow")


def test_unknown_ids_and_twice_the_same_id_are_errors(root: Path) -> None:
    manifest = index(root)
    with pytest.raises(DataError, match=r"'mine' has no scene or item 'z'"):
        manifest.scene("z")
    rows = list(manifest.rows(["a", "a"]))
    with pytest.raises(DataError, match="'a' occurs twice"):
        Manifest.build(Facts(name="x", root="/", settings=""), rows)
