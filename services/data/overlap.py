"""How much of what one view of a scene sees another view sees too, by reprojecting depth with an occlusion test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.geometry import projection
from services.contracts import Scene
from services.data.images import load_depth


@dataclass(frozen=True, kw_only=True)
class SmallDepth:
    """Depth maps of the views that have depth, camera and pose, thinned to a few pixels a side.

    Sizes within a scene may differ: maps are padded with unknown depth (0) at the right and at the bottom.
    """

    views: tuple[int, ...]
    depth: Tensor
    """(N, H, W) float32 metres."""
    K: Tensor
    """(N, 3, 3) of the thinned maps."""
    pose: Tensor
    """(N, 4, 4) camera-to-world."""


def thin_depth(depth: np.ndarray, K: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Every n-th pixel of a depth map (H, W) such that the longer side has at most ``side``, and its exact K.

    Pixels are picked, not averaged: a mean over an edge is a point that is on neither surface.
    """
    step = max(1, math.ceil(max(depth.shape) / side))
    offset = step // 2
    small = K.copy()
    small[0, 2], small[1, 2] = K[0, 2] - offset, K[1, 2] - offset
    small[:2] /= step
    return depth[offset::step, offset::step], small


def load_small_depth(scene: Scene, *, side: int = 48) -> SmallDepth:
    """Thinned depth of every view of ``scene`` that has depth and a finite pose. DataError names a broken file."""
    views: list[int] = []
    maps: list[np.ndarray] = []
    cameras: list[np.ndarray] = []
    poses: list[np.ndarray] = []
    for index, view in enumerate(scene.views):
        if view.depth is None or view.pose is None or not np.isfinite(np.asarray(view.pose)).all():
            continue
        depth, K = thin_depth(load_depth(view.depth), view.depth.K.matrix(), side)
        views.append(index)
        maps.append(depth)
        cameras.append(K)
        poses.append(np.asarray(view.pose, dtype=np.float64))
    return stack_depth(views, maps, cameras, poses)


def stack_depth(
    views: list[int], maps: list[np.ndarray], cameras: list[np.ndarray], poses: list[np.ndarray]
) -> SmallDepth:
    """Put thinned maps of possibly different sizes into one padded tensor."""
    height = max((m.shape[0] for m in maps), default=0)
    width = max((m.shape[1] for m in maps), default=0)
    padded = np.zeros((len(maps), height, width), dtype=np.float32)
    for i, depth in enumerate(maps):
        padded[i, : depth.shape[0], : depth.shape[1]] = depth
    return SmallDepth(
        views=tuple(views),
        depth=torch.from_numpy(padded),
        K=torch.from_numpy(np.array(cameras, dtype=np.float32).reshape(-1, 3, 3)),
        pose=torch.from_numpy(np.array(poses, dtype=np.float32).reshape(-1, 4, 4)),
    )


def pairwise_overlap(
    small: SmallDepth, *, relative: float = 0.05, absolute: float = 0.05, rows: int | None = None
) -> np.ndarray:
    """Overlap (rows, N): entry (i, j) is the share of i's known pixels that j sees too, unoccluded.

    ``rows`` limits i to the first so many views; None means all.

    The matrix is not symmetric: a close-up lies wholly in a wide view, not the other way round. A row without any
    known depth is 0. Tolerances as in :func:`models.geometry.projection.reproject`; they are wide because a thinned
    map has few samples on slanted surfaces.
    """
    count = len(small.views)
    overlap = np.zeros((count if rows is None else rows, count))
    for i in range(len(overlap)):
        depth, K, pose = (x[i].expand_as(x) for x in (small.depth, small.K, small.pose))
        result = projection.reproject(
            depth, K, pose, small.depth, small.K, small.pose, relative=relative, absolute=absolute
        )
        known = int((small.depth[i] > 0).sum())
        overlap[i] = result.visible.sum(dim=(1, 2)).numpy() / max(known, 1)
    return overlap


def view_overlap(scene: Scene, *, side: int = 48) -> np.ndarray:
    """Overlap (V, V) of all views of a scene, NaN where a view has no depth or no pose; 1 on the diagonal."""
    small = load_small_depth(scene, side=side)
    overlap = np.full((len(scene.views), len(scene.views)), np.nan)
    index = np.array(small.views, dtype=int)
    overlap[np.ix_(index, index)] = pairwise_overlap(small)
    return overlap
