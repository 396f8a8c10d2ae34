"""The rooms as files: layout, determinism, resuming, refusals, textures."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from configs.schema import RoomsConfig
from services.data.rooms import GENERATOR_VERSION, build_room, make_rooms, plan_rooms, rooms_digest
from services.data.rooms.make import _make_one
from services.data.rooms.patterns import PATTERNS, SIZE
from services.data.rooms.render import Renderer
from services.data.rooms.textures import Atlas
from services.data.rooms.write import cameras
from services.errors import DataError

CONFIG = RoomsConfig(scenes=3, views=3, width=64, height=48, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_rooms(CONFIG, tmp_path_factory.mktemp("rooms") / "made")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scans(folder: Path) -> list[Path]:
    return sorted((folder / "scans").iterdir())


def matrix(path: Path) -> np.ndarray:
    return np.loadtxt(path)


# --- layout


def test_layout_is_scannets(folder):
    assert (folder / "scannetv2-labels.combined.tsv").is_file()
    listed = [(folder / "splits" / f"{s}.txt").read_text().split() for s in ("train", "val", "test")]
    assert all(listed)
    names = sorted(name for names in listed for name in names)
    assert names == [p.name for p in scans(folder)] == sorted(p.id for p in plan_rooms(1, 3))
    for scan in scans(folder):
        for kind in ("color", "depth", "instance-filt", "label-filt"):
            assert sorted(p.name for p in (scan / kind).iterdir()) == ["0.png", "1.png", "2.png"]
        assert sorted(p.name for p in (scan / "pose").iterdir()) == ["0.txt", "1.txt", "2.txt"]
        ends = ("aggregation.json", "txt")
        tails = ("vh_clean_2.ply", "vh_clean_2.0.010000.segs.json")
        assert all((scan / f"{scan.name}.{end}").is_file() for end in ends)
        assert all((scan / f"{scan.name}_{tail}").is_file() for tail in tails)
        assert (scan / "done").is_file()


def test_files_say_what_the_scene_is(folder):
    for plan in plan_rooms(1, 3):
        scan = folder / "scans" / plan.id
        room = build_room(CONFIG, plan.index)
        renderer = Renderer(room)
        K, poses = cameras(room, renderer, CONFIG)
        facts = dict(line.split(" = ") for line in (scan / f"{plan.id}.txt").read_text().splitlines())
        assert facts["sceneType"] == plan.type
        alignment = np.array([float(x) for x in facts["axisAlignment"].split()]).reshape(4, 4)
        np.testing.assert_allclose(alignment, room.axis_alignment, atol=1e-9)
        np.testing.assert_allclose(matrix(scan / "intrinsic/intrinsic_color.txt")[:3, :3], K.matrix(), rtol=1e-9)
        for i, pose in enumerate(poses):
            np.testing.assert_allclose(matrix(scan / f"pose/{i}.txt"), pose, atol=1e-9)
            picture = renderer.picture(pose, K)
            depth = np.asarray(Image.open(scan / f"depth/{i}.png"))
            assert depth.dtype == np.uint16
            assert depth.min() > 0
            assert np.abs(depth / 1000.0 - picture.depth).max() <= 0.00051
            np.testing.assert_array_equal(np.asarray(Image.open(scan / f"color/{i}.png")), picture.color)
            np.testing.assert_array_equal(np.asarray(Image.open(scan / f"instance-filt/{i}.png")), picture.instance)
            np.testing.assert_array_equal(np.asarray(Image.open(scan / f"label-filt/{i}.png")), picture.label)


def test_aggregation_gives_instances_boxes_and_segments(folder):
    for plan in plan_rooms(1, 3):
        scan = folder / "scans" / plan.id
        groups = json.loads((scan / f"{plan.id}.aggregation.json").read_text())["segGroups"]
        segments = np.array(json.loads((scan / f"{plan.id}_vh_clean_2.0.010000.segs.json").read_text())["segIndices"])
        mesh = trimesh.load(scan / f"{plan.id}_vh_clean_2.ply", process=False)
        assert len(mesh.vertices) == len(segments)
        room = build_room(CONFIG, plan.index)
        assert [g["objectId"] + 1 for g in groups] == [i.id for i in room.instances]
        used: set[int] = set()
        for group, instance in zip(groups, room.instances, strict=True):
            assert group["label"] == instance.label
            assert not used & set(group["segments"])
            used |= set(group["segments"])
            own = mesh.vertices[np.isin(segments, group["segments"])]
            axes = np.array(group["obb"]["normalizedAxes"]).reshape(3, 3)  # one axis a row
            local = (own - group["obb"]["centroid"]) @ axes.T
            np.testing.assert_allclose(np.abs(local).max(axis=0), np.array(group["obb"]["axesLengths"]) / 2, atol=1e-4)


# --- determinism


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    again = make_rooms(CONFIG, tmp_path / "again", workers=2)
    assert contents(again) == contents(folder)


def test_rooms_differ_by_number_and_by_seed(folder, tmp_path):
    colours = [(scan / "color/0.png").read_bytes() for scan in scans(folder)]
    assert len(set(colours)) == len(colours)
    other = make_rooms(dataclasses.replace(CONFIG, seed=2, scenes=1), tmp_path / "other")
    assert (scans(other)[0] / "color/0.png").read_bytes() not in colours


def test_a_room_does_not_depend_on_how_many_there_are(folder, tmp_path):
    fewer = make_rooms(dataclasses.replace(CONFIG, scenes=1), tmp_path / "fewer")
    assert contents(scans(fewer)[0]) == contents(scans(folder)[0])


# --- resuming


def test_what_is_done_is_kept_and_what_is_not_is_made(folder, tmp_path):
    calls: list[tuple[int, int, str]] = []
    copy = make_rooms(CONFIG, tmp_path / "copy", lambda *a: calls.append(a))
    assert [(done, total) for done, total, _ in calls] == [(1, 3), (2, 3), (3, 3)]
    first, second, third = scans(copy)
    stamp = (first / "color/0.png").stat().st_mtime_ns
    (second / "done").unlink()
    (second / "color/0.png").write_bytes(b"half a pic")
    for path in sorted(third.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    third.rmdir()
    calls.clear()
    make_rooms(CONFIG, copy, lambda *a: calls.append(a))
    assert [done for done, _, _ in calls] == [1, 2, 3]
    assert (first / "color/0.png").stat().st_mtime_ns == stamp
    assert contents(copy) == contents(folder)
    calls.clear()
    small = [*sorted((copy / "splits").iterdir()), copy / "scannetv2-labels.combined.tsv"]
    stamps = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in small]
    make_rooms(CONFIG, copy, lambda *a: calls.append(a))
    assert [done for done, _, _ in calls] == [3]
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in small] == stamps


def _make_in_child(folder: str) -> None:
    make_rooms(dataclasses.replace(CONFIG, views=12), Path(folder))


def test_a_killed_run_leaves_no_half_room_and_can_go_on(tmp_path):
    target = tmp_path / "killed"
    child = multiprocessing.get_context("fork").Process(target=_make_in_child, args=(str(target),))
    child.start()
    deadline = time.monotonic() + 60
    while not list(target.glob(".making/*/color/1.png")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    left = list(target.glob(".making/*"))
    assert left, "the child was to be killed in the middle of a room"
    assert all((scan / "done").is_file() for scan in target.glob("scans/*"))
    assert not (target / "splits").exists()
    config = dataclasses.replace(CONFIG, views=12)
    make_rooms(config, target)
    assert list(target.glob(".making/*")) == []
    assert [len(list((scan / "color").iterdir())) for scan in scans(target)] == [12, 12, 12]


def test_the_second_of_two_makers_of_one_room_keeps_the_first(folder, tmp_path):
    target = make_rooms(dataclasses.replace(CONFIG, scenes=1), tmp_path / "two")
    stamp = (scans(target)[0] / "done").stat().st_mtime_ns
    plan = plan_rooms(CONFIG.seed, 1)[0]
    assert _make_one(CONFIG, target, plan) == plan.id
    assert (scans(target)[0] / "done").stat().st_mtime_ns == stamp


# --- refusals


@pytest.mark.parametrize(
    ("change", "says"),
    [({"seed": 9}, "seed: 1 there, 9 wanted"), ({"views": 4}, "views: 3 there"), ({"width": 80}, "width: 64 there")],
)
def test_a_folder_of_other_rooms_is_refused(folder, change, says):
    before = contents(folder)
    with pytest.raises(DataError, match=says):
        make_rooms(dataclasses.replace(CONFIG, **change), folder)
    assert contents(folder) == before


def test_another_generator_version_is_refused(folder, monkeypatch):
    monkeypatch.setattr("services.data.rooms.make.GENERATOR_VERSION", GENERATOR_VERSION + 1)
    with pytest.raises(DataError, match="generator_version"):
        make_rooms(CONFIG, folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"not empty and has no rooms\.json"):
        make_rooms(CONFIG, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match="cannot be used"):
        make_rooms(CONFIG, tmp_path / "thesis.tex")


def test_a_damaged_identity_is_refused(tmp_path):
    (tmp_path / "rooms.json").write_text("{ half")
    with pytest.raises(DataError, match="damaged"):
        make_rooms(CONFIG, tmp_path)


@pytest.mark.parametrize(("key", "value"), [("scenes", 0), ("views", 0), ("width", 8), ("height", 15), ("seed", -1)])
def test_impossible_settings_are_refused(tmp_path, key, value):
    with pytest.raises(DataError, match=rf"data\.rooms\.{key} is {value}"):
        make_rooms(dataclasses.replace(CONFIG, **{key: value}), tmp_path / "never")
    assert not (tmp_path / "never").exists()


# --- textures


def images(folder: Path, colours) -> str:
    folder.mkdir(parents=True)
    for number, colour in enumerate(colours):
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
    return str(folder)


def test_a_users_textures_are_what_is_seen(tmp_path):
    textures = images(tmp_path / "green", [(10, 230, 20)])
    config = dataclasses.replace(CONFIG, scenes=1, textures=textures)
    room, plain = build_room(config, 0), build_room(CONFIG, 0)
    # The same room in other clothes: geometry and boxes stay.
    assert room.instances == plain.instances
    seen = []
    for made in (room, plain):
        renderer = Renderer(made)
        K, poses = cameras(made, renderer, config)
        rgb = renderer.picture(poses[0], K).color.astype(float)
        seen.append((rgb[..., 1] > rgb[..., 0] + 40).mean())
    assert seen[0] > 0.3
    assert seen[0] > seen[1] + 0.2


def test_the_content_of_the_texture_folder_names_the_rooms(tmp_path):
    red, blue = images(tmp_path / "red", ["red"]), images(tmp_path / "blue", ["blue"])
    moved = images(tmp_path / "elsewhere" / "red", ["red"])
    digests = [rooms_digest(dataclasses.replace(CONFIG, textures=t)) for t in ("", red, blue, moved)]
    assert len(set(digests)) == 3
    assert digests[1] == digests[3]
    target = make_rooms(dataclasses.replace(CONFIG, scenes=1, textures=red), tmp_path / "made")
    with pytest.raises(DataError, match="textures_sha256"):
        make_rooms(dataclasses.replace(CONFIG, scenes=1, textures=blue), target)


def test_a_texture_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no image \(\.bmp"):
        make_rooms(dataclasses.replace(CONFIG, textures=str(tmp_path)), tmp_path / "out")
    with pytest.raises(DataError, match="is not a folder"):
        make_rooms(dataclasses.replace(CONFIG, textures=str(tmp_path / "missing")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_texture_that_is_no_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        build_room(dataclasses.replace(CONFIG, textures=str(tmp_path)), 0)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_patterns_are_images_with_contrast(name):
    image = np.asarray(PATTERNS[name](np.random.default_rng(0)))
    assert image.shape in ((SIZE, SIZE), (SIZE, SIZE, 3))
    assert -0.1 <= image.min() < image.max() <= 1.1
    assert image.std() > 0.005


def test_sampling_interpolates_wraps_and_blurs():
    atlas = Atlas()
    number = atlas.use("checker", np.random.default_rng(0))
    texture = np.full(1000, number)
    uv = np.random.default_rng(1).uniform(0, 1, (1000, 2))
    sharp = atlas.sample(texture, uv, np.full(1000, 1 / SIZE))
    np.testing.assert_allclose(atlas.sample(texture, uv + np.array([3, -2]), np.full(1000, 1 / SIZE)), sharp, atol=1e-5)
    blurred = atlas.sample(texture, uv, np.full(1000, 0.5))
    assert blurred.std() < 0.1 * sharp.std()
    assert blurred.mean() == pytest.approx(sharp.mean(), abs=0.05)
