"""The pictures of a scene: what they must contain, also where a scene has little to show."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from services.contracts import ImageRef, Scene, View
from services.data import cloud as clouds
from services.data import show
from services.data.images import load_image
from services.errors import DataError
from tests.unit.services.data import toy_scene


@pytest.fixture(scope="module")
def room() -> toy_scene.Room:
    return toy_scene.furnished(4, cameras=5)


@pytest.fixture(scope="module")
def scene(room: toy_scene.Room, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return toy_scene.write(room, tmp_path_factory.mktemp("show"), "toy<room>")


def test_everything_is_drawn(scene: Scene, tmp_path: Path) -> None:
    page = show.show_scene(scene, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.html", "above.png", "views.png", "depth.png", "instances.png", "cloud.png", "cloud.ply"}
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 5
    assert "toy&lt;room&gt;" in text
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    for path in tmp_path.glob("*.png"):
        image = np.asarray(Image.open(path).convert("RGB"))
        assert min(image.shape[:2]) > 100
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 8, f"{path.name} is empty"


def test_the_cloud_lies_on_the_room(scene: Scene, room: toy_scene.Room, tmp_path: Path) -> None:
    cloud = clouds.fuse(scene, max_points=8000)
    assert cloud is not None
    assert 6000 < len(cloud.points) <= 8100
    clouds.save_ply(cloud, str(tmp_path / "cloud.ply"))
    stored = trimesh.load(tmp_path / "cloud.ply")
    np.testing.assert_allclose(stored.vertices, cloud.points, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(stored.colors)[:, :3], cloud.colours)
    size = np.array([room.width, room.length, room.height])
    shell = np.minimum(np.abs(cloud.points), np.abs(cloud.points - size)).min(1)
    boxes = [
        np.abs(np.abs((cloud.points - t.box().center) @ t.axes()) - np.array(t.size) / 2).min(1) for t in room.things
    ]
    assert np.percentile(np.min([shell, *boxes], axis=0), 99) < 0.01  # on a wall or on a face of a box
    assert (cloud.points > -0.01).all()
    assert (cloud.points < size + 0.01).all()


def test_a_long_scan_gives_its_cloud_from_evenly_spaced_views(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(clouds, "load_image", lambda ref: seen.append(ref.path) or load_image(ref))
    monkeypatch.setattr(clouds, "MAX_VIEWS", 3)
    assert clouds.fuse(scene, max_points=900) is not None
    step = -(-len(scene.views) // 3)
    assert step > 1
    assert seen == [view.image.path for view in scene.views[::step]]


def test_colours_of_the_cloud_are_those_of_the_image(tmp_path: Path) -> None:
    room = toy_scene.Room(things=[], cameras=[((1.0, 1.0, 1.2), (4.0, 4.0, 1.0))])
    scene = toy_scene.write(room, tmp_path, mesh=False)
    view = scene.views[0]
    # The depth keeps its camera, the image gets one of twice the size.
    big = Image.open(view.image.path).resize((128, 96), Image.Resampling.NEAREST)
    big.save(tmp_path / "big.png")
    K = toy_scene.K.resized(128, 96)
    other = dataclasses.replace(
        scene, views=(dataclasses.replace(view, image=ImageRef(path=str(tmp_path / "big.png")), K=K),)
    )
    small, large = clouds.fuse(scene), clouds.fuse(other)
    assert small is not None
    assert large is not None
    np.testing.assert_array_equal(small.points, large.points)
    assert (small.colours == large.colours).all(1).mean() > 0.99


def test_upright_without_an_alignment_follows_the_cameras(scene: Scene) -> None:
    np.testing.assert_array_equal(clouds.upright(scene), np.eye(4))
    turn = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # the world's y is up
    views = tuple(
        dataclasses.replace(view, pose=toy_scene.as_matrix(turn @ np.array(view.pose))) for view in scene.views
    )
    matrix = clouds.upright(dataclasses.replace(scene, views=views))
    np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)
    up = matrix @ turn @ [0, 0, 1, 0]
    assert up[2] > 0.95


def test_a_scene_with_pictures_only(scene: Scene, tmp_path: Path) -> None:
    views = tuple(View(image=view.image) for view in scene.views[:2])
    bare = Scene(id="bare", views=views)
    page = show.show_scene(bare, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "views.png"}
    assert "2 of 2 views" in page.read_text()


def test_a_view_without_depth_stays_grey_and_a_broken_one_is_named(scene: Scene, tmp_path: Path) -> None:
    views = (dataclasses.replace(scene.views[0], depth=None), *scene.views[1:])
    show.show_scene(dataclasses.replace(scene, views=views), tmp_path)
    tile = np.asarray(Image.open(tmp_path / "depth.png"))[: show.TILE // 2, : show.TILE]
    assert (tile == 200).all()
    (tmp_path / "broken.png").write_bytes(b"")
    views = (dataclasses.replace(scene.views[0], image=ImageRef(path=str(tmp_path / "broken.png"))),)
    with pytest.raises(DataError, match=r"broken\.png"):
        show.show_scene(dataclasses.replace(scene, views=views), tmp_path)


def test_ids_get_colours_of_their_own() -> None:
    ids = np.arange(12).reshape(3, 4)
    colours = show.colour_ids(ids).reshape(-1, 3).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(-1)
    assert apart[~np.eye(12, dtype=bool)].min() > 20
    assert (show.colour_ids(np.array([[7, 0]]))[0, 0] == show.colour_ids(np.array([[3, 7]]))[0, 1]).all()


def test_finding_a_scene(scene: Scene) -> None:
    class Manifest:
        ids = ("scene_a", "scene_b")

        def __contains__(self, name: str) -> bool:
            return name in self.ids

        def scene(self, name: str) -> Scene:
            return dataclasses.replace(scene, id=name)

    manifests = {"rooms": Manifest()}
    assert show.find_record(manifests, "scene_a").id == "scene_a"
    assert show.find_record(manifests, "rooms/scene_b").id == "scene_b"
    with pytest.raises(DataError, match=r"no source has a scene or item 'scen_a'.*\['rooms'\].*scene_a"):
        show.find_record(manifests, "scen_a")
