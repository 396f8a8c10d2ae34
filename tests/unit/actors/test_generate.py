"""From a picture and a pose to files: run on random parts, everything that is written is read back."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from actors import cli, scene_files
from actors.generate import generate, share
from actors.parts import open_pipeline
from actors.references import Picture, camera_of, read_picture, read_pictures
from configs import ConfigError, RunConfig
from models.geometry.poses import inverse
from models.geometry.projection import transform
from models.metrics.images import psnr
from models.uniugg.pipeline import Pipeline
from models.uniugg.scenes import PointCloud
from services.errors import DataError
from tests.support.uniugg_parts import make_run

ROOMS = ["data.rooms.scenes=3", "data.rooms.views=3", "data.rooms.width=64", "data.rooms.height=48"]
QUICK = ["generate.steps=2", "generate.confidence=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("generate"), "uniugg_finetune", *ROOMS)[0]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "my kitchen.png"
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    import configs

    return configs.load(QUICK, file=folder / "config.yaml")


@pytest.fixture(scope="module")
def pipeline(config: RunConfig, folder: Path) -> Pipeline:
    return open_pipeline(config, folder=folder)


@pytest.fixture(scope="module")
def made(folder: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One view through the command line."""
    out = tmp_path_factory.mktemp("one")
    arguments = ["generate", "--run", str(folder), "--image", str(picture), "--yaw", "20", "--move=0.1,0,0"]
    assert cli.main([*arguments, "--out", str(out), "--device", "cpu", *QUICK]) == 0
    return out, json.loads((out / "metadata.json").read_text())


def reference(config: RunConfig, path: Path) -> Picture:
    return read_picture(str(path), config)


def test_metadata_say_what_was_asked_and_found(made: tuple[Path, dict[str, Any]]):
    _, metadata = made
    (view,) = metadata["views"]
    assert (metadata["run"], metadata["image"]) == ("uniugg_finetune-tiny", "my kitchen.png")
    assert metadata["settings"]["steps"] == 2
    assert view["angle_degrees"] == pytest.approx(20.0, abs=1e-3)
    assert view["distance_metres"] == pytest.approx(0.1, abs=1e-6)
    assert view["coverage"] > 0.02
    assert view["points"] == {"imagined": 112 * 112, "reference": 112 * 112}
    assert metadata["known_camera"] is False


def test_points_parse_back(made: tuple[Path, dict[str, Any]], pipeline: Pipeline, config: RunConfig, picture: Path):
    out, metadata = made
    view = metadata["views"][0]
    shown = reference(config, picture)
    again = pipeline.imagine(
        shown.image, shown.K, torch.tensor([view["pose"]]), steps=2, guidance=1.0, seed=config.seed
    )
    ply = trimesh.load(out / "000" / "points.ply")
    assert (out / "000" / "points.ply").read_bytes().startswith(b"ply\nformat binary_little_endian")
    expected = again.target_points[0].reshape(-1, 3).numpy()
    np.testing.assert_allclose(ply.vertices[: 112 * 112], expected, rtol=1e-4, atol=1e-5)
    colours = scene_files.as_bytes(again.target_colours[0]).reshape(-1, 3)
    assert np.abs(ply.colors[: 112 * 112, :3].astype(int) - colours).max() <= 1
    # The reference's own points have the true colours of its picture.
    cut, _ = pipeline.cut(shown.image, shown.K)
    np.testing.assert_array_equal(ply.colors[112 * 112 :, :3], cut.reshape(-1, 3))

    glb = trimesh.load(out / "000" / "points.glb")
    assert set(glb.geometry) == {"reference", "imagined"}
    # glTF has y upward and z backward.
    np.testing.assert_allclose(glb.geometry["imagined"].vertices, expected * [1, -1, -1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(glb.geometry["reference"].colors[:, :3], cut.reshape(-1, 3))


def test_depth_and_pictures(made: tuple[Path, dict[str, Any]]):
    out, metadata = made
    view = metadata["views"][0]
    points = trimesh.load(out / "000" / "points.ply").vertices[: 112 * 112]
    depth = transform(torch.tensor(points), inverse(torch.tensor(view["pose"], dtype=torch.float64)))[:, 2].numpy()
    stored = np.asarray(Image.open(out / "000" / "depth_mm.png"))
    assert stored.dtype == np.uint16
    np.testing.assert_allclose(stored.ravel(), np.clip(depth * 1000, 0, None), atol=1.0)
    assert view["depth_metres"][1] == pytest.approx(float(np.median(depth[depth > 0])), rel=1e-3)
    rendered = np.asarray(Image.open(out / "000" / "rendered.png"))
    # What no point covers is black; colours of a random head never are.
    assert float((rendered.sum(-1) > 0).mean()) == pytest.approx(view["coverage"], abs=1e-6)
    for name in ("picture.png", "depth_colour.png"):
        assert Image.open(out / "000" / name).size == (112, 112)


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_the_points_and_loads_nothing(made: tuple[Path, dict[str, Any]]):
    out, metadata = made
    page = (out / "index.html").read_text()
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s>)]+)', page) + re.findall(r"https?://\S+", page)
    assert [address for address in addresses if not address.startswith("data:")] == ["picture.src;"]
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|WebSocket|sendBeacon)\b\s*\(", page)
    data = embedded(page)
    assert [group["kind"] for group in data["groups"]] == ["reference", "target"]
    target = data["groups"][1]
    steps = np.frombuffer(base64.b64decode(target["positions"]), "<u2").reshape(-1, 3)
    points = np.array(target["corner"]) + steps / 65535 * np.array(target["side"])
    ply = trimesh.load(out / "000" / "points.ply")
    assert np.abs(points - ply.vertices[: 112 * 112]).max() <= max(target["side"]) / 65535
    colours = np.frombuffer(base64.b64decode(target["colours"]), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(colours, ply.colors[: 112 * 112, :3])
    assert data["views"][0]["pose"] == metadata["views"][0]["pose"]
    assert len(data["views"][0]["pictures"]) == 3


def test_the_same_seed_gives_the_same_and_another_does_not(
    pipeline: Pipeline, config: RunConfig, picture: Path, tmp_path: Path
):
    poses = torch.eye(4, dtype=torch.float64)[None]
    shown = reference(config, picture)
    for name, settings in (("a", config), ("b", config), ("c", dataclasses.replace(config, seed=5))):
        generate(pipeline, settings, shown, poses, tmp_path / name)
    first, second, third = ((tmp_path / name / "000" / "points.ply").read_bytes() for name in "abc")
    assert first == second
    assert first != third


def test_a_trajectory_makes_an_animation(folder: Path, picture: Path, tmp_path: Path):
    arguments = ["generate", "--run", str(folder), "--image", str(picture), "--trajectory", "orbit"]
    keys = [*QUICK, "generate.frames=5", "generate.angle=20", "generate.batch_size=2", "generate.frame_rate=10"]
    assert cli.main([*arguments, "--out", str(tmp_path), *keys]) == 0
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert len(metadata["views"]) == 5
    gif = Image.open(tmp_path / "trajectory.gif")
    assert (gif.n_frames, gif.info["duration"]) == (5, 100)
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "trajectory.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 5
    # The picture of the colour head and the drawn points side by side, each twice enlarged.
    assert frames[0].shape == (224, 2 * 226, 3)
    left = np.asarray(Image.open(tmp_path / "002" / "picture.png")).repeat(2, 0).repeat(2, 1)
    got, want = (torch.as_tensor(x[None].copy()).movedim(-1, 1) / 255 for x in (frames[2][:, :224], left))
    assert float(psnr(got, want)[0]) > 20
    page = (tmp_path / "index.html").read_text()
    assert len(embedded(page)["groups"]) == 6
    assert 'id="play"' in page


def test_views_of_scenes_have_cameras_and_a_truth(folder: Path, tmp_path: Path):
    arguments = ["generate", "--run", str(folder), "--image", "rooms/room0_0001", "--view", "0", "--target-view", "2"]
    assert cli.main([*arguments, "--out", str(tmp_path), *QUICK]) == 0
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["known_camera"] is True
    import configs

    views = read_pictures("rooms/room0_0001:0,2", configs.load(file=folder / "config.yaml"))
    assert views[0].pose is not None
    assert views[1].pose is not None
    expected = torch.linalg.inv(views[0].pose) @ views[1].pose
    assert torch.allclose(torch.tensor(metadata["views"][0]["pose"]).double(), expected, atol=1e-5)
    assert (tmp_path / "000" / "truth.png").exists()


def test_the_direct_variant(tmp_path: Path, picture: Path):
    run, _ = make_run(tmp_path, "uniugg_direct", *ROOMS)
    assert cli.main(["generate", "--run", str(run), "--image", str(picture), "--pitch", "-10", *QUICK]) == 0
    assert (run / "generated" / "my-kitchen" / "index.html").exists()


def test_a_camera_that_sees_nothing_is_said(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Status 1 and a word why: nothing is confident enough, or everything lies behind the camera."""
    arguments = ["generate", "--run", str(folder), "--image", str(picture), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--yaw", "5", "generate.steps=2", "generate.confidence=1000"]) == 1
    text = capsys.readouterr().out
    assert "view 0 sees nothing (coverage 0): no point reaches generate.confidence=1000" in text
    assert not (tmp_path / "000" / "points.ply").exists()
    assert (tmp_path / "index.html").exists()
    assert cli.main([*arguments, "--yaw", "180", "--move=0,0,-50", *QUICK]) == 1
    text = capsys.readouterr().out
    assert "all points lie behind the camera or beside its picture" in text
    assert json.loads((tmp_path / "metadata.json").read_text())["views"][0]["coverage"] == 0
    assert (tmp_path / "000" / "points.ply").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "/absent.png", "--yaw", "3"], ["DataError", "/absent.png: there is no such file"]),
        (["--image", "{text}", "--yaw", "3"], ["DataError", "not a readable image"]),
        (["--image", "rooms/room7", "--yaw", "3"], ["DataError", "no source has a scene or item 'rooms/room7'"]),
        (["--image", "rooms/room0_0000:9", "--yaw", "3"], ["has no view 9; its views are 0 to 2"]),
        (["--image", "{picture}", "--view", "1", "--yaw", "3"], ["--view is for scenes"]),
        (["--image", "{picture}"], ["no pose is given"]),
        (["--image", "{picture}", "--yaw", "3", "--trajectory", "orbit"], ["both --yaw", "and --trajectory"]),
        (["--image", "rooms/room0_0000", "--yaw", "3", "--target-view", "1"], ["--target-view and --yaw"]),
        (["--image", "{picture}", "--pose", "/absent.json"], ["DataError", "/absent.json: cannot be read"]),
        (["--image", "{picture}", "--yaw", "3", "--part", "vae"], ["--part vae: write NAME=FOLDER"]),
        (["--image", "{picture}", "--yaw", "3", "generate.fov=0"], ["generate.fov"]),
        (["--image", "{picture}", "--yaw", "inf"], ["--yaw inf: must be a number of degrees"]),
        (["--image", "{picture}", "--yaw", "3", "--device", "cuda:99"], ["--device cuda:99: this machine has cpu"]),
        (["--image", "{folder}", "--yaw", "3"], ["is a folder; give one of its pictures"]),
        (["--image", "{picture}", "--yaw", "3", "--out", "{text}"], ["--out", "text.png is a file; give a folder"]),
    ],
)
def test_what_cannot_be_done_is_one_message(
    folder: Path,
    picture: Path,
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "text.png").write_text("no picture")
    filled = [text.format(picture=picture, text=tmp_path / "text.png", folder=tmp_path) for text in arguments]
    assert cli.main(["generate", "--run", str(folder), "--out", str(tmp_path / "out"), *filled]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert "Traceback" not in said


def test_a_photograph_is_shown_upright(tmp_path: Path, config: RunConfig):
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 8  # to be turned anticlockwise
    image.save(tmp_path / "phone.png", exif=exif)
    shown = read_picture(str(tmp_path / "phone.png"), config)
    np.testing.assert_array_equal(shown.image, np.rot90(np.asarray(image)))
    assert shown.K[0, 2] == (40 - 1) / 2


def test_little_is_not_called_nothing():
    assert [share(part) for part in (0.0, 1e-4, 0.01, 0.124, 1.0)] == ["0%", "less than 1%", "1%", "12%", "100%"]


def test_the_assumed_camera_has_the_field_of_view():
    K = camera_of(np.zeros((90, 120, 3), np.uint8), 60.0)
    edge = torch.linalg.inv(K) @ torch.tensor([119.5, 44.5, 1.0], dtype=torch.float64)
    assert float(torch.rad2deg(torch.atan2(edge[0], edge[2]))) == pytest.approx(30.0)
    assert float(edge[1]) == pytest.approx(0.0)
    assert K[0, 0] == K[1, 1]


def test_a_scene_is_stood_for_by_as_many_views_as_in_training(config: RunConfig):
    questions = dataclasses.replace(config.data.sources["questions"], options={"of": "rooms", "max_views": 2})
    sources = {**config.data.sources, "questions": questions}
    fewer = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    assert [p.name for p in read_pictures("rooms/room0_0000", fewer)] == ["rooms/room0_0000:0", "rooms/room0_0000:2"]
    assert len(read_pictures("rooms/room0_0000", config)) == 3


def test_one_picture_is_needed(config: RunConfig):
    with pytest.raises(ConfigError, match="one picture is needed, this is 2"):
        read_picture("rooms/room0_0000:0,1", config)
    with pytest.raises(DataError, match="has no view 4"):
        read_picture("rooms/room0_0000", config, 4)


def test_depth_in_millimetres_says_what_is_unknown(tmp_path: Path):
    depth = torch.tensor([[1.2345, 0.0, -3.0], [torch.nan, torch.inf, 70.0]])
    scene_files.save_depth(depth, tmp_path / "d.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "d.png")), [[1234, 0, 0], [0, 0, 0]])
    assert scene_files.depth_range([depth * 0]) == (0.0, 1.0)


def test_an_empty_cloud_has_no_node(tmp_path: Path):
    full = PointCloud(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.5, 0.0]]))
    empty = PointCloud(torch.zeros(0, 3), torch.zeros(0, 3))
    scene_files.save_glb({"reference": empty, "imagined": full}, tmp_path / "p.glb")
    assert set(trimesh.load(tmp_path / "p.glb").geometry) == {"imagined"}
