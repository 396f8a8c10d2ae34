"""From imagined pointmaps to a coloured point cloud, and to the picture that a camera takes of it.

Points are drawn as small discs into a z-buffer; small holes between them take their nearest neighbour, larger ones
stay black and are reported, since a metric over pixels that nothing was drawn on says little (the drawing itself is
``models.geometry.rendering``, which metrics use as well).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.geometry.rendering import render_points


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
    points, colours = cloud.points.float(), cloud.colours.float()
    drawn = render_points(
        points[None], colours[None], K.to(points)[None], pose.to(points)[None], height, width, radius=radius, fill=fill
    )
    return Rendered(image=drawn.color[0], depth=drawn.depth[0], drawn=drawn.drawn[0], covered=drawn.covered[0])
