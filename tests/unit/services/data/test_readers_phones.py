"""ARKitScenes, RealEstate10K and 7-Scenes: conventions by reprojection, times, splits, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from configs.schema import SourceConfig
from services.contracts import Scene, Split
from services.data.images import load_depth
from services.data.readers import Notes, open_reader
from services.errors import ConfigError, DataError
from tests.support.analytic import HEIGHT, WIDTH, K, pixel_rays, poses, render, shots
from tests.support.films import write_video
from tests.support.layouts import assert_right, assert_wrong, matrix_text, save_color, save_depth_mm


def read(root: Path, name: str, notes: Notes | None = None, **options: Any) -> Scene:
    reader = open_reader(root, SourceConfig(format=name, options=options))
    scene = reader.read(reader.list_ids()[0], notes)
    assert isinstance(scene, Scene)
    return scene


# --- ARKitScenes -----------------------------------------------------------------------------------------------------


def write_arkit(
    root: Path, *, inverted: bool = False, half: float = 0.0, unit: float = 1.0, late: float = 0.004
) -> Path:
    """A video as ARKitScenes gives it: a pose a little after each picture, and poses of other places between."""
    folder = root / "Training/40753679"
    lines = []
    for number, shot in enumerate(shots()):
        time = 100.0 + number
        save_color(folder / f"lowres_wide/40753679_{time:.3f}.png", shot.color)
        save_depth_mm(folder / f"lowres_depth/40753679_{time:.3f}.png", shot.depth * unit)
        pincam = folder / f"lowres_wide_intrinsics/40753679_{time + 0.001:.3f}.pincam"
        pincam.parent.mkdir(exist_ok=True)
        pincam.write_text(f"{WIDTH} {HEIGHT} {K[0, 0]} {K[1, 1]} {K[0, 2] + half} {K[1, 2] + half}\n")
        pose = shot.pose if inverted else np.linalg.inv(shot.pose)
        vector = Rotation.from_matrix(pose[:3, :3]).as_rotvec()
        lines.append(" ".join(repr(float(v)) for v in (time + late, *vector, *pose[:3, 3])))
        lines.append(" ".join(str(v) for v in (time + 0.04, 0, 0, 0, 9, 9, 9)))
    (folder / "lowres_wide.traj").write_text("\n".join(lines) + "\n")
    obb = {"centroid": [1, 2, 3], "axesLengths": [2, 1, 1], "normalizedAxes": [0, 1, 0, -1, 0, 0, 0, 0, 1]}
    objects = {"data": [{"label": "sofa", "segments": {"obbAligned": obb}}]}
    (folder / "40753679_3dod_annotation.json").write_text(json.dumps(objects))
    return folder


def test_arkitscenes_reprojects(tmp_path: Path) -> None:
    write_arkit(tmp_path)
    scene = read(tmp_path, "arkitscenes")
    assert_right(scene)
    assert scene.split is Split.TRAIN
    assert [view.timestamp for view in scene.views] == [100.0, 101.0, 102.0, 103.0]
    (sofa,) = scene.instances
    reader = open_reader(tmp_path, SourceConfig(format="arkitscenes"))
    assert reader.classes()[sofa.class_id] == sofa.label == "sofa"
    assert sofa.box is not None
    assert np.asarray(sofa.box.axes)[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "wrong", [{"inverted": True}, {"half": 0.5}, {"unit": 1.25}], ids=["camera-to-world", "half a pixel", "depth unit"]
)
def test_arkitscenes_written_wrongly_does_not(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write_arkit(tmp_path, **wrong)
    assert_wrong(read(tmp_path, "arkitscenes"))


def test_arkitscenes_without_a_pose_near_in_time_leaves_the_picture_out(tmp_path: Path) -> None:
    folder = write_arkit(tmp_path)
    save_color(folder / "lowres_wide/40753679_200.000.png", shots()[0].color)
    notes = Notes()
    assert len(read(tmp_path, "arkitscenes", notes).views) == 4
    assert notes.dropped == {"without a finite pose within 0.05 s": 1}
    with pytest.raises(DataError, match="no usable view"):
        read(tmp_path, "arkitscenes", max_gap_s=0.0001)


# --- RealEstate10K ---------------------------------------------------------------------------------------------------


def write_re10k(
    root: Path,
    *,
    inverted: bool = False,
    half: float = 0.5,
    axes: tuple[float, ...] = (1, 1, 1, 1),
    frames: bool = True,
) -> None:
    """A clip as RealEstate10K gives it."""
    lines = ["https://www.youtube.com/watch?v=abcDEF12345"]
    for number, shot in enumerate(shots()):
        time = 100_000 * number
        pose = shot.pose @ np.diag(axes)
        matrix = (pose if inverted else np.linalg.inv(pose))[:3]
        camera = (K[0, 0] / WIDTH, K[1, 1] / HEIGHT, (K[0, 2] + half) / WIDTH, (K[1, 2] + half) / HEIGHT, 0, 0)
        lines.append(" ".join([str(time), *(repr(float(v)) for v in (*camera, *matrix.ravel()))]))
        if frames:
            save_color(root / f"frames/train/0000cc6d8b108390/{time}.png", shot.color)
    path = root / "train/0000cc6d8b108390.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def test_re10k_reprojects(tmp_path: Path) -> None:
    write_re10k(tmp_path)
    scene = read(tmp_path, "re10k")
    assert_right(scene, shots())
    assert scene.split is Split.TRAIN
    assert [view.timestamp for view in scene.views] == [0.0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "wrong",
    [{"inverted": True}, {"half": 0.0}, {"half": 1.0}, {"axes": (1, -1, -1, 1)}],
    ids=["camera-to-world", "half a pixel less", "half a pixel more", "opengl axes"],
)
def test_re10k_written_wrongly_does_not(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write_re10k(tmp_path, **wrong)
    assert_wrong(read(tmp_path, "re10k"), shots())


@pytest.mark.parametrize("name", ["abcDEF12345", "0000cc6d8b108390"])
def test_re10k_from_a_video(tmp_path: Path, name: str) -> None:
    write_re10k(tmp_path, frames=False)
    # The video runs at thrice the rate of the cameras, with unrelated frames between.
    frames = [frame for shot in shots() for frame in (shot.color, np.zeros_like(shot.color), np.zeros_like(shot.color))]
    write_video(tmp_path / f"videos/{name}.mp4", frames, fps=30)
    scene = read(tmp_path, "re10k")
    assert [view.image.frame for view in scene.views] == [0, 3, 6, 9]
    assert_right(scene, shots(), limit=2.5)


def test_re10k_without_some_frames(tmp_path: Path) -> None:
    write_re10k(tmp_path)
    (tmp_path / "frames/train/0000cc6d8b108390/100000.png").unlink()
    notes = Notes()
    assert len(read(tmp_path, "re10k", notes).views) == 3
    assert notes.dropped == {"without a frame at its time": 1}


# --- 7-Scenes --------------------------------------------------------------------------------------------------------

COLOR_K = K
DEPTH_K = np.array([[60.0, 0.0, 47.0], [0.0, 61.0, 35.0], [0.0, 0.0, 1.0]])


def write_sevenscenes(
    root: Path,
    *,
    inverted: bool = False,
    unit: float = 1.0,
    axes: tuple[float, ...] = (1, 1, 1, 1),
    registered: bool = False,
) -> None:
    """A sequence as 7-Scenes gives it: colour and depth through two cameras, a block of depth unknown."""
    sequence = root / "chess/seq-03"
    for number, pose in enumerate(poses()):
        save_color(sequence / f"frame-{number:06d}.color.png", render(pose, pixel_rays(COLOR_K)).color)
        depth = render(pose, pixel_rays(COLOR_K if registered else DEPTH_K)).depth * unit
        stored = np.round(depth * 1000).astype(np.uint16)
        stored[:10, :10] = 65535
        Image.fromarray(stored).save(sequence / f"frame-{number:06d}.depth.png")
        written = pose @ np.diag(axes)
        written = np.linalg.inv(written) if inverted else written
        (sequence / f"frame-{number:06d}.pose.txt").write_text(matrix_text(written).replace(" ", "\t "))
    (root / "chess/TrainSplit.txt").write_text("sequence1\nsequence2\n")
    (root / "chess/TestSplit.txt").write_text("sequence3\n")


def cameras(depth: np.ndarray = DEPTH_K) -> dict[str, list[float]]:
    numbers = {"color_camera": COLOR_K, "depth_camera": depth}
    return {name: [float(c[0, 0]), float(c[1, 1]), float(c[0, 2]), float(c[1, 2])] for name, c in numbers.items()}


def colored(scene: Scene) -> Scene:
    """The scene with colours that its depth cameras would see, looked up through the stored pictures' cameras."""
    import dataclasses

    from services.data.images import load_image
    from tests.support.analytic import bilinear, unproject

    views = []
    for number, view in enumerate(scene.views):
        assert view.depth is not None
        assert view.K is not None
        pose = np.asarray(view.pose)
        depth = load_depth(view.depth)
        points = (unproject(depth, view.depth.K.matrix(), pose) - pose[:3, 3]) @ pose[:3, :3]
        projected = points @ view.K.matrix().T
        z = np.where(points[..., 2] > 0, points[..., 2], 1.0)
        u, v = projected[..., 0] / z, projected[..., 1] / z
        inside = (depth > 0) & (u >= 0) & (u < WIDTH - 1) & (v >= 0) & (v < HEIGHT - 1)
        seen = np.zeros((*depth.shape, 3), np.uint8)
        seen[inside] = np.round(bilinear(load_image(view.image), u[inside], v[inside]))
        folder = Path(view.image.path).parent / "seen"
        save_color(folder / f"{number}.png", seen)
        stored = np.where(inside, np.round(depth * 1000), 0).astype(np.uint16)
        Image.fromarray(stored).save(folder / f"{number}.depth.png")
        reference = dataclasses.replace(view.depth, path=str(folder / f"{number}.depth.png"))
        image = dataclasses.replace(view.image, path=str(folder / f"{number}.png"))
        views.append(dataclasses.replace(view, image=image, K=view.depth.K, depth=reference))
    return dataclasses.replace(scene, views=tuple(views))


def test_sevenscenes_reprojects_with_a_camera_each(tmp_path: Path) -> None:
    write_sevenscenes(tmp_path)
    scene = read(tmp_path, "sevenscenes", **cameras())
    assert_right(colored(scene), limit=2.2)
    assert (scene.id, scene.split) == ("chess-seq-03", Split.TEST)
    assert scene.views[0].depth is not None
    depth = load_depth(scene.views[0].depth)
    assert (depth[:10, :10] == 0).all()
    assert (depth[10:] > 0).all()


@pytest.mark.parametrize(
    ("wrong", "depth_camera"),
    [
        ({"inverted": True}, DEPTH_K),
        ({"unit": 1.25}, DEPTH_K),
        ({"axes": (1, -1, -1, 1)}, DEPTH_K),
        ({}, COLOR_K),
        ({}, DEPTH_K + np.array([[0, 0, 1.0], [0, 0, 1.0], [0, 0, 0]])),
    ],
    ids=["world-to-camera", "depth unit", "opengl axes", "the colour camera for depth", "a pixel"],
)
def test_sevenscenes_written_or_read_wrongly_does_not(
    tmp_path: Path, wrong: dict[str, Any], depth_camera: np.ndarray
) -> None:
    write_sevenscenes(tmp_path, **wrong)
    scene = read(tmp_path, "sevenscenes", **cameras(depth_camera))
    assert_wrong(colored(scene))


def test_sevenscenes_published_cameras(tmp_path: Path) -> None:
    sequence = tmp_path / "fire/seq-01"
    save_color(sequence / "frame-000000.color.png", np.zeros((480, 640, 3), np.uint8))
    save_depth_mm(sequence / "frame-000000.depth.png", np.ones((480, 640)))
    (sequence / "frame-000000.pose.txt").write_text(matrix_text(np.eye(4)))
    (view,) = read(tmp_path, "sevenscenes").views
    assert view.K is not None
    assert view.depth is not None
    assert (view.K.fx, view.depth.K.fx, view.depth.K.cx, view.depth.K.cy) == (525.0, 585.0, 320.0, 240.0)
    with pytest.raises(ConfigError, match=r"depth_camera.*four numbers"):
        read(tmp_path, "sevenscenes", depth_camera=[1, 2, 3])
