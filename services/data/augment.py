"""Random changes of the pictures that a trained network reads: colour jitter, crops of a pair, the same view twice.

A crop is not a window of the picture but what a camera at the same place would see that is turned towards the
window's middle: the picture is rendered again through a homography, so that the principal point is in the middle of
the crop (a network that predicts points without being told K can then assume it), and depth, K and pose follow.

Of a pair several crops are drawn for each view, and the two that share most correspondences are kept (MASt3R's rule).
Correspondences are found once, on a thinned grid of view 1's pixels, not again for every crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch

from configs.schema import AugmentConfig
from models.encoders.preprocess import crop_box
from models.geometry import projection
from services.contracts import Intrinsics
from services.errors import DataError
from services.streams.cut import cut_camera, cut_picture

_GRID = 64
"""Correspondences are counted on this many points along the longer side of view 1."""
_NARROWER = 1.05
"""A crop whose corners leave the picture is narrowed by this factor until they do not."""
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Luma of ITU-R BT.601."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairViews:
    """Two views as a network reads them."""

    images: np.ndarray
    """(2, H, W, 3) uint8."""
    depths: np.ndarray
    """(2, H, W) float32 metres along z of the new cameras, 0 unknown."""
    K: np.ndarray
    """(2, 3, 3) float32 of the new pictures, pixel centres at integers."""
    poses: np.ndarray
    """(2, 4, 4) float32 camera-to-world; the centres of the cameras are the old ones."""


class _Camera(NamedTuple):
    """A crop of a view: a camera at the same place."""

    K: np.ndarray
    """(3, 3) of the crop."""
    turn: np.ndarray
    """(3, 3): directions of the crop's camera -> directions of the view's."""


class Augment:
    """What ``data.augment`` asks for. Holds no state: everything random comes from the generator that is given.

    All inputs are at the resolution of the files; all outputs at ``size`` = (height, width).
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    @property
    def active(self) -> bool:
        """Whether anything would change. If not, features of the plain picture can be cached and used instead."""
        return any(self.config.jitter) or self.config.crops > 0 or self.config.same_image > 0

    def pair(
        self,
        images: Sequence[np.ndarray],
        depths: Sequence[np.ndarray],
        K: Sequence[Intrinsics],
        poses: np.ndarray,
        generator: torch.Generator,
        size: tuple[int, int],
        *,
        depth_K: Sequence[Intrinsics] | None = None,
    ) -> PairViews:
        """Two views of a scene, cropped and coloured at random.

        Args:
            images: two uint8 (h, w, 3), each of the size that its ``K`` says.
            depths: two float32 (h', w') in metres, 0 unknown.
            K: cameras of the images.
            poses: (2, 4, 4) camera-to-world.
            generator: CPU generator; keyed by the sample and the step, it makes the result repeatable.
            size: (height, width) of the result.
            depth_K: cameras of the depth maps, where those have another size than the images; None: ``K``, resized.

        Order of the draws: same image, crops of view 1, crops of view 2, jitter of view 1, jitter of view 2.
        DataError when a picture or a depth map has another size than its camera.
        """
        depth_K = list(depth_K) if depth_K is not None else [_fitted(k, d) for k, d in zip(K, depths, strict=True)]
        for k, array, what in ((K[0], images[0], "image"), (K[1], images[1], "image"),
                               (depth_K[0], depths[0], "depth map"), (depth_K[1], depths[1], "depth map")):  # fmt: skip
            _check_size(k, array, what)
        chosen = (0, 0) if _uniform(generator) < self.config.same_image else (0, 1)
        K, depth_K = [K[i] for i in chosen], [depth_K[i] for i in chosen]
        sources = np.asarray(poses, np.float64)[list(chosen)]
        cameras = self._cameras([depths[i] for i in chosen], K, depth_K, sources, generator, size)
        turned = sources.copy()
        turned[:, :3, :3] = [pose[:3, :3] @ camera.turn for pose, camera in zip(sources, cameras, strict=True)]
        pictures = [
            _render_image(images[i], k, c, size) if self.config.crops else cut_picture(images[i], *size)
            for i, k, c in zip(chosen, K, cameras, strict=True)
        ]
        maps = [_render_depth(depths[i], k, c, size) for i, k, c in zip(chosen, depth_K, cameras, strict=True)]
        return PairViews(
            images=np.stack([self.jitter(picture, generator) for picture in pictures]),
            depths=np.stack(maps),
            K=np.stack([camera.K for camera in cameras]).astype(np.float32),
            poses=turned.astype(np.float32),
        )

    def image(self, image: np.ndarray, generator: torch.Generator, size: tuple[int, int]) -> np.ndarray:
        """A single picture, uint8 (h, w, 3) -> (H, W, 3): the centre crop that every encoder reads, jittered.

        It keeps the aspect ratio; the published training squashes such pictures to the target size instead.
        """
        return self.jitter(cut_picture(image, *size), generator)

    def jitter(self, image: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Brightness, contrast, saturation and hue of a picture uint8 (H, W, 3) changed, in random order.

        Factors are uniform in [1 - x, 1 + x] (not below 0) of the first three entries of ``data.augment.jitter``;
        the hue turns by at most the fourth, in whole turns. Of a pair each view is jittered by itself.
        """
        if not any(self.config.jitter):
            return image
        brightness, contrast, saturation, hue = self.config.jitter
        pixels = image.astype(np.float32)
        order = torch.randperm(4, generator=generator).tolist()
        draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        for step in order:
            reach = (brightness, contrast, saturation, hue)[step]
            if reach == 0:
                continue
            drawn = reach * (2 * draws[step] - 1)
            if step == 3:
                pixels = _turn_hue(pixels, drawn)
                continue
            factor = max(0.0, 1.0 + drawn)
            if step == 0:
                pixels = pixels * factor
            else:
                grey = pixels @ _GREY
                base = grey.mean() if step == 1 else grey[..., None]
                pixels = base + factor * (pixels - base)
            pixels = np.clip(pixels, 0.0, 255.0)
        return np.rint(pixels).astype(np.uint8)

    def _cameras(
        self,
        depths: Sequence[np.ndarray],
        K: Sequence[Intrinsics],
        depth_K: Sequence[Intrinsics],
        poses: np.ndarray,
        generator: torch.Generator,
        size: tuple[int, int],
    ) -> list[_Camera]:
        """The crop of each of the two views: the plain centre crop, or the best two of those drawn."""
        if not self.config.crops:
            return [_centre_camera(k, size) for k in K]
        drawn = [[self._random_camera(k, size, generator) for _ in range(self.config.crops)] for k in K]
        shared = _shared_points(depths, depth_K, poses)
        inside = [
            np.stack([_sees(camera, points, size) for camera in cameras])
            for cameras, points in zip(drawn, shared, strict=True)
        ]
        counts = inside[0].astype(np.float32) @ inside[1].astype(np.float32).T
        first, second = np.unravel_index(int(counts.argmax()), counts.shape)
        return [drawn[0][first], drawn[1][second]]

    def _random_camera(self, K: Intrinsics, size: tuple[int, int], generator: torch.Generator) -> _Camera:
        """A camera turned to a random window of the picture, of the aspect of ``size`` and log-uniform in size."""
        left, top, right, bottom = crop_box((K.height, K.width), *size)
        share = math.exp(_uniform(generator) * math.log(self.config.min_crop))
        width, height = share * (right - left), share * (bottom - top)
        column = _uniform(generator) * (K.width - width) + width / 2 - 0.5
        row = _uniform(generator) * (K.height - height) + height / 2 - 0.5
        return _turned_camera(K, (column, row), size[1] / width, size)


def _turned_camera(K: Intrinsics, centre: tuple[float, float], zoom: float, size: tuple[int, int]) -> _Camera:
    """A camera that looks at pixel ``centre`` of the picture, ``zoom`` times as fine as it there, of ``size``.

    It is rolled as little as possible. Where its corners would leave the picture it is narrowed until they do not.
    """
    height, width = size
    axis = np.linalg.solve(K.matrix(), np.array([*centre, 1.0]))
    turn = _rotation_to(axis / np.linalg.norm(axis))
    # Along the new axis the old picture has |axis| as many pixels a radian as its focal length says.
    scale = zoom * float(np.linalg.norm(axis))
    corners = np.array([[u, v, 1.0] for u in (-0.5, width - 0.5) for v in (-0.5, height - 0.5)])
    while True:
        made = np.array([[K.fx * scale, 0.0, (width - 1) / 2], [0.0, K.fy * scale, (height - 1) / 2], [0.0, 0.0, 1.0]])
        seen = corners @ (K.matrix() @ turn @ np.linalg.inv(made)).T
        u, v = seen[:, 0] / seen[:, 2], seen[:, 1] / seen[:, 2]
        slack = 1e-6 * max(K.width, K.height)
        inside = (
            (u >= -0.5 - slack) & (u <= K.width - 0.5 + slack) & (v >= -0.5 - slack) & (v <= K.height - 0.5 + slack)
        )
        if (inside & (seen[:, 2] > 0)).all():
            return _Camera(made, turn)
        scale *= _NARROWER


def _rotation_to(axis: np.ndarray) -> np.ndarray:
    """The smallest rotation that takes (0, 0, 1) to the unit vector ``axis``, which is not opposite to it."""
    x, y, z = axis
    cross = np.array([[0.0, 0.0, x], [0.0, 0.0, y], [-x, -y, 0.0]])
    return np.eye(3) + cross + cross @ cross / (1.0 + z)


def _centre_camera(K: Intrinsics, size: tuple[int, int]) -> _Camera:
    """The plain centre crop, not turned: the window that every encoder reads."""
    return _Camera(cut_camera(K, *size).astype(np.float64), np.eye(3))


def _render_image(image: np.ndarray, K: Intrinsics, camera: _Camera, size: tuple[int, int]) -> np.ndarray:
    """The picture (h, w, 3) through another camera at the same place: averaged where it shrinks, else bilinear."""
    height, width = size
    # Averaging first: a warp reads four pixels, however many lie under one of the crop.
    finest = min(1.0, math.sqrt(camera.K[0, 0] * camera.K[1, 1] / (K.fx * K.fy)))
    small = (max(1, round(K.width * finest)), max(1, round(K.height * finest)))
    if small != (K.width, K.height):
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        K = K.resized(*small)
    back = K.matrix() @ camera.turn @ np.linalg.inv(camera.K)
    return cv2.warpPerspective(
        image, back, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )


def _render_depth(depth: np.ndarray, K: Intrinsics, camera: _Camera, size: tuple[int, int]) -> np.ndarray:
    """Depth (h, w) through another camera at the same place, nearest pixel; 0 outside of the map."""
    height, width = size
    v, u = np.mgrid[0:height, 0:width].astype(np.float64)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ (camera.turn @ np.linalg.inv(camera.K)).T
    seen = rays @ K.matrix().T
    column = np.floor(seen[..., 0] / seen[..., 2] + 0.5).astype(np.int64)
    row = np.floor(seen[..., 1] / seen[..., 2] + 0.5).astype(np.int64)
    inside = (column >= 0) & (column < K.width) & (row >= 0) & (row < K.height) & (seen[..., 2] > 0)
    there = depth[np.clip(row, 0, K.height - 1), np.clip(column, 0, K.width - 1)]
    known = inside & np.isfinite(there) & (there > 0)
    # The point is z_old * ray / ray_z in the old camera; along the new axis the ray has length 1.
    return np.where(known, there / np.where(known, rays[..., 2], 1.0), 0.0).astype(np.float32)


def _shared_points(
    depths: Sequence[np.ndarray], K: Sequence[Intrinsics], poses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points (P, 3) that both views see, in the camera of view 1 and in that of view 2."""
    step = max(1, math.ceil(max(depths[0].shape) / _GRID))
    first = torch.from_numpy(np.ascontiguousarray(depths[0][step // 2 :: step, step // 2 :: step], np.float32))
    thin = K[0].matrix()
    thin[0, 2], thin[1, 2] = thin[0, 2] - step // 2, thin[1, 2] - step // 2
    thin[:2] /= step
    second = torch.from_numpy(np.ascontiguousarray(depths[1], np.float32))
    # Relative poses in float64 first: a world origin far away would cost float32 its digits.
    relative = torch.from_numpy(np.linalg.inv(poses[1]) @ poses[0])
    camera = torch.from_numpy(thin).float()
    seen = projection.reproject(
        first, camera, relative.float(), second, torch.from_numpy(K[1].matrix()).float(), torch.eye(4)
    )
    points = projection.unproject(first, camera)[seen.visible].double()
    return points.numpy(), projection.transform(points, relative).numpy()


def _sees(camera: _Camera, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which of the points (P, 3), in the view's camera, lie within the crop: (P,) bool."""
    x, y, z = (points @ (camera.K @ camera.turn.T).T).T
    return (z > 0) & (x >= -0.5 * z) & (x < (size[1] - 0.5) * z) & (y >= -0.5 * z) & (y < (size[0] - 0.5) * z)


def _turn_hue(pixels: np.ndarray, turns: float) -> np.ndarray:
    """Float RGB (H, W, 3) of 0..255 with its hue turned; cv2's float HSV has the hue in degrees."""
    hsv = cv2.cvtColor(np.ascontiguousarray(pixels / np.float32(255.0), np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + np.float32(360.0 * turns)) % 360.0
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * np.float32(255.0))


def _fitted(K: Intrinsics, depth: np.ndarray) -> Intrinsics:
    height, width = depth.shape
    return K if (K.width, K.height) == (width, height) else K.resized(width, height)


def _check_size(K: Intrinsics, array: np.ndarray, what: str) -> None:
    if array.shape[:2] != (K.height, K.width):
        raise DataError(
            f"the {what} is {array.shape[1]}x{array.shape[0]} but its intrinsics are for {K.width}x{K.height}"
        )


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))
