"""A textured room with a sphere in it, rendered by exact maths, and the reprojection of one view into another.

Everything here is in Loom3D's conventions (camera-to-world, OpenCV axes, metres, pixel centres at integers); the
exporters of the tests convert from them to what each format writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LOW, HIGH = np.array([-2.0, -1.5, 0.0]), np.array([2.0, 1.5, 2.6])
CENTER, RADIUS = np.array([0.3, 0.1, 0.8]), 0.5
WIDTH, HEIGHT = 96, 72
K = np.array([[70.0, 0.0, 46.3], [0.0, 71.0, 36.9], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Shot:
    """One rendered view: uint8 colour, float64 depth along z, camera-to-world pose."""

    color: np.ndarray
    depth: np.ndarray
    pose: np.ndarray


def texture(points: np.ndarray) -> np.ndarray:
    """Smooth colour (0..255, float) of world points (..., 3): a wave of about 0.6 m in each channel."""
    x, y, z = np.moveaxis(points, -1, 0)
    waves = (
        np.sin(9.0 * x + 5.0 * y) + np.sin(7.0 * z - 4.0 * y),
        np.sin(8.0 * y + 6.0 * z) + np.sin(7.0 * x - 3.0),
        np.sin(9.0 * z + 5.0 * x) + np.sin(8.0 * y + 1.0),
    )
    return 127.0 + 55.0 * np.stack(waves, axis=-1)


def distance(origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Multiple of each ray (..., 3) at which it first meets the room or the sphere."""
    with np.errstate(divide="ignore"):
        walls = np.maximum((LOW - origin) / rays, (HIGH - origin) / rays).min(axis=-1)
    a = (rays * rays).sum(-1)
    b = (rays * (origin - CENTER)).sum(-1)
    c = ((origin - CENTER) ** 2).sum() - RADIUS**2
    root = b * b - a * c
    sphere = (-b - np.sqrt(np.maximum(root, 0.0))) / a
    return np.where((root > 0) & (sphere > 0), np.minimum(sphere, walls), walls)


def pixel_rays(camera: np.ndarray = K, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Camera-frame rays (H, W, 3) with z = 1 through the pixel centres."""
    u, v = np.meshgrid(np.arange(width, dtype=float), np.arange(height, dtype=float))
    return np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(camera).T


def render(pose: np.ndarray, rays: np.ndarray | None = None) -> Shot:
    """The view from ``pose``. ``rays`` have z = 1, so that the multiple of a ray is depth along z."""
    rays = pixel_rays() if rays is None else rays
    world = rays @ pose[:3, :3].T
    depth = distance(pose[:3, 3], world)
    points = pose[:3, 3] + depth[..., None] * world
    return Shot(np.round(texture(points)).astype(np.uint8), depth, pose)


def look_at(eye: tuple[float, float, float], target: tuple[float, float, float], roll: float) -> np.ndarray:
    """Camera-to-world pose that looks from ``eye`` to ``target``, turned by ``roll`` radians about its axis."""
    forward = np.subtract(target, eye)
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(forward, right), forward], axis=1)
    cos, sin = np.cos(roll), np.sin(roll)
    pose = np.eye(4)
    pose[:3, :3] = axes @ np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    pose[:3, 3] = eye
    return pose


def poses() -> list[np.ndarray]:
    """Four views of the same things, each rolled differently (equal rolls would hide a shifted centre)."""
    return [
        look_at((-1.5, -1.1, 1.4), (1.0, 0.5, 0.9), 0.0),
        look_at((-1.4, -0.6, 1.6), (1.1, 0.5, 0.9), 1.2),
        look_at((-1.3, -1.2, 1.1), (1.0, 0.7, 1.0), -2.0),
        look_at((-1.0, -1.0, 1.7), (1.0, 0.4, 0.8), 3.0),
    ]


def shots() -> list[Shot]:
    """The rendered views."""
    return [render(pose) for pose in poses()]


def bilinear(image: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Values (N, C) of an image at pixel coordinates inside of it."""
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    du, dv = (u - left)[:, None], (v - top)[:, None]
    image = image.reshape(*image.shape[:2], -1).astype(float)
    upper = image[top, left] * (1 - du) + image[top, left + 1] * du
    lower = image[top + 1, left] * (1 - du) + image[top + 1, left + 1] * du
    return upper * (1 - dv) + lower * dv


def unproject(depth: np.ndarray, camera: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """World points (H, W, 3) of a depth map."""
    rays = pixel_rays(camera, depth.shape[1], depth.shape[0])
    return (rays * depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]


def reprojection_error(
    source: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    target: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> tuple[float, float]:
    """(mean absolute colour difference in grey levels, share of the source's pixels that were compared).

    Each side is (colour, depth, K, pose). Pixels that fall outside of the target, or behind what it sees by more than
    2 cm or one percent, are not compared.
    """
    color, depth, camera, pose = source
    other_color, other_depth, other_camera, other_pose = target
    known = depth > 0
    points = unproject(depth, camera, pose)[known]
    inside_camera = (points - other_pose[:3, 3]) @ other_pose[:3, :3]
    z = inside_camera[:, 2]
    front = z > 1e-6
    projected = inside_camera @ other_camera.T
    u = np.where(front, projected[:, 0] / np.where(front, z, 1.0), -1.0)
    v = np.where(front, projected[:, 1] / np.where(front, z, 1.0), -1.0)
    height, width = other_depth.shape
    inside = front & (u >= 0) & (u < width - 1) & (v >= 0) & (v < height - 1)
    if not inside.any():
        return float("inf"), 0.0
    seen = bilinear(other_depth, u[inside], v[inside])[:, 0]
    visible = np.abs(seen - z[inside]) < np.maximum(0.02, 0.01 * seen)
    if not visible.any():
        return float("inf"), 0.0
    there = bilinear(other_color, u[inside], v[inside])[visible]
    here = color[known][inside][visible].astype(float)
    return float(np.abs(there - here).mean()), float(visible.sum() / known.size)


def world_error(color: np.ndarray, depth: np.ndarray, camera: np.ndarray, pose: np.ndarray) -> float:
    """Mean difference between the pixels and the texture at their world points: also sees shifts that cancel."""
    known = depth > 0
    return float(np.abs(texture(unproject(depth, camera, pose))[known] - color[known]).mean())
