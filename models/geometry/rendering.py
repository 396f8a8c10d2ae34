"""A coloured point cloud seen by a camera: z-buffer splats, small holes filled, the rest black and counted.

Uniformly for the pictures that are shown and those that are scored: points are discs of a fixed radius in pixels,
the nearest one wins, a pixel that none covers takes the nearest drawn one within a few pixels, and what is still
empty is 0 and lowers the coverage.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
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
    place, depth = _discs(uv, z, radius * width / REFERENCE_WIDTH)
    copies = depth.shape[-1] // z.shape[-1]
    buffer = splat(place, depth, colors.repeat(1, copies, 1), height, width)
    color, filled, covered = _fill(buffer.values, buffer.depth, buffer.coverage, fill)
    return Rendering(color=color, depth=filled, drawn=buffer.coverage, covered=covered)


def _discs(uv: Tensor, z: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """(B, P, 2) and (B, P) -> pixel centres (B, n P, 2) that the discs cover, and depths (0: not covered)."""
    centre = (uv + 0.5).floor()
    reach = math.ceil(radius)
    offsets = [(u, v) for v in range(-reach, reach + 1) for u in range(-reach, reach + 1)]
    # The pixel that the point falls on comes first: of equal depths the lowest index wins.
    offsets.sort(key=lambda o: (o[0] ** 2 + o[1] ** 2, o[1], o[0]))
    places, depths = [centre], [z]
    for offset in offsets[1:]:
        place = centre + centre.new_tensor(offset)
        inside = (place - uv).square().sum(-1) <= radius * radius
        places.append(place)
        depths.append(torch.where(inside, z, 0.0))
    return torch.cat(places, 1), torch.cat(depths, 1)


def _fill(color: Tensor, depth: Tensor, drawn: Tensor, fill: int) -> tuple[Tensor, Tensor, Tensor]:
    """Holes take the nearest drawn pixel within ``fill``."""
    height, width = depth.shape[1:]
    reach = range(-fill, fill + 1)
    offsets = [(v, u) for v in reach for u in reach if 0 < v * v + u * u <= fill * fill]
    offsets.sort(key=lambda o: (o[0] ** 2 + o[1] ** 2, o))
    color, depth, covered = color.clone(), depth.clone(), drawn.clone()
    source_color, source_depth = color.clone(), depth.clone()
    for v, u in offsets:
        if abs(v) >= height or abs(u) >= width:
            continue
        rows, columns = slice(max(0, -v), height - max(0, v)), slice(max(0, -u), width - max(0, u))
        from_rows, from_columns = slice(max(0, v), height + min(0, v)), slice(max(0, u), width + min(0, u))
        here, there = (slice(None), rows, columns), (slice(None), from_rows, from_columns)
        takes = ~covered[here] & drawn[there]
        color[here] = torch.where(takes[..., None], source_color[there], color[here])
        depth[here] = torch.where(takes, source_depth[there], depth[here])
        covered[here] = covered[here] | takes
    return color, depth, covered


def depth_in(points: Tensor, pose: Tensor) -> Tensor:
    """Depth along a camera's axis of points (B, ..., 3), for the pose (B, 4, 4) of the camera in their frame."""
    return transform(points, inverse(pose))[..., 2]
