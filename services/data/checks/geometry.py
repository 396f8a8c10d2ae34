"""Faults that show only when views are compared: a wrong depth scale, a view that sees nothing any other sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from configs.schema import ChecksConfig
from models.geometry import projection
from services.contracts import Scene
from services.data.checks.findings import Fault, Finding
from services.data.overlap import SmallDepth, pairwise_overlap, stack_depth, thin_depth

SCALES = (0.001, 0.01, 0.1, 10.0, 100.0, 1000.0)
RELATIVE = 0.04
"""Depths that differ by less agree. Relative only: the scale is what is in question."""
AGREES, DISAGREES = 0.6, 0.35
"""A scale is wrong if less than the second share of the pixels agrees as stored, and more than the first rescaled."""
NEIGHBOURS = 4
"""Views before and behind a view that its depth is compared with."""
PAIRS_AT_ONCE = 128
"""Pairs of views that one call reprojects: bounds the memory."""
MANY_VIEWS = 200
"""Above this, overlap is computed with the neighbours and evenly spaced other views instead of with all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GeometryCheck:
    """What comparing the views of a scene gave."""

    findings: tuple[Finding, ...]
    best_overlap: dict[int, float]
    """View -> its largest overlap with any other view."""


def check_geometry(scene: Scene, depths: dict[int, np.ndarray], config: ChecksConfig) -> GeometryCheck:
    """Check the depth scale and the overlap of views whose depth (H, W) in metres and pose are sound."""
    findings: list[Finding] = []
    plausible = {}
    for index, depth in depths.items():
        problem = implausible(depth, config)
        if problem is None:
            plausible[index] = depth
        else:
            findings.append(_finding(scene, index, Fault.DEPTH_SCALE, f"{problem}"))
    small = small_depth(scene, plausible)
    wrong = wrong_scales(small)
    if None in wrong:
        findings.append(Finding(
            fault=Fault.DEPTH_SCALE, scene=scene.id, reason=wrong[None],
            pictures=tuple(scene.views[i].image for i in small.views[:2]), depth=scene.views[small.views[0]].depth,
        ))  # fmt: skip
        return GeometryCheck(findings=tuple(findings), best_overlap={})
    findings += [_finding(scene, view, Fault.DEPTH_SCALE, why) for view, why in wrong.items() if view is not None]
    small = small_depth(scene, {i: depth for i, depth in plausible.items() if i not in wrong})
    best = best_overlap(small)
    for view, overlap in best.items():
        if overlap < config.min_overlap:
            findings.append(
                _finding(
                    scene,
                    view,
                    Fault.NO_OVERLAP,
                    f"shares {100 * overlap:.1f} % of its pixels with the view that it shares most with; at least "
                    f"{100 * config.min_overlap:g} % are expected (data.checks.min_overlap)",
                )
            )
    return GeometryCheck(findings=tuple(findings), best_overlap=best)


def implausible(depth: np.ndarray, config: ChecksConfig) -> str | None:
    """Why a depth map cannot be in metres; None when it may be, or knows nothing at all."""
    known = depth[depth > 0]
    if known.size == 0:
        return None
    median = float(np.median(known))
    if config.min_depth <= median <= config.max_depth:
        return None
    return (
        f"the median depth is {median:.4g} m; {config.min_depth:g} to {config.max_depth:g} m are plausible "
        "(data.checks.min_depth, max_depth); is the unit right?"
    )


def small_depth(scene: Scene, depths: dict[int, np.ndarray], side: int = 48) -> SmallDepth:
    """Thinned depth maps of the given views."""
    views, maps, cameras, poses = [], [], [], []
    for index, depth in sorted(depths.items()):
        view = scene.views[index]
        assert view.depth is not None
        assert view.pose is not None
        thin, K = thin_depth(depth, view.depth.K.matrix(), side)
        views.append(index)
        maps.append(thin)
        cameras.append(K)
        poses.append(np.asarray(view.pose))
    return stack_depth(views, maps, cameras, poses)


def agreements(small: SmallDepth, pairs: list[tuple[int, int]], scale_a: float, scale_b: float) -> np.ndarray:
    """For each pair (a, b): share of a's pixels within b at which both depths, scaled, agree.

    NaN where fewer than a tenth of a's pixels fall into b: too few to say anything.
    """
    shares = []
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        a, b = (torch.tensor(column) for column in zip(*pairs[start : start + PAIRS_AT_ONCE], strict=True))
        depth_a, depth_b = small.depth[a] * scale_a, small.depth[b] * scale_b
        result = projection.reproject(
            depth_a, small.K[a], small.pose[a], depth_b, small.K[b], small.pose[b], relative=RELATIVE, absolute=0.0
        )
        compared = result.inside & torch.isfinite(result.residual)
        count = compared.sum(dim=(1, 2))
        enough = count >= (0.1 * (depth_a > 0).sum(dim=(1, 2))).clamp_min(1)
        share = (result.visible & compared).sum(dim=(1, 2)) / count.clamp_min(1)
        shares.append(torch.where(enough, share, torch.nan).numpy())
    return np.concatenate(shares)


def wrong_scales(small: SmallDepth) -> dict[int | None, str]:
    """Views whose depth would agree with their neighbours if it were scaled by a power of ten; None is the scene.

    A camera that only turns sees the same at every scale: then all scales agree and nothing is found.
    """
    count = len(small.views)
    pairs = [
        (i, j) for i in range(count) for j in range(max(0, i - NEIGHBOURS), min(count, i + NEIGHBOURS + 1)) if i != j
    ]
    if not pairs:
        return {}
    stored = agreements(small, pairs, 1.0, 1.0)
    if _mean(stored) < DISAGREES:
        sample = pairs[:: max(1, len(pairs) // 32)]
        together = {s: _mean(agreements(small, sample, s, s)) for s in SCALES}
        best = max(together, key=lambda s: together[s])
        if together[best] > AGREES:
            return {None: _explain("different views", _mean(stored), together[best], best)}
    wrong: dict[int | None, str] = {}
    for i, view in enumerate(small.views):
        near = [k for k, pair in enumerate(pairs) if pair[0] == i]
        as_stored = _largest(stored[near])
        if as_stored >= DISAGREES:
            continue
        scaled = {s: _largest(agreements(small, [pairs[k] for k in near], s, 1.0)) for s in SCALES}
        best = max(scaled, key=lambda s: scaled[s])
        if scaled[best] > AGREES:
            wrong[view] = _explain("this view and others", as_stored, scaled[best], best)
    return wrong


def _explain(whose: str, as_stored: float, rescaled: float, scale: float) -> str:
    return (
        f"the depths of {whose} agree at {100 * as_stored:.0f} % of the pixels as they are, at "
        f"{100 * rescaled:.0f} % multiplied by {scale:g}; is the unit right?"
    )


def best_overlap(small: SmallDepth) -> dict[int, float]:
    """Largest overlap of each view with any other one; nothing for fewer than two views."""
    count = len(small.views)
    if count < 2:
        return {}
    if count <= MANY_VIEWS:
        overlap = pairwise_overlap(small)
        np.fill_diagonal(overlap, 0.0)
        return {view: float(overlap[i].max()) for i, view in enumerate(small.views)}
    best = {}
    spread = np.unique(np.linspace(0, count - 1, 48).astype(int))
    for i, view in enumerate(small.views):
        near = np.arange(max(0, i - NEIGHBOURS), min(count, i + NEIGHBOURS + 1))
        others = np.setdiff1d(np.union1d(near, spread), [i])
        chosen = np.concatenate([[i], others])
        part = SmallDepth(
            views=tuple(int(c) for c in chosen), depth=small.depth[chosen], K=small.K[chosen], pose=small.pose[chosen]
        )
        best[view] = float(pairwise_overlap(part, rows=1)[0, 1:].max())
    return best


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else 0.0


def _largest(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if known.size else 0.0


def _finding(scene: Scene, view: int, fault: Fault, reason: str) -> Finding:
    shown = scene.views[view]
    return Finding(fault=fault, scene=scene.id, view=view, reason=reason, pictures=(shown.image,), depth=shown.depth)
