"""transforms.json: OpenGL axes, half pixels, per-frame intrinsics, depth units, distortion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import SourceConfig
from services.contracts import Scene
from services.data.images import load_image
from services.data.readers import Notes, open_reader
from services.errors import DataError
from tests.support.analytic import HEIGHT, WIDTH, K, poses, render, shots
from tests.support.layouts import RESAMPLED, WRONG, assert_right, assert_wrong, judge, save_color, save_depth_mm
from tests.support.lenses import BROWN, FISHEYE, brown_rays, fisheye_rays


def write(
    root: Path,
    *,
    half: float = 0.5,
    axes: tuple[float, ...] = (1, -1, -1, 1),
    inverted: bool = False,
    unit: float = 1.0,
    depth: bool = True,
    lens: str = "",
    per_frame: bool = False,
    **extra: Any,
) -> None:
    """The views as nerfstudio's converter writes them: shuffled, OpenGL, first pixel's centre at a half."""
    rays = {"": None, "brown": brown_rays(), "fisheye": fisheye_rays()}[lens]
    views = [render(pose, rays) for pose in poses()]
    camera = {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2] + half, "cy": K[1, 2] + half, "w": WIDTH, "h": HEIGHT}
    frames = []
    for number in (2, 0, 3, 1):
        shot = views[number]
        save_color(root / f"images/frame_{number:05d}.png", shot.color)
        pose = shot.pose @ np.diag(axes)
        pose = np.linalg.inv(pose) if inverted else pose
        frame = {"file_path": f"images/frame_{number:05d}.png", "transform_matrix": pose.tolist()}
        if depth:
            save_depth_mm(root / f"depth/{number}.png", shot.depth * unit)
            frame["depth_file_path"] = f"depth/{number}.png"
        frames.append({**frame, **camera} if per_frame else frame)
    model: dict[str, Any] = {"": {}, "brown": {"camera_model": "OPENCV", **BROWN}}.get(
        lens, {"camera_model": "OPENCV_FISHEYE", **FISHEYE}
    )
    shared = {"fl_x": 1.0, "fl_y": 1.0} if per_frame else camera
    (root / "transforms.json").write_text(json.dumps({**shared, **model, "frames": frames, **extra}))


def read(root: Path, cache: Path | None = None, notes: Notes | None = None, **options: Any) -> Scene:
    reader = open_reader(root, SourceConfig(format="nerfstudio", options=options), cache=cache)
    scene = reader.read(reader.list_ids()[0], notes)
    assert isinstance(scene, Scene)
    return scene


def test_views_reproject_in_order_of_their_names(tmp_path: Path) -> None:
    # What was applied to the poses is told, and must not be applied again.
    write(tmp_path, applied_transform=[[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]], applied_scale=0.5)
    scene = read(tmp_path)
    assert_right(scene)
    assert [Path(view.image.path).stem[-1] for view in scene.views] == ["0", "1", "2", "3"]
    assert scene.views[0].K is not None
    assert scene.views[0].K.cx == pytest.approx(K[0, 2])


@pytest.mark.parametrize(
    "wrong",
    [{"half": 1.0}, {"half": 0.0}, {"axes": (1, 1, 1, 1)}, {"inverted": True}, {"unit": 0.8}],
    ids=["half a pixel more", "half a pixel less", "opencv axes", "world-to-camera", "depth unit"],
)
def test_a_wrong_convention_does_not_reproject(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write(tmp_path, **wrong)
    assert_wrong(read(tmp_path))


def test_intrinsics_of_a_frame_win_and_poses_without_depth_are_right(tmp_path: Path) -> None:
    write(tmp_path, per_frame=True, depth=False)
    scene = read(tmp_path)
    assert all(view.depth is None for view in scene.views)
    assert_right(scene, shots())


def test_the_unit_of_depth_and_of_poses_can_be_given(tmp_path: Path) -> None:
    write(tmp_path, unit=10.0)
    assert_right(read(tmp_path, depth_unit=0.0001))
    write(tmp_path, unit=10.0, depth_unit_scale_factor=0.0001)
    assert_right(read(tmp_path))
    pose = np.asarray(read(tmp_path, metres_per_unit=2.0).views[1].pose)
    assert np.allclose(pose[:3, 3], 2 * poses()[1][:3, 3])


@pytest.mark.parametrize("lens", ["brown", "fisheye"])
def test_distorted_pictures_are_undistorted_once_or_refused(tmp_path: Path, lens: str) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    write(source, lens=lens)
    scene = read(source, cache)
    assert_right(scene, limit=RESAMPLED)
    files = sorted(cache.rglob("*.png"))
    assert len(files) == 8
    times = [path.stat().st_mtime_ns for path in files]
    assert read(source, cache) == scene
    assert [path.stat().st_mtime_ns for path in files] == times
    # Nothing that the lens did not see: the room has no black, a border would be.
    assert all(load_image(view.image).max(axis=-1).min() > 10 for view in scene.views)
    with pytest.raises(DataError, match=rf"frame_00000\.png.*{lens} lens.*undistort=write"):
        read(source, cache, undistort="refuse")
    with pytest.raises(DataError, match="undistort"):
        read(source, None)


@pytest.mark.parametrize("lens", ["brown", "fisheye"])
def test_a_lens_that_is_ignored_does_not_reproject(tmp_path: Path, lens: str) -> None:
    write(tmp_path, lens=lens)
    meta = json.loads((tmp_path / "transforms.json").read_text())
    meta["camera_model"] = "PINHOLE"
    (tmp_path / "transforms.json").write_text(json.dumps(meta))
    # Against the texture itself: two views through one lens hide a part of what it does.
    assert judge(read(tmp_path))[1] > WRONG


def test_a_changed_picture_is_undistorted_again(tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    write(source, lens="brown", depth=False)
    notes = Notes()
    before = read(source, cache, notes=notes).views[0].image
    assert source / "images/frame_00000.png" in notes.files
    save_color(source / "images/frame_00000.png", np.full((HEIGHT, WIDTH, 3), 99, np.uint8))
    after = read(source, cache).views[0].image
    assert after.path != before.path
    assert (load_image(after) == 99).all()


def test_the_synthetic_scenes_form(tmp_path: Path) -> None:
    write(tmp_path, depth=False)
    meta = json.loads((tmp_path / "transforms.json").read_text())
    frames = [{**f, "file_path": f["file_path"].removesuffix(".png")} for f in meta["frames"]]
    angle = 2 * np.arctan(0.5 * WIDTH / 80.0)
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    camera = read(tmp_path).views[0].K
    assert camera is not None
    assert (camera.fx, camera.cx, camera.cy) == pytest.approx((80.0, (WIDTH - 1) / 2, (HEIGHT - 1) / 2))


def test_folders_of_scenes_and_lost_poses(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / name, depth=False)
    meta = json.loads((tmp_path / "a/transforms.json").read_text())
    meta["frames"][0]["transform_matrix"][0][3] = float("nan")
    (tmp_path / "a/transforms.json").write_text(json.dumps(meta))
    reader = open_reader(tmp_path, SourceConfig(format="nerfstudio"))
    assert reader.list_ids() == ["a", "b"]
    notes = Notes()
    scene = reader.read("a", notes)
    assert isinstance(scene, Scene)
    assert len(scene.views) == 3
    assert sum(notes.dropped.values()) == 1
