"""Pictures that occur twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.contracts import ImageRef
from services.data.checks.findings import Fault, Finding

SAME_GREY = 4.0
"""Thumbnails of near-duplicates differ by at most this many grey levels on average."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One picture of the source. ``view`` is None for an item's only picture."""

    scene: str
    view: int | None
    image: ImageRef
    digest: str
    thumbnail: np.ndarray | None


def difference_hash(thumbnail: np.ndarray) -> int:
    """64 bits: whether each cell of an 8 x 9 grid is darker than its right neighbour."""
    import cv2

    grid = cv2.resize(thumbnail, (9, 8), interpolation=cv2.INTER_AREA).astype(int)
    bits = (grid[:, :-1] < grid[:, 1:]).reshape(-1)
    return int("".join("1" if bit else "0" for bit in bits), 2)


def identical(pictures: Sequence[Picture]) -> list[Finding]:
    """Every picture whose content is that of an earlier one, anywhere in the source."""
    first: dict[str, Picture] = {}
    findings = []
    for picture in pictures:
        before = first.setdefault(picture.digest, picture)
        if before is not picture:
            findings.append(_repeat(Fault.DUPLICATE, picture, before, "has the same content as"))
    return findings


def nearly_identical(pictures: Sequence[Picture], bits: int) -> list[Finding]:
    """Pictures that look like an earlier one of the same scene, or have its very hash in another scene.

    A hash alone would take every two bare walls for the same: the thumbnails must agree as well.
    """
    known = [picture for picture in pictures if picture.thumbnail is not None]
    hashes = {id(picture): difference_hash(picture.thumbnail) for picture in known if picture.thumbnail is not None}
    by_scene: dict[str, list[Picture]] = defaultdict(list)
    by_hash: dict[int, list[Picture]] = defaultdict(list)
    findings = []
    for picture in known:
        mine = hashes[id(picture)]
        same_scene = (p for p in by_scene[picture.scene] if (hashes[id(p)] ^ mine).bit_count() <= bits)
        other_scenes = (p for p in by_hash[mine] if p.scene != picture.scene)
        for before in (*same_scene, *other_scenes):
            if before.digest != picture.digest and _alike(before, picture):
                findings.append(_repeat(Fault.NEAR_DUPLICATE, picture, before, "looks the same as"))
                break
        by_scene[picture.scene].append(picture)
        by_hash[mine].append(picture)
    return findings


def _alike(a: Picture, b: Picture) -> bool:
    assert a.thumbnail is not None
    assert b.thumbnail is not None
    return float(np.abs(a.thumbnail.astype(int) - b.thumbnail.astype(int)).mean()) <= SAME_GREY


def _repeat(fault: Fault, picture: Picture, before: Picture, how: str) -> Finding:
    where = before.scene if before.view is None else f"{before.scene}#view{before.view}"
    return Finding(
        fault=fault,
        scene=picture.scene,
        view=picture.view,
        reason=f"{picture.image.path} {how} {before.image.path} of {where}",
        pictures=(picture.image, before.image),
    )
