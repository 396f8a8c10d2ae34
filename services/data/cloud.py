"""A scene's depth as one coloured point cloud, and a picture of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.geometry import poses, projection
from services.contracts import Scene
from services.data.images import load_depth, load_image

OBLIQUE = np.array([0.45, -0.8, 1.25])
"""Direction from the scene to the camera that looks at it: high enough to see over the nearer walls."""
CUT = 0.62
"""Points in the upper part of the scene's height (the ceiling, most of the walls) are left out of the picture."""

MAX_VIEWS = 150
"""Views, evenly spaced, that a cloud is made of: a scan's thousands add seconds, and nothing that one could see."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cloud:
    """Points (N, 3) in metres in the upright frame of the scene, and their colours (N, 3) uint8."""

    points: np.ndarray
    colours: np.ndarray


def posed_views(scene: Scene) -> list[int]:
    """Views with a pose that is finite."""
    return [i for i, v in enumerate(scene.views) if v.pose is not None and np.isfinite(np.asarray(v.pose)).all()]


def upright(scene: Scene) -> np.ndarray:
    """4x4 from the scene's world to a frame with z up.

    The scene's axis alignment where it states one. Otherwise, the mean upward direction of the cameras: people hold
    them upright. It is taken as z itself where it is nearly that.
    """
    if scene.axis_alignment is not None:
        return np.asarray(scene.axis_alignment, dtype=np.float64)
    cameras = [np.asarray(scene.views[i].pose) for i in posed_views(scene)]
    result = np.eye(4)
    if not cameras:
        return result
    up = -np.mean([camera[:3, 1] for camera in cameras], axis=0)
    length = np.linalg.norm(up)
    if length < 1e-6 or up[2] / length > np.cos(np.radians(35)):
        return result
    up = up / length
    helper = np.eye(3)[np.argmin(np.abs(up))]
    x = np.cross(helper, up)
    x /= np.linalg.norm(x)
    result[:3, :3] = np.stack([x, np.cross(up, x), up])
    return result


def fuse(scene: Scene, *, max_points: int = 300_000) -> Cloud | None:
    """Unproject the views that have depth and a pose; None where none has. DataError names a broken file.

    At most :data:`MAX_VIEWS` of them, evenly spaced. Each gives the same number of evenly spread pixels. Colours are
    looked up by projecting the points into the image, which may have another camera than the depth.
    """
    views = [i for i in posed_views(scene) if scene.views[i].depth is not None]
    if not views:
        return None
    views = views[:: -(-len(views) // MAX_VIEWS)]
    alignment = torch.from_numpy(upright(scene))
    points, colours = [], []
    for index in views:
        view = scene.views[index]
        assert view.depth is not None
        depth = torch.from_numpy(load_depth(view.depth)).double()
        image = torch.from_numpy(load_image(view.image))
        camera = projection.unproject(depth, torch.from_numpy(view.depth.K.matrix()))[depth > 0]
        camera = camera[:: max(1, round(len(camera) * len(views) / max_points))]
        K = view.depth.K if view.K is None else view.K
        uv, _ = projection.project(camera, torch.from_numpy(K.matrix()))
        u = uv[:, 0].round().long().clamp(0, image.shape[1] - 1)
        v = uv[:, 1].round().long().clamp(0, image.shape[0] - 1)
        colours.append(image[v, u].numpy())
        pose = alignment @ torch.tensor(view.pose, dtype=torch.float64)
        points.append(projection.transform(camera, pose).numpy())
    return Cloud(points=np.concatenate(points), colours=np.concatenate(colours))


def save_ply(cloud: Cloud, path: str) -> None:
    """Write the cloud as binary PLY."""
    import trimesh

    trimesh.PointCloud(cloud.points, cloud.colours).export(path)


def picture(cloud: Cloud, *, width: int = 900, height: int = 675) -> np.ndarray:
    """The cloud from obliquely above without its ceiling, uint8 (height, width, 3) on white."""
    low, high = np.percentile(cloud.points, [1, 99], axis=0)
    kept = cloud.points[:, 2] < low[2] + CUT * (high[2] - low[2])
    points = torch.from_numpy(cloud.points[kept])
    colours = torch.from_numpy(cloud.colours[kept]).double()
    middle = torch.from_numpy((low + high) / 2)
    radius = float(np.linalg.norm((high - low)[:2])) / 2 + 1e-3
    eye = middle + torch.from_numpy(OBLIQUE / np.linalg.norm(OBLIQUE)) * 3.2 * radius
    pose = poses.look_at(eye, middle, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    camera = projection.transform(points, poses.inverse(pose))
    uv, z = projection.project(camera, _fitting_camera(camera, width, height))
    return _discs(uv, z, colours, width, height)


def _fitting_camera(points: Tensor, width: int, height: int) -> Tensor:
    """K (3, 3) with which points (N, 3) in the camera's frame fill the picture, but for a margin and few outliers."""
    rays = (points[:, :2] / points[:, 2:]).numpy()
    low, high = np.percentile(rays, [0.5, 99.5], axis=0)
    focal = 0.92 * min(width / (high[0] - low[0] + 1e-6), height / (high[1] - low[1] + 1e-6))
    cx, cy = np.array([width - 1, height - 1]) / 2 - focal * (low + high) / 2
    return torch.tensor([[focal, 0, cx], [0, focal, cy], [0, 0, 1]], dtype=torch.float64)


def _discs(uv: Tensor, z: Tensor, colours: Tensor, width: int, height: int) -> np.ndarray:
    """Points as squares of three pixels; without a size they would leave holes."""
    offsets = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).double()
    spread = (uv[None] + offsets[:, None]).reshape(-1, 2)
    drawn = projection.splat(spread, z.repeat(9), colours.repeat(9, 1), height, width)
    canvas = torch.where(drawn.coverage[..., None], drawn.values, 255.0)
    return np.asarray(canvas.round().byte().numpy())
