"""Geometry of oriented boxes on a floor: corners, exact distance, footprints, a walkable line. numpy, z up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from services.contracts import Box3D


@dataclass(frozen=True, kw_only=True, eq=False)
class Box:
    """An oriented box in the aligned frame: z is up. ``axes`` (3, 3) has unit axes as columns, ``half`` half sizes."""

    center: np.ndarray
    axes: np.ndarray
    half: np.ndarray

    @classmethod
    def of(cls, box: Box3D, alignment: np.ndarray) -> Box:
        """The box moved by ``alignment`` (4, 4), a rigid transform."""
        rotation = alignment[:3, :3]
        return cls(
            center=rotation @ np.array(box.center) + alignment[:3, 3],
            axes=rotation @ np.array(box.axes),
            half=np.array(box.size) / 2,
        )

    def corners(self) -> np.ndarray:
        """The eight corners, (8, 3)."""
        signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1], indexing="ij"), -1).reshape(8, 3)
        return self.center + (signs * self.half) @ self.axes.T

    @property
    def bottom(self) -> float:
        """Height of the lowest point."""
        return float(self.center[2] - np.abs(self.axes[2] * self.half).sum())

    @property
    def top(self) -> float:
        """Height of the highest point."""
        return float(self.center[2] + np.abs(self.axes[2] * self.half).sum())

    @property
    def longest(self) -> float:
        """Longest of length, width and height, metres."""
        return float(2 * self.half.max())

    @property
    def volume(self) -> float:
        """Cubic metres."""
        return float(8 * np.prod(self.half))

    def contains(self, points: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """Which points (..., 3) lie within the box grown by ``margin`` metres on each side."""
        local = (points - self.center) @ self.axes
        return np.asarray((np.abs(local) <= self.half + margin).all(-1))


def distance(a: Box, b: Box) -> float:
    """Distance of the closest points of two boxes in metres, 0 where they touch or intersect.

    The least distance of two convex bodies: min |p - q| over p in a, q in b, a linear least-squares problem in the
    six box coordinates with bounds -1 and 1. It is solved by an active-set method, exactly and not by iteration to
    a tolerance.
    """
    matrix = np.concatenate([a.axes * a.half, -b.axes * b.half], axis=1)
    solution = lsq_linear(matrix, b.center - a.center, bounds=(-1, 1), method="bvls", tol=1e-12)
    return float(np.linalg.norm(matrix @ solution.x - (b.center - a.center)))


def flat_distance(a: Box, b: Box) -> float:
    """Distance of the centres on the floor, metres."""
    return float(np.linalg.norm((a.center - b.center)[:2]))


def bearing(position: np.ndarray, facing: np.ndarray, target: np.ndarray) -> float:
    """Angle to turn on the floor at ``position``, facing ``facing``, to face ``target``: degrees in (-180, 180].

    Positive is left (anticlockwise seen from above).
    """
    ahead, wanted = (facing - position)[:2], (target - position)[:2]
    cross = ahead[0] * wanted[1] - ahead[1] * wanted[0]
    return float(np.degrees(np.arctan2(cross, ahead @ wanted)))


def walkable(start: Box, end: Box, obstacles: list[Box], *, floor: float, body: float, step: float = 0.05) -> bool:
    """Whether a person can walk straight from ``start`` to ``end``: no obstacle within ``body`` metres of the line.

    What is lower than 10 cm (a rug) or hangs above 1.8 m is no obstacle. The line runs between the centres.
    """
    length = flat_distance(start, end)
    share = np.linspace(0, 1, max(2, int(length / step)))[:, None]
    line = start.center + share * (end.center - start.center)
    for box in obstacles:
        if box.top < floor + 0.1 or box.bottom > floor + 1.8:
            continue
        line[:, 2] = box.center[2]
        if box.contains(line, margin=body).any():
            return False
    return True


def floor_area(vertices: np.ndarray, faces: np.ndarray, *, cell: float = 0.01) -> float | None:
    """Area of the room's floor in square metres from its mesh in the aligned frame; None without any floor.

    Args:
        vertices: (N, 3) metres.
        faces: (M, 3) indices.
        cell: size of a raster cell, metres.

    The horizontal faces of the floor and of furniture up to 1.6 m are drawn from above; walls stand outside of
    that. Gaps narrower than 0.5 m are closed and holes filled, because a scan does not see the floor below
    furniture. The largest connected region counts, with the area inside its outline, which is exact to one cell
    along the border: 0.2 m^2 of a room of 20 m^2 at most.
    """
    import cv2

    triangles = vertices[faces]
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    level = np.abs(normals[:, 2]) > 0.7 * np.linalg.norm(normals, axis=1).clip(1e-12)
    if not level.any():
        return None
    heights = triangles[level][:, :, 2].mean(1)
    areas = np.abs(normals[level][:, 2])
    floor = _weighted_quantile(heights, areas, 0.05)
    flat = triangles[level][heights < floor + 1.6][:, :, :2]
    gap = round(0.25 / cell)
    origin = flat.min((0, 1)) - (2 * gap + 2) * cell
    size = np.ceil((flat.max((0, 1)) - origin) / cell).astype(int) + 2 * gap + 2
    raster = np.zeros((size[1], size[0]), np.uint8)
    shift = 4  # fractional bits of cv2's fixed-point coordinates
    points = np.round((flat - origin) / cell * 2**shift).astype(np.int32)
    for triangle in points:
        cv2.fillConvexPoly(raster, triangle, 1, shift=shift)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * gap + 1, 2 * gap + 1))
    raster = cv2.morphologyEx(raster, cv2.MORPH_CLOSE, disc)
    outlines, _ = cv2.findContours(raster, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return max(float(cv2.contourArea(outline)) for outline in outlines) * cell * cell


def _weighted_quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, share * cumulative[-1])])
