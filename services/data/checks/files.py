"""Faults of single views that their files and numbers show: missing, unreadable, wrong size, impossible pose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.geometry.poses import rigidity_error
from services.contracts import ImageRef, Scene, View
from services.data.checks.findings import Fault, Finding
from services.data.images import image_size, load_depth, load_ids, load_image
from services.errors import DataError

MAX_RIGIDITY_ERROR = 1e-2
"""Entries of R R^T - I may differ from 0 by this much: poses in text files have few digits."""
THUMBNAIL = 16
"""Side of the grey picture that near-duplicates are compared by."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewCheck:
    """One view after its files were read. What could not be read is None."""

    findings: tuple[Finding, ...]
    thumbnail: np.ndarray | None
    """(THUMBNAIL, THUMBNAIL) uint8 grey."""
    depth: np.ndarray | None
    """(H, W) float32 metres, where depth, camera and pose are sound."""


def check_view(scene: Scene, index: int) -> ViewCheck:
    """Read everything that one view names, and check it on its own."""
    view = scene.views[index]
    findings: list[Finding] = []

    def found(fault: Fault, reason: str) -> None:
        findings.append(
            Finding(fault=fault, scene=scene.id, view=index, reason=reason, pictures=(view.image,), depth=view.depth)
        )

    image = _image(view, found)
    pose_is_sound = _pose(view, found)
    depth = _depth(view, found)
    for path in (view.instance_path, view.label_path):
        if path is not None:
            _mask(path, image, found)
    return ViewCheck(
        findings=tuple(findings),
        thumbnail=None if image is None else thumbnail(image),
        depth=depth if pose_is_sound else None,
    )


_Found = Callable[[Fault, str], None]


def _image(view: View, found: _Found) -> np.ndarray | None:
    if not Path(view.image.path).exists():
        found(Fault.MISSING, f"{view.image.path}: there is no such file")
        return None
    try:
        image = load_image(view.image)
    except DataError as error:
        found(Fault.UNREADABLE, str(error))
        return None
    if view.K is not None and image.shape[:2] != (view.K.height, view.K.width):
        found(
            Fault.SIZE,
            f"{view.image.path}: the image is {image.shape[1]}x{image.shape[0]}, its intrinsics are for "
            f"{view.K.width}x{view.K.height}",
        )
    elif view.K is not None:
        for problem in _impossible(view):
            found(Fault.SIZE, f"{view.image.path}: {problem}")
    return image


def _impossible(view: View) -> Iterator[str]:
    """What is wrong with intrinsics of the right size."""
    K = view.K
    assert K is not None
    if not (np.isfinite([K.fx, K.fy, K.cx, K.cy]).all() and K.fx > 0 and K.fy > 0):
        yield f"focal lengths {K.fx:g}, {K.fy:g} and principal point {K.cx:g}, {K.cy:g} are no camera"
    elif not (-0.5 <= K.cx <= K.width - 0.5 and -0.5 <= K.cy <= K.height - 0.5):
        yield (
            f"the principal point {K.cx:.1f}, {K.cy:.1f} lies outside of the {K.width}x{K.height} pixels; are the "
            "intrinsics those of another size?"
        )


def _depth(view: View, found: _Found) -> np.ndarray | None:
    ref = view.depth
    if ref is None:
        return None
    if not Path(ref.path).exists():
        found(Fault.MISSING, f"{ref.path}: there is no such file")
        return None
    if not ref.path.endswith(".npy"):
        try:
            width, height = image_size(ImageRef(path=ref.path))
        except DataError as error:
            found(Fault.UNREADABLE, str(error))
            return None
        if (width, height) != (ref.K.width, ref.K.height):
            found(
                Fault.SIZE,
                f"{ref.path}: the depth map is {width}x{height}, its intrinsics are for {ref.K.width}x{ref.K.height}",
            )
            return None
    try:
        return load_depth(ref)
    except DataError as error:
        found(Fault.UNREADABLE, str(error))
        return None


def _mask(path: str, image: np.ndarray | None, found: _Found) -> None:
    if not Path(path).exists():
        found(Fault.MISSING, f"{path}: there is no such file")
        return
    try:
        ids = load_ids(path)
    except DataError as error:
        found(Fault.UNREADABLE, str(error))
        return
    # A mask may be smaller than its image, but shows the same field of view: the same proportions, to a pixel.
    if image is not None and abs(ids.shape[1] * image.shape[0] / image.shape[1] - ids.shape[0]) > 1.0:
        found(
            Fault.SIZE,
            f"{path}: the mask is {ids.shape[1]}x{ids.shape[0]}, which is no resized {image.shape[1]}x{image.shape[0]}",
        )


def _pose(view: View, found: _Found) -> bool:
    """Whether the view has a pose that is one."""
    if view.pose is None:
        return False
    pose = np.asarray(view.pose, dtype=np.float64)
    if pose.shape != (4, 4):
        found(Fault.POSE, f"{view.image.path}: the pose has the shape {pose.shape}, not (4, 4)")
        return False
    if not np.isfinite(pose).all():
        found(Fault.POSE, f"{view.image.path}: the pose has entries that are not finite (tracking was lost?)")
        return False
    error = float(rigidity_error(torch.from_numpy(pose)))
    if error > MAX_RIGIDITY_ERROR:
        found(
            Fault.POSE,
            f"{view.image.path}: the pose is not rigid: it differs from a rotation by {error:.3g} "
            f"(determinant {np.linalg.det(pose[:3, :3]):.3g}, allowed {MAX_RIGIDITY_ERROR:g}); scaled or mirrored?",
        )
        return False
    return True


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Grey (THUMBNAIL, THUMBNAIL) uint8 by averaging."""
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA))
