"""The pairs of one scene: which views see enough of each other's surfaces, and how far apart they are.

Two stages, because reprojecting every view into every other is quadratic in the views and thousands are usual:

1. A few known points of each view (about 8 along the longer side) are put into every camera, without asking what
   stands before them. The share that lies in a camera's frustum can only be larger than the overlap, so a pair whose
   share is below ``min_overlap`` less :data:`MARGIN` (for the coarseness of the points) in either direction is
   *pruned*. This is one matrix product for a block of cameras.
2. The others are reprojected with an occlusion test at ``data.pairs.side`` pixels, in blocks. With
   ``data.pairs.per_scene`` and far more of them than that, only :data:`TRIED` times as many are, evenly spread over
   the coarse share.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from configs.schema import PairsConfig
from models.geometry import poses, projection
from services.contracts import Scene, View
from services.data.images import describe, load_depth
from services.data.overlap import SmallDepth, stack_depth, thin_depth
from services.errors import DataError

MARGIN = 0.15
"""One column of coarse points is an eighth of a view: that much a share of them may be too small, and a little."""
TRIED = 16
"""Pairs that are reprojected for each one that ``data.pairs.per_scene`` keeps."""
_COARSE = 8
"""Coarse points along the longer side of a view."""
_BLOCK = 2**20
"""Points that are reprojected at a time."""
_BINS = 10
"""Bins of overlap among which ``data.pairs.per_scene`` is spread."""
_RIGID = 1e-2
"""Largest :func:`models.geometry.poses.rigidity_error` of a pose that is used."""


@dataclass(frozen=True, kw_only=True)
class SceneFacts:
    """What was found of the views of a scene, beside its pairs."""

    id: str
    split: str | None = None
    views: int = 0
    without_depth: int = 0
    without_pose: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    """Number of a view -> why it cannot be used: a file that cannot be read, a pose that is none, empty depth."""
    measured: int = 0
    """Pairs that were reprojected; the others were pruned."""
    pairs: int = 0

    @property
    def usable(self) -> int:
        """Views with readable depth and a pose."""
        return self.views - self.without_depth - self.without_pose - len(self.broken)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScenePairs:
    """The pairs of a scene, ordered by view, i < j."""

    facts: SceneFacts
    views: np.ndarray
    """(P, 2) int32."""
    overlap: np.ndarray
    """(P, 2) float32: share of i's known pixels that j sees, and of j's that i sees."""
    angle: np.ndarray
    """(P,) float32: degrees by which one camera is turned against the other."""
    distance: np.ndarray
    """(P,) float32: metres between the two cameras."""


def scene_pairs(scene: Scene, config: PairsConfig) -> ScenePairs:
    """All pairs of ``scene`` under ``config``. A view that cannot be read is left out and named in the facts."""
    facts, small, matrices = _load(scene, config.side)
    first, second = _candidates(small, config)
    tried = len(first)
    there = measure_overlap(small, first, second)
    fits = (there >= config.min_overlap) & (there <= config.max_overlap)
    first, second, there = first[fits], second[fits], there[fits]
    back = measure_overlap(small, second, first)
    fits = (back >= config.min_overlap) & (back <= config.max_overlap)
    first, second, overlap = first[fits], second[fits], np.stack([there[fits], back[fits]], axis=1)
    kept = spread(
        overlap.mean(axis=1), config, int.from_bytes(hashlib.sha256(scene.id.encode()).digest()[:8], "little")
    )
    first, second, overlap = first[kept], second[kept], overlap[kept]
    numbers = np.array(small.views, dtype=np.int32)
    angle, distance = relative_geometry(matrices[first], matrices[second])
    return ScenePairs(
        facts=SceneFacts(**{**facts, "measured": tried, "pairs": len(first)}),
        views=np.stack([numbers[first], numbers[second]], axis=1).reshape(-1, 2),
        overlap=overlap.astype(np.float32).reshape(-1, 2),
        angle=angle,
        distance=distance,
    )


def relative_geometry(pose_a: np.ndarray, pose_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Degrees of the rotation between cameras (P, 4, 4), and metres between their centres; both (P,) float32."""
    a, b = (torch.from_numpy(np.asarray(pose, np.float64).reshape(-1, 4, 4)) for pose in (pose_a, pose_b))
    turned = torch.rad2deg(poses.rotation_angle(a[:, :3, :3].mT @ b[:, :3, :3]))
    moved = torch.linalg.vector_norm(a[:, :3, 3] - b[:, :3, 3], dim=-1)
    return turned.float().numpy(), moved.float().numpy()


def measure_overlap(
    small: SmallDepth, first: np.ndarray, second: np.ndarray, *, relative: float = 0.05, absolute: float = 0.05
) -> np.ndarray:
    """Share (P,) of the known pixels of views ``first`` (P,) that views ``second`` (P,) see too, unoccluded.

    The indices count the views of ``small``. Tolerances as in :func:`services.data.overlap.pairwise_overlap`, of
    which this is some entries.
    """
    shares = np.zeros(len(first))
    if not len(first):
        return shares
    known = (small.depth > 0).sum(dim=(1, 2)).clamp_min(1)
    size = max(1, _BLOCK // small.depth[0].numel())
    for start in range(0, len(first), size):
        i, j = (torch.from_numpy(np.ascontiguousarray(x[start : start + size])) for x in (first, second))
        result = projection.reproject(
            small.depth[i], small.K[i], small.pose[i], small.depth[j], small.K[j], small.pose[j],
            relative=relative, absolute=absolute,
        )  # fmt: skip
        shares[start : start + size] = (result.visible.sum(dim=(1, 2)) / known[i]).numpy()
    return shares


def frustum_share(small: SmallDepth) -> np.ndarray:
    """(N, N) float16: share of a few known points of view i that lie within the picture of camera j, seen or not."""
    count, height, width = small.depth.shape
    shares = np.zeros((count, count), np.float16)
    if not count:
        return shares
    step = max(1, math.ceil(max(height, width) / _COARSE))
    points = projection.transform(projection.unproject(small.depth, small.K), small.pose)
    points = points[:, step // 2 :: step, step // 2 :: step].reshape(count, -1, 3)
    known = (small.depth[:, step // 2 :: step, step // 2 :: step] > 0).reshape(count, -1)
    whole = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1).reshape(-1, 4)
    cameras = small.K @ poses.inverse(small.pose)[:, :3]
    size = max(1, 2 * _BLOCK // len(whole))
    for start in range(0, count, size):
        block = cameras[start : start + size]
        x, y, z = (whole @ block.reshape(-1, 4).T).reshape(count, known.shape[1], -1, 3).unbind(-1)
        inside = known[..., None] & (z > 0) & (x >= -0.5 * z) & (x < (width - 0.5) * z)
        inside &= (y >= -0.5 * z) & (y < (height - 0.5) * z)
        total = known.sum(dim=1).clamp_min(1)[:, None]
        shares[:, start : start + size] = (inside.sum(dim=1) / total).half().numpy()
    return shares


def spread(overlap: np.ndarray, config: PairsConfig, key: int) -> np.ndarray:
    """Indices, ascending, of at most ``config.per_scene`` (0: all) of the values (P,), spread evenly over their range.

    Equal bins of [min_overlap, max_overlap] give one pair after the other in turn, each its pairs in an order that
    ``key`` decides, until there are enough.
    """
    if not config.per_scene or len(overlap) <= config.per_scene:
        return np.arange(len(overlap))
    width = max(config.max_overlap - config.min_overlap, 1e-6) / _BINS
    bins = np.clip((overlap - config.min_overlap) / width, 0, _BINS - 1).astype(int)
    order = np.random.default_rng(key).permutation(len(overlap))
    turn = np.zeros(len(overlap), int)
    for number in range(_BINS):
        mine = order[bins[order] == number]
        turn[mine] = np.arange(len(mine))
    return np.sort(np.lexsort((order.argsort(), turn))[: config.per_scene])


def _candidates(small: SmallDepth, config: PairsConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j of views of ``small`` that are worth measuring; see the module."""
    shares = frustum_share(small)
    least = np.float16(max(config.min_overlap - MARGIN, 1e-3))
    enough = shares >= least
    possible = np.triu(enough & enough.T, k=1)
    first, second = np.nonzero(possible)
    most = TRIED * config.per_scene
    if config.per_scene and len(first) > most:
        coarse = np.minimum(shares[first, second], shares[second, first])
        chosen = np.argsort(coarse, kind="stable")[np.linspace(0, len(first) - 1, most).round().astype(int)]
        chosen.sort()
        first, second = first[chosen], second[chosen]
    return first, second


def _load(scene: Scene, side: int) -> tuple[dict[str, Any], SmallDepth, np.ndarray]:
    """Facts, thinned depth of the usable views, and their poses (N, 4, 4) float64."""
    views: list[int] = []
    maps: list[np.ndarray] = []
    cameras: list[np.ndarray] = []
    matrices: list[np.ndarray] = []
    missing = {"without_depth": 0, "without_pose": 0}
    broken: dict[str, str] = {}
    for number, view in enumerate(scene.views):
        if view.depth is None or view.pose is None:
            missing["without_depth" if view.depth is None else "without_pose"] += 1
            continue
        try:
            depth, K, pose = _usable(view, side)
        except DataError as error:
            broken[str(number)] = str(error)
            continue
        views.append(number)
        maps.append(depth)
        cameras.append(K)
        matrices.append(pose)
    stacked = np.array(matrices, dtype=np.float64).reshape(-1, 4, 4)
    centred = stacked.copy()
    if len(stacked):
        # Only relative poses count, and float32 has no digits to spare for a world origin that lies far away.
        centred[:, :3, 3] -= stacked[:, :3, 3].mean(axis=0)
    facts = {"id": scene.id, "views": len(scene.views), **missing, "broken": broken}
    return facts, stack_depth(views, maps, cameras, list(centred)), stacked


def _usable(view: View, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thinned depth, its camera and the pose of a view. DataError names the file and says why it is of no use."""
    assert view.depth is not None
    pose = np.asarray(view.pose, dtype=np.float64)
    error = float(poses.rigidity_error(torch.from_numpy(pose))) if np.isfinite(pose).all() else math.inf
    if not error <= _RIGID:
        raise DataError(
            f"{describe(view.image)}: its pose is no rotation and translation (off by {error:.3g}, {_RIGID} is "
            "allowed); correct the pose file"
        )
    depth, K = thin_depth(load_depth(view.depth), view.depth.K.matrix(), side)
    if not (depth > 0).any():
        raise DataError(f"{view.depth.path}: no pixel of the depth map is known")
    return depth, K, pose
