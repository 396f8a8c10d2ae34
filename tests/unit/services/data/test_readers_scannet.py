"""ScanNet's layout: conventions by reprojection, masks, instances, splits, label table, lost poses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh

from configs.schema import SourceConfig
from services.contracts import Scene, Split
from services.data.images import load_ids
from services.data.readers import Notes, open_reader
from services.errors import DataError
from tests.support.analytic import K
from tests.support.layouts import (
    SMALL_K,
    assert_right,
    assert_wrong,
    matrix_text,
    small_views,
    write_scannet,
)


def read(root: Path, scene_id: str = "scene0000_00", notes: Notes | None = None, **settings: object) -> Scene:
    scene = open_reader(root, SourceConfig(format="scannet", **settings)).read(scene_id, notes)
    assert isinstance(scene, Scene)
    return scene


def test_views_reproject_into_each_other(tmp_path: Path) -> None:
    write_scannet(tmp_path)
    assert_right(read(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": (1, -1, -1)},
        {"inverted": True},
        {"depth_scale": 1.25},
        {"camera": K + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])},
        {"camera": K + np.array([[0, 0, -0.5], [0, 0, -0.5], [0, 0, 0]])},
    ],
    ids=["opengl axes", "world-to-camera", "depth unit", "half a pixel", "half a pixel back"],
)
def test_a_wrong_convention_does_not_reproject(tmp_path: Path, wrong: dict[str, object]) -> None:
    write_scannet(tmp_path, **wrong)
    assert_wrong(read(tmp_path))


def test_frames_are_in_order_of_their_numbers_and_thinned(tmp_path: Path) -> None:
    write_scannet(tmp_path, views=small_views() * 6, camera=SMALL_K)
    names = [Path(view.image.path).stem for view in read(tmp_path).views]
    assert names == [str(10 * i) for i in range(12)]
    thinned = [Path(view.image.path).stem for view in read(tmp_path, frame_stride=5).views]
    assert thinned == ["0", "50", "100"]


def test_lost_poses_are_left_out_and_counted(tmp_path: Path) -> None:
    write_scannet(tmp_path, views=small_views() * 2, camera=SMALL_K, lost=(1, 2))
    notes = Notes()
    assert len(read(tmp_path, notes=notes).views) == 2
    assert notes.dropped == {"with a pose that is not finite": 2}
    assert notes.examples["with a pose that is not finite"].endswith("pose/10.txt")


def test_a_scene_without_usable_views_is_an_error(tmp_path: Path) -> None:
    write_scannet(tmp_path, views=small_views(), camera=SMALL_K, lost=(0, 1))
    with pytest.raises(DataError, match=r"scene0000_00.*no usable view \(2 with a pose that is not finite\)"):
        read(tmp_path)


def test_masks_instances_classes_and_facts(tmp_path: Path) -> None:
    write_scannet(tmp_path, views=small_views(), camera=SMALL_K)
    reader = open_reader(tmp_path, SourceConfig(format="scannet"))
    scene = read(tmp_path)
    assert reader.classes() == ("none", "wall", "chair", "", "", "table")
    assert scene.scene_type == "office"
    assert np.array_equal(np.asarray(scene.axis_alignment), np.eye(4))
    (chair,) = scene.instances
    assert (chair.id, chair.label, chair.class_id) == (1, "chair", 2)
    assert chair.box is not None
    assert chair.box.center == (1.0, 2.0, 0.5)
    assert chair.box.size == (0.6, 0.4, 1.0)
    # The file lists axes one after the other; the box has them as columns.
    assert np.allclose(np.asarray(chair.box.axes)[:, 0], [0.8, 0.6, 0.0])
    view = scene.views[0]
    assert view.instance_path is not None
    assert view.label_path is not None
    ids, labels = load_ids(view.instance_path), load_ids(view.label_path)
    assert ids.dtype == np.int32
    assert set(np.unique(ids)) == {0, 1}
    assert np.array_equal(labels, ids * 2)


def test_splits_are_the_lists_beside_the_scenes(tmp_path: Path) -> None:
    write_scannet(tmp_path, "a", views=small_views(), camera=SMALL_K, split="train")
    write_scannet(tmp_path, "b", views=small_views(), camera=SMALL_K, split="val")
    assert (read(tmp_path, "a").split, read(tmp_path, "b").split) == (Split.TRAIN, Split.VAL)
    (tmp_path / "mine.txt").write_text("b\n")
    scene = read(tmp_path, "b", splits={"test": str(tmp_path / "mine.txt")})
    assert scene.split is Split.TEST
    assert read(tmp_path, "a", splits={"test": str(tmp_path / "mine.txt")}).split is None


def test_boxes_from_the_mesh_follow_the_axis_alignment(tmp_path: Path) -> None:
    scene = write_scannet(tmp_path, views=small_views(), camera=SMALL_K)
    # A unit box turned by 30 degrees in the world; the alignment turns it back and lifts it.
    angle = np.pi / 6
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    box = trimesh.creation.box(extents=(1.0, 2.0, 0.5))
    vertices = np.asarray(box.vertices) + np.array([3.0, 1.0, 0.25])
    mesh = trimesh.Trimesh(np.vstack([vertices @ turn.T, [[9, 9, 9]]]), box.faces, process=False)
    mesh.export(scene / f"{scene.name}_vh_clean_2.ply")
    (scene / f"{scene.name}_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps({"segIndices": [7] * 4 + [8] * 4 + [9]})
    )
    groups = {"segGroups": [{"id": 0, "objectId": 3, "label": "table", "segments": [7, 8]}]}
    (scene / f"{scene.name}.aggregation.json").write_text(json.dumps(groups))
    alignment = np.eye(4)
    alignment[:3, :3], alignment[:3, 3] = turn.T, [0.5, 0.0, 1.0]
    flat = " ".join(repr(float(v)) for v in alignment.ravel())
    (scene / f"{scene.name}.txt").write_text(f"axisAlignment = {flat}\nsceneType = Office\n")
    (instance,) = read(tmp_path).instances
    assert (instance.id, instance.class_id) == (4, 5)
    assert instance.box is not None
    assert np.allclose(instance.box.center, turn @ [3.0, 1.0, 0.25], atol=1e-6)
    assert np.allclose(instance.box.size, (1.0, 2.0, 0.5), atol=1e-6)
    assert np.allclose(np.asarray(instance.box.axes), turn, atol=1e-6)


def test_depth_of_another_size_has_its_own_camera(tmp_path: Path) -> None:
    scene = write_scannet(tmp_path, views=small_views(), camera=SMALL_K)
    halves = np.full((9, 12), 2000, dtype=np.uint16)
    from PIL import Image

    for path in (scene / "depth").iterdir():
        Image.fromarray(halves).save(path)
    (scene / "intrinsic/intrinsic_depth.txt").write_text(
        matrix_text(np.array([[18, 0, 20, 0], [0, 18, 20, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    )
    with pytest.raises(DataError, match="lies outside of the image of 12x9"):
        read(tmp_path)
    (scene / "intrinsic/intrinsic_depth.txt").write_text(
        matrix_text(np.array([[9, 0, 5.5, 0], [0, 9, 4, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    )
    depth = read(tmp_path).views[0].depth
    assert depth is not None
    assert (depth.K.width, depth.K.height, depth.K.cx) == (12, 9, 5.5)
