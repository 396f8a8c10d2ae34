"""Pictures that occur twice, and scenes that an evaluation set holds too."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from services.contracts import ImageRef
from services.data.checks.findings import Fault, Finding, read_ids

SAME_GREY = 4.0
"""Thumbnails of near-duplicates differ by at most this many grey levels on average."""
_SCANNET = re.compile(r"(scene\d{4})_\d{2}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


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


def normalised(scene_id: str) -> str:
    """A scene id as sets are compared: last part of a path, without a media suffix, in lower case."""
    name = PurePosixPath(scene_id.strip().replace("\\", "/")).name.casefold()
    return re.sub(r"\.(mp4|mov|avi|mkv|webm|zip|tar|ply|json|txt)$", "", name)


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Scenes that must not be trained on: normalised ids, and content digests of pictures."""

    name: str
    ids: frozenset[str]
    digests: frozenset[str]

    @classmethod
    def read(cls, name: str, path: Path) -> EvaluationSet:
        """From a text file with one scene id, or one sha256 of a picture, a line. DataError when it cannot be read."""
        lines = [line.casefold() for line in read_ids(path)]
        digests = frozenset(line for line in lines if _DIGEST.fullmatch(line))
        return cls(name=name, ids=frozenset(normalised(line) for line in lines if line not in digests), digests=digests)

    def why(self, scene_id: str, digests: Iterable[str]) -> str | None:
        """Why a scene is held to be in the set; None if it is not."""
        mine = normalised(scene_id)
        if mine in self.ids:
            return f"the scene {mine} is in the evaluation set {self.name}"
        match = _SCANNET.fullmatch(mine)
        if match:
            scans = sorted(other for other in self.ids if other.startswith(match[1] + "_"))
            if scans:
                return f"{mine} is another scan of the room of {scans[0]}, which is in the evaluation set {self.name}"
        shared = self.digests.intersection(digests)
        if shared:
            return f"{len(shared)} of its pictures are in the evaluation set {self.name}"
        return None


def leaks(scenes: Mapping[str, Sequence[str]], sets: Sequence[EvaluationSet]) -> list[Finding]:
    """A finding for each scene (id -> content digests) that an evaluation set holds."""
    findings = []
    for scene_id, digests in scenes.items():
        for evaluation in sets:
            reason = evaluation.why(scene_id, digests)
            if reason is not None:
                findings.append(Finding(fault=Fault.EVALUATION, scene=scene_id, reason=reason))
                break
    return findings
