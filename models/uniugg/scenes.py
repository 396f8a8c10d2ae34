"""From imagined pointmaps to a coloured point cloud, and to the picture that a camera takes of it.

Points are drawn as small discs into a z-buffer; small holes between them take their nearest neighbour, larger ones
stay black and are reported, since a metric over pixels that nothing was drawn on says little.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.geometry.poses import inverse
from models.geometry.projection import project, splat, transform

REFERENCE_WIDTH = 224
"""Radii are stated for pictures of this width and grow with it."""


class PointCloud(NamedTuple):
    """Points with colours."""

    points: Tensor
    """(P, 3) metres."""
    colours: Tensor
    """(P, 3) in [0, 1]."""


class Rendered(NamedTuple):
    """A picture of a point cloud."""

    image: Tensor
    """(H, W, 3) in [0, 1]; 0 in the holes that remain."""
    depth: Tensor
    """(H, W) metres along the axis; 0 in the holes that remain."""
    drawn: Tensor
    """(H, W) bool: a point fell here."""
    covered: Tensor
    """(H, W) bool: drawn, or filled from a neighbour."""

    @property
    def coverage(self) -> float:
        """Share of the pixels that show something."""
        return float(self.covered.float().mean())


def select_points(points: Tensor, colours: Tensor, confidence: Tensor, threshold: float) -> PointCloud:
    """Points (..., 3) with colours (..., 3) whose confidence (...) is at least ``threshold``, flattened."""
    keep = (confidence >= threshold) & torch.isfinite(points).all(-1)
    return PointCloud(points[keep], colours[keep])


def render(
    cloud: PointCloud, K: Tensor, pose: Tensor, *, height: int, width: int, radius: float, fill: int
) -> Rendered:
    """Draw a point cloud as a camera sees it.

    Args:
        cloud: points in the frame that ``pose`` refers to.
        K: (3, 3) of the picture, pixel centres at integers.
        pose: (4, 4) camera -> frame of the points.
        height: of the picture.
        width: of the picture.
        radius: of a drawn point in pixels, for a picture 224 wide.
        fill: holes up to this many pixels from a drawn one take the nearest.
    """
    camera = transform(cloud.points.float(), inverse(pose.to(cloud.points).float()))
    uv, z = project(camera, K.to(camera))
    offsets = _disc(radius * width / REFERENCE_WIDTH)
    shifts = camera.new_tensor(offsets)
    values = torch.cat([cloud.colours.to(camera), z[:, None]], dim=-1)
    # A disc is its points at every offset; the z-buffer decides between those of different discs.
    drawn = splat(
        (uv[None] + shifts[:, None]).flatten(0, 1),
        z.repeat(len(offsets)),
        values.repeat(len(offsets), 1),
        height,
        width,
    )
    picture, covered = fill_holes(drawn.values, drawn.coverage, fill)
    return Rendered(image=picture[..., :3], depth=picture[..., 3], drawn=drawn.coverage, covered=covered)


def fill_holes(picture: Tensor, known: Tensor, distance: int) -> tuple[Tensor, Tensor]:
    """Pixels of (H, W, C) that are not ``known`` (H, W) take the nearest known one up to ``distance`` away.

    Of equally near ones the first in reading order of the offsets wins. Returns the picture and what is known now.
    """
    height, width = known.shape
    padded = torch.nn.functional.pad(picture, (0, 0, distance, distance, distance, distance))
    there = torch.nn.functional.pad(known, (distance, distance, distance, distance))
    out, filled = picture.clone(), known.clone()
    for dx, dy in _disc(distance)[1:]:
        rows, columns = slice(distance + dy, distance + dy + height), slice(distance + dx, distance + dx + width)
        take = ~filled & there[rows, columns]
        out = torch.where(take[..., None], padded[rows, columns], out)
        filled = filled | take
    return out, filled


def _disc(radius: float) -> list[tuple[int, int]]:
    """Whole offsets (x, y) within ``radius``, nearest first: the first is (0, 0)."""
    reach = math.floor(radius)
    offsets = [(x, y) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    return sorted((o for o in offsets if o[0] ** 2 + o[1] ** 2 <= radius**2), key=lambda o: o[0] ** 2 + o[1] ** 2)
