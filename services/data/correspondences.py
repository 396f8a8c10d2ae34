"""Pixel correspondences of two posed depth maps, and the sample of them that a matching loss is trained on.

The rule is MASt3R's (Leroy et al. 2024, arXiv 2406.09756): a pixel of view 1 corresponds to the pixel of view 2 that
its point is nearest to, if that pixel's point is in turn nearest to it. Nothing else tests for occlusion: what
stands before a point carries another point back. :func:`sample_matches` offers a further test on depth (ours).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

_NEAREST_Z = 1e-6
"""Metres: points that are not in front of a camera have no pixel in it."""


class Reciprocal(NamedTuple):
    """All correspondences of two views, as flat pixel indices, ordered by the first."""

    first: np.ndarray
    """(P,) int64 into view 1."""
    second: np.ndarray
    """(P,) int64 into view 2."""


def reciprocal_pixels(
    depth: np.ndarray, K: np.ndarray, pose: np.ndarray, *, depth_tolerance: float | None = None
) -> Reciprocal:
    """Pixels of two views that map to each other exactly.

    Args:
        depth: (2, H, W) metres along z, 0 (or anything that is not a positive number) unknown.
        K: (2, 3, 3), pixel centres at integers.
        pose: (2, 4, 4) camera-to-world.
        depth_tolerance: ours; a correspondence holds only where the depth of view 1's point in camera 2 differs from
            view 2's own depth by at most this share of it. It drops the few pixels beside an edge that round to each
            other across a gap. None, as published, does not ask.

    A point is projected, rounded to the nearest pixel and clipped to the picture; points that are not in front of
    the other camera, and pixels of unknown depth, correspond to nothing.
    """
    height, width = depth.shape[1:]
    there, z = _carried(depth[0], K[0], pose[0], K[1], pose[1], height, width)
    back, _ = _carried(depth[1], K[1], pose[1], K[0], pose[0], height, width)
    # Where there is no target (-1) the last pixel is looked up, and the comparison with -1 fails below.
    cycle = (there >= 0) & (back[there] == np.arange(height * width))
    if depth_tolerance is not None:
        seen = np.asarray(depth[1], np.float64).reshape(-1)[there]
        with np.errstate(invalid="ignore"):
            cycle &= np.abs(z - seen) <= depth_tolerance * seen
    first = np.flatnonzero(cycle)
    return Reciprocal(first=first, second=there[first])


def sample_matches(
    depth: np.ndarray,
    K: np.ndarray,
    pose: np.ndarray,
    *,
    matches: int,
    share: float,
    generator: torch.Generator,
    depth_tolerance: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """``matches`` pairs of pixels of two views, true ones first, then false ones.

    Args:
        depth: (2, H, W) metres, 0 unknown.
        K: (2, 3, 3).
        pose: (2, 4, 4) camera-to-world.
        matches: M, pairs in all.
        share: at most this share of them are true.
        generator: of the draws; a CPU generator.
        depth_tolerance: see :func:`reciprocal_pixels`.

    Returns:
        indices (2, M) int32, flat pixel indices into view 1 and view 2, and valid (M,) bool, which is true for
        correspondences.

    True ones are a random subset without replacement. False ones are pixels of each view that correspond to nothing,
    drawn without replacement from each view independently of the other. Where these are short there are more true
    ones than ``share`` allows; where both are short (M > H*W) the rest is index 0, invalid. Two views that share
    nothing have no valid pair.
    """
    pixels = depth.shape[1] * depth.shape[2]
    true = reciprocal_pixels(depth, K, pose, depth_tolerance=depth_tolerance)
    others = pixels - len(true.first)
    wanted = min(len(true.first), int(matches * share))
    false = min(others, matches - wanted)
    count = min(len(true.first), matches - false)
    indices = np.zeros((2, matches), np.int32)
    chosen = _some(len(true.first), count, generator)
    indices[:, :count] = true.first[chosen], true.second[chosen]
    for view, used in enumerate(true):
        free = np.ones(pixels, bool)
        free[used] = False
        indices[view, count : count + false] = np.flatnonzero(free)[_some(others, false, generator)]
    valid = np.zeros(matches, bool)
    valid[:count] = True
    return indices, valid


def _carried(
    depth: np.ndarray,
    K: np.ndarray,
    pose: np.ndarray,
    K_other: np.ndarray,
    pose_other: np.ndarray,
    height: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    """For every pixel (H*W,): the flat index of the pixel of the other view that its point falls on, -1 for none, and
    the point's depth there.
    """
    z = np.asarray(depth, np.float64).reshape(-1)
    known = np.isfinite(z) & (z > 0)
    pose, pose_other = np.asarray(pose, np.float64), np.asarray(pose_other, np.float64)
    # Pixel -> ray -> other camera -> its homogeneous pixel is one 3x3 matrix, and the translation a constant.
    turn = pose_other[:3, :3].T @ pose[:3, :3]
    shift = np.asarray(K_other, np.float64) @ (pose_other[:3, :3].T @ (pose[:3, 3] - pose_other[:3, 3]))
    matrix = np.asarray(K_other, np.float64) @ turn @ np.linalg.inv(np.asarray(K, np.float64))
    columns, rows = np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)[:, None]
    z = np.where(known, z, 0.0)
    x, y, w = ((m[0] * columns + (m[1] * rows + m[2])).reshape(-1) * z + t for m, t in zip(matrix, shift, strict=True))
    front = known & (w > _NEAREST_Z)
    safe = np.where(front, w, 1.0)
    u = np.clip(np.rint(x / safe), 0, width - 1)
    v = np.clip(np.rint(y / safe), 0, height - 1)
    return np.where(front, v * width + u, -1).astype(np.int64), w


def _some(population: int, count: int, generator: torch.Generator) -> np.ndarray:
    """``count`` different numbers of range(population), in random order."""
    return torch.randperm(population, generator=generator)[:count].numpy()
