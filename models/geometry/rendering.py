"""A coloured point cloud seen by a camera: z-buffer splats, small holes filled, the rest black and counted.

Uniformly for the pictures that are shown and those that are scored: points are discs of a fixed radius in pixels,
the nearest one wins, a pixel that none covers takes the nearest drawn one within a few pixels, and what is still
empty is 0 and lowers the coverage.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.geometry.poses import inverse
from models.geometry.projection import project, splat, transform

REFERENCE_WIDTH = 224
"""Width, in pixels, that the radius is stated for."""


class Rendering(NamedTuple):
    """Result of :func:`render_points`."""

    color: Tensor
    """(B, H, W, C); 0 in holes."""
    depth: Tensor
    """(B, H, W) metres along the camera's z; 0 in holes."""
    drawn: Tensor
    """(B, H, W) bool: a point covers the pixel."""
    covered: Tensor
    """(B, H, W) bool: drawn, or filled from a neighbour."""

    def coverage(self) -> Tensor:
        """(B,) share of covered pixels."""
        return self.covered.float().mean((1, 2))


def render_points(
    points: Tensor,
    colors: Tensor,
    K: Tensor,
    pose: Tensor,
    height: int,
    width: int,
    *,
    valid: Tensor | None = None,
    radius: float = 1.0,
    fill: int = 2,
) -> Rendering:
    """Draw point clouds into cameras.

    Args:
        points: (B, P, 3) metres in the frame that ``pose`` leads to.
        colors: (B, P, C).
        K: (B, 3, 3) of the picture that is drawn, pixel centres at integers.
        pose: (B, 4, 4) camera to that frame.
        height: of the picture, pixels.
        width: of the picture, pixels.
        valid: (B, P) bool, points that are drawn; None draws all. Points that are not finite never are.
        radius: of a point in pixels at a width of 224; it grows with the width. The pixel whose centre is nearest is
            covered at any radius.
        fill: a hole takes the nearest drawn pixel at most so many pixels away (ties: the upper, then the left one).
    """
    uv, z = project(transform(points, inverse(pose)), K)
    if valid is not None:
        z = torch.where(valid, z, 0.0)
    place, depth, copies = _discs(uv, z, radius * width / REFERENCE_WIDTH)
    # The depth goes with the colours, so that a filled pixel has both of the same point.
    values = torch.cat([colors.to(points), z[..., None]], dim=-1).repeat(1, copies, 1)
    buffer = splat(place, depth, values, height, width)
    picture, covered = fill_holes(buffer.values, buffer.coverage, fill)
    return Rendering(color=picture[..., :-1], depth=picture[..., -1], drawn=buffer.coverage, covered=covered)


def fill_holes(picture: Tensor, known: Tensor, distance: int) -> tuple[Tensor, Tensor]:
    """Pixels that are not known take the nearest known one up to ``distance`` pixels away.

    Args:
        picture: (..., H, W, C).
        known: (..., H, W) bool.
        distance: whole pixels.

    Returns:
        The picture, and what is known now. Of equally near pixels the upper, then the left one wins.
    """
    height, width = known.shape[-2:]
    padded = F.pad(picture, (0, 0, *[distance] * 4))
    there = F.pad(known, [distance] * 4)
    filled = known
    for u, v in _offsets(distance)[1:]:
        rows, columns = slice(distance + v, distance + v + height), slice(distance + u, distance + u + width)
        takes = ~filled & there[..., rows, columns]
        picture = torch.where(takes[..., None], padded[..., rows, columns, :], picture)
        filled = filled | takes
    return picture, filled


def _offsets(radius: float) -> list[tuple[int, int]]:
    """Whole offsets (u, v) at most ``radius`` away, the nearest first: (0, 0) is the first."""
    reach = math.floor(radius)
    offsets = [(u, v) for v in range(-reach, reach + 1) for u in range(-reach, reach + 1)]
    near = [(u, v) for u, v in offsets if u * u + v * v <= radius * radius]
    return sorted(near, key=lambda o: (o[0] ** 2 + o[1] ** 2, o[1], o[0]))


def _discs(uv: Tensor, z: Tensor, radius: float) -> tuple[Tensor, Tensor, int]:
    """(B, P, 2) and (B, P) -> pixel centres (B, n P, 2) that the discs cover, depths (0: not covered), and n."""
    centre = (uv + 0.5).floor()
    # A point lies up to half a pixel's diagonal beside the centre of its pixel. That pixel comes first: of equal
    # depths the lowest index wins.
    offsets = _offsets(radius + 0.5**0.5) if radius > 0 else [(0, 0)]
    places, depths = [centre], [z]
    for offset in offsets[1:]:
        place = centre + centre.new_tensor(offset)
        inside = (place - uv).square().sum(-1) <= radius * radius
        places.append(place)
        depths.append(torch.where(inside, z, 0.0))
    return torch.cat(places, 1), torch.cat(depths, 1), len(offsets)


def depth_in(points: Tensor, pose: Tensor) -> Tensor:
    """Depth along a camera's axis of points (B, ..., 3), for the pose (B, 4, 4) of the camera in their frame."""
    return transform(points, inverse(pose))[..., 2]
