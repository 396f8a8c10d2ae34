"""COLMAP models and ScanNet++: world-to-camera poses, half pixels, lenses, the two worlds of ScanNet++."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest

from configs.schema import SourceConfig
from services.contracts import Scene, Split
from services.data.readers import Notes, open_reader
from services.errors import DataError
from tests.support.analytic import HEIGHT, WIDTH, K, pixel_rays, poses, render
from tests.support.layouts import RESAMPLED, WRONG, assert_right, assert_wrong, judge, save_color
from tests.support.lenses import BROWN, FISHEYE, brown_rays, fisheye_rays

PINHOLE = [K[0, 0], K[1, 1], K[0, 2] + 0.5, K[1, 2] + 0.5]


def write_model(
    folder: Path,
    model: str = "PINHOLE",
    params: list[float] | None = None,
    *,
    inverted: bool = False,
    flip: tuple[float, ...] = (1, 1, 1, 1),
    text: bool = False,
) -> None:
    """A COLMAP model of the views, named out of order, plus a picture that was not registered."""
    reconstruction = pycolmap.Reconstruction()
    camera = pycolmap.Camera(model=model, width=WIDTH, height=HEIGHT, params=params or PINHOLE, camera_id=1)
    reconstruction.add_camera_with_trivial_rig(camera)
    for number in (3, 1, 0, 2):
        pose = poses()[number] @ np.diag(flip)
        matrix = pose if inverted else np.linalg.inv(pose)
        rigid = pycolmap.Rigid3d(pycolmap.Rotation3d(matrix[:3, :3]), matrix[:3, 3])
        image = pycolmap.Image(name=f"DSC{number:05d}.png", camera_id=1, image_id=10 + number)
        reconstruction.add_image_with_trivial_frame(image, rigid)
    folder.mkdir(parents=True, exist_ok=True)
    if text:
        reconstruction.write_text(str(folder))
    else:
        reconstruction.write_binary(str(folder))


def write_pictures(folder: Path, rays: np.ndarray | None = None) -> None:
    for number, pose in enumerate(poses()):
        save_color(folder / f"DSC{number:05d}.png", render(pose, rays).color)


def read(root: Path, format_name: str = "colmap", cache: Path | None = None, **options: Any) -> Scene:
    reader = open_reader(root, SourceConfig(format=format_name, options=options), cache=cache)
    scene = reader.read(reader.list_ids()[0])
    assert isinstance(scene, Scene)
    return scene


def judged(scene: Scene) -> tuple[Scene, list[Any]]:
    """The scene with the depth that its cameras see, as the source has none."""
    shots = []
    for view, pose in zip(scene.views, poses(), strict=True):
        assert view.K is not None
        shots.append(render(pose, pixel_rays(view.K.matrix(), view.K.width, view.K.height)))
    return scene, shots


@pytest.mark.parametrize("text", [False, True])
def test_views_reproject_in_order_of_their_names(tmp_path: Path, text: bool) -> None:
    write_model(tmp_path / "sparse/0", text=text)
    write_pictures(tmp_path / "images")
    scene = read(tmp_path)
    assert [Path(view.image.path).stem for view in scene.views] == [f"DSC0000{i}" for i in range(4)]
    assert_right(*judged(scene))


@pytest.mark.parametrize(
    "wrong",
    [
        {"params": [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]},
        {"params": [K[0, 0], K[1, 1], K[0, 2] + 1.0, K[1, 2] + 1.0]},
        {"inverted": True},
        {"flip": (1, -1, -1, 1)},
    ],
    ids=["half a pixel less", "half a pixel more", "camera-to-world", "opengl axes"],
)
def test_a_wrong_convention_does_not_reproject(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write_model(tmp_path / "sparse", **wrong)
    write_pictures(tmp_path / "images")
    scene = read(tmp_path)
    truth = [render(pose) for pose in poses()]
    assert_wrong(scene, truth)


@pytest.mark.parametrize(
    ("model", "params", "rays"),
    [
        ("OPENCV", [*PINHOLE, *BROWN.values()], brown_rays),
        ("FULL_OPENCV", [*PINHOLE, *BROWN.values(), 0, 0, 0, 0], brown_rays),
        ("OPENCV_FISHEYE", [*PINHOLE, *FISHEYE.values()], fisheye_rays),
    ],
)
def test_lenses_are_undistorted(tmp_path: Path, model: str, params: list[float], rays: Any) -> None:
    write_model(tmp_path / "sparse/0", model, params)
    write_pictures(tmp_path / "images", rays())
    assert_right(*judged(read(tmp_path, cache=tmp_path / "cache")), limit=RESAMPLED)
    with pytest.raises(DataError, match=r"DSC00000\.png.*undistort=write"):
        read(tmp_path, cache=tmp_path / "cache", undistort="refuse")


@pytest.mark.parametrize(
    ("model", "params", "kind", "coefficients"),
    [
        ("SIMPLE_PINHOLE", [70, 48, 36], "brown", (0, 0, 0, 0)),
        ("SIMPLE_RADIAL", [70, 48, 36, 0.1], "brown", (0.1, 0, 0, 0)),
        ("RADIAL", [70, 48, 36, 0.1, 0.2], "brown", (0.1, 0.2, 0, 0)),
        ("SIMPLE_RADIAL_FISHEYE", [70, 48, 36, 0.1], "fisheye", (0.1, 0, 0, 0)),
        ("RADIAL_FISHEYE", [70, 48, 36, 0.1, 0.2], "fisheye", (0.1, 0.2, 0, 0)),
    ],
)
def test_the_parameters_of_every_model(
    tmp_path: Path, model: str, params: list[float], kind: str, coefficients: tuple[float, ...]
) -> None:
    from services.data.readers.colmap import read_model

    write_model(tmp_path, model, params)
    notes = Notes()
    _, _, lens = read_model(tmp_path, notes)[0]
    assert (lens.model, lens.coefficients) == (kind, coefficients)
    assert (lens.camera.fx, lens.camera.fy, lens.camera.cx, lens.camera.cy) == (70, 70, 47.5, 35.5)
    assert {path.stem for path in notes.files} >= {"cameras", "images"}


def test_a_model_that_cannot_be_undone_is_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "sparse/0", "FOV", [*PINHOLE, 0.9])
    write_pictures(tmp_path / "images")
    with pytest.raises(DataError, match=r"camera model FOV.*OPENCV_FISHEYE"):
        read(tmp_path)


def write_scannetpp(root: Path, *, swapped: bool = True, half: float = 0.5) -> Path:
    """A scene as ScanNet++ gives it: a fisheye lens, COLMAP text, transforms.json in another world."""
    scene = root / "data/5f99900f09"
    write_model(scene / "dslr/colmap", "OPENCV_FISHEYE", [*PINHOLE, *FISHEYE.values()], text=True)
    write_pictures(scene / "dslr/resized_images", fisheye_rays())
    frames = []
    for number, pose in enumerate(poses()):
        opengl = pose @ np.diag([1.0, -1.0, -1.0, 1.0])
        if swapped:
            opengl = opengl[[1, 0, 2, 3]] * np.array([[1.0], [1.0], [-1.0], [1.0]])
        frames.append({"file_path": f"DSC{number:05d}.png", "transform_matrix": opengl.tolist(), "is_bad": False})
    camera = {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2] + half, "cy": K[1, 2] + half, "w": WIDTH, "h": HEIGHT}
    meta = {**camera, **FISHEYE, "camera_model": "OPENCV_FISHEYE", "frames": frames[::2], "test_frames": frames[1::2]}
    (scene / "dslr/nerfstudio").mkdir(parents=True)
    (scene / "dslr/nerfstudio/transforms.json").write_text(json.dumps(meta))
    obb = {"centroid": [1, 2, 3], "axesLengths": [1, 1, 2], "normalizedAxes": [0, 1, 0, -1, 0, 0, 0, 0, 1]}
    groups = [{"id": 1, "objectId": 1, "label": "monitor", "segments": [1], "obb": obb}]
    (scene / "scans").mkdir()
    (scene / "scans/segments_anno.json").write_text(json.dumps({"segGroups": groups}))
    (root / "metadata/semantic_benchmark").mkdir(parents=True)
    (root / "metadata/semantic_benchmark/top100.txt").write_text("wall\nmonitor\n")
    (root / "metadata/scene_types.json").write_text(json.dumps({"5f99900f09": "Office"}))
    (root / "splits").mkdir()
    (root / "splits/nvs_sem_train.txt").write_text("other\n")
    (root / "splits/nvs_sem_val.txt").write_text("5f99900f09\n")
    return scene


@pytest.mark.parametrize("cameras", ["colmap", "nerfstudio", ""])
def test_scannetpp_from_either_file(tmp_path: Path, cameras: str) -> None:
    write_scannetpp(tmp_path / "s")
    scene = read(tmp_path / "s", "scannetpp", tmp_path / "cache", cameras=cameras)
    # Both files give the frame of the mesh, in which the texture is known.
    assert_right(*judged(scene), limit=RESAMPLED)
    assert (scene.split, scene.scene_type) == (Split.VAL, "Office")
    (monitor,) = scene.instances
    assert (monitor.id, monitor.label, monitor.class_id) == (1, "monitor", 2)
    assert monitor.box is not None
    assert np.asarray(monitor.box.axes)[:, 0].tolist() == [0, 1, 0]


def test_scannetpp_in_the_other_world_or_shifted_is_wrong(tmp_path: Path) -> None:
    write_scannetpp(tmp_path / "swap", swapped=False)
    scene = read(tmp_path / "swap", "scannetpp", tmp_path / "cache", cameras="nerfstudio")
    # A rigid change of the world leaves reprojection as it is; only the frame of the mesh can tell.
    assert judge(*judged(scene))[1] > WRONG
    write_scannetpp(tmp_path / "half", half=-0.5)
    shifted = read(tmp_path / "half", "scannetpp", tmp_path / "cache", cameras="nerfstudio")
    assert_wrong(*judged(shifted))


def test_scannetpp_leaves_out_bad_frames_and_refuses_lenses_by_name(tmp_path: Path) -> None:
    scene = write_scannetpp(tmp_path / "s")
    path = scene / "dslr/nerfstudio/transforms.json"
    meta = json.loads(path.read_text())
    meta["test_frames"][0]["is_bad"] = True
    path.write_text(json.dumps(meta))
    for cameras in ("colmap", "nerfstudio"):
        source = SourceConfig(format="scannetpp", options={"cameras": cameras})
        notes = Notes()
        found = open_reader(tmp_path / "s", source, cache=tmp_path / "c").read("5f99900f09", notes)
        assert isinstance(found, Scene)
        assert len(found.views) == 3
        assert notes.dropped == {"marked as bad": 1}
    with pytest.raises(DataError, match=r"DSC00000\.png.*fisheye lens"):
        read(tmp_path / "s", "scannetpp", undistort="refuse")
