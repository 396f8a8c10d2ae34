"""Writes the analytic views as ScanNet-like folders, and judges what a reader made of an export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from services.contracts import Item, Scene
from services.data.images import load_depth, load_image
from tests.support.analytic import K, Shot, render, reprojection_error, shots, world_error

#: Grey levels: what bilinear sampling and rounding cost, and what any wrong convention costs at least.
RIGHT, WRONG = 1.6, 4.0
#: The same for pictures that were resampled once before (undistorted).
RESAMPLED = 2.2


def matrix_text(matrix: np.ndarray) -> str:
    return "\n".join(" ".join(repr(float(value)) for value in row) for row in matrix) + "\n"


def four(camera: np.ndarray) -> np.ndarray:
    full = np.eye(4)
    full[:3, :3] = camera
    return full


def save_color(path: Path, color: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(color).save(path)


def save_depth_mm(path: Path, depth: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(depth * 1000).astype(np.uint16)).save(path)


def judge(scene: Scene | Item, truth: Sequence[Shot] = ()) -> tuple[float, float]:
    """(worst reprojection error over all pairs of views, worst error of world points) in grey levels.

    ``truth`` gives the depth of the views where the source has none.
    """
    assert isinstance(scene, Scene)
    sides = []
    for number, view in enumerate(scene.views):
        color = load_image(view.image)
        assert view.K is not None
        assert view.pose is not None
        assert color.shape[:2] == (view.K.height, view.K.width)
        pose = np.asarray(view.pose)
        if view.depth is not None:
            depth, camera = load_depth(view.depth), view.depth.K.matrix()
        else:
            depth, camera = truth[number].depth, view.K.matrix()
        sides.append((color, depth, camera, pose))
    pairs = [reprojection_error(one, other) for i, one in enumerate(sides) for j, other in enumerate(sides) if i != j]
    assert len(pairs) >= 6
    # A pair that compares next to nothing says nothing: it counts as the worst.
    reprojected = max(error if share > 0.15 else float("inf") for error, share in pairs)
    return reprojected, max(world_error(*side) for side in sides)


def assert_right(scene: Scene | Item, truth: Sequence[Shot] = (), limit: float = RIGHT) -> None:
    reprojected, world = judge(scene, truth)
    assert reprojected < limit
    assert world < limit


def assert_wrong(scene: Scene | Item, truth: Sequence[Shot] = ()) -> None:
    reprojected, _ = judge(scene, truth)
    assert reprojected > WRONG


LABELS = "id\traw_category\tcategory\tcount\n1\twall\twall\t9\n2\toffice chair\tchair\t4\n5\ttable\ttable\t2\n"


def write_scannet(
    root: Path,
    scene_id: str = "scene0000_00",
    *,
    views: Sequence[Shot] | None = None,
    camera: np.ndarray = K,
    flip: Sequence[float] = (1, 1, 1),
    inverted: bool = False,
    depth_scale: float = 1.0,
    lost: Sequence[int] = (),
    split: str = "train",
) -> Path:
    """One scene as the ScanNet exporter writes it; the arguments after ``camera`` write it wrongly."""
    views = shots() if views is None else views
    scene = root / "scans" / scene_id
    for number, shot in enumerate(views):
        save_color(scene / f"color/{number * 10}.png", shot.color)
        save_depth_mm(scene / f"depth/{number * 10}.png", shot.depth * depth_scale)
        pose = shot.pose @ np.diag([*flip, 1.0])
        pose = np.linalg.inv(pose) if inverted else pose
        path = scene / f"pose/{number * 10}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(matrix_text(np.full((4, 4), -np.inf) if number in lost else pose))
        ids = np.where(shot.depth < np.median(shot.depth), 1, 0).astype(np.uint16)
        (scene / "instance-filt").mkdir(exist_ok=True)
        (scene / "label-filt").mkdir(exist_ok=True)
        Image.fromarray(ids).save(scene / f"instance-filt/{number * 10}.png")
        Image.fromarray(ids * 2).save(scene / f"label-filt/{number * 10}.png")
    (scene / "intrinsic").mkdir(exist_ok=True)
    for name in ("color", "depth"):
        (scene / f"intrinsic/intrinsic_{name}.txt").write_text(matrix_text(four(camera)))
    alignment = " ".join(str(value) for value in np.eye(4).ravel())
    (scene / f"{scene_id}.txt").write_text(f"sceneType = office\naxisAlignment = {alignment}\n")
    groups = [
        {
            "id": 0,
            "objectId": 0,
            "label": "office chair",
            "segments": [],
            "obb": {
                "centroid": [1.0, 2.0, 0.5],
                "axesLengths": [0.6, 0.4, 1.0],
                "normalizedAxes": [0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, 1],
            },
        }
    ]
    (scene / f"{scene_id}.aggregation.json").write_text(json.dumps({"sceneId": scene_id, "segGroups": groups}))
    (root / "scannetv2-labels.combined.tsv").write_text(LABELS)
    (root / "splits").mkdir(exist_ok=True)
    with (root / f"splits/{split}.txt").open("a") as file:
        file.write(scene_id + "\n")
    return scene


def small_views() -> list[Shot]:
    """Two views of 24x18 pixels, where only the plumbing is tested."""
    from tests.support.analytic import pixel_rays, poses

    rays = pixel_rays(SMALL_K, 24, 18)
    return [render(pose, rays) for pose in poses()[:2]]


SMALL_K = np.array([[18.0, 0.0, 11.5], [0.0, 18.0, 8.5], [0.0, 0.0, 1.0]])
