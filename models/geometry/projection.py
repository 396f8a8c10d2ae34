"""Pinhole projection: pixels to points and back, reprojection of one view into another, z-buffer splatting.

Depth is measured along z (not along the ray), in metres; 0 is unknown. ``K`` is (..., 3, 3) without skew, in pixels
of the image it stands beside, pixel centres at integers. Leading axes are batch axes and must match.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.geometry.poses import inverse

_NEAREST_Z = 1e-6
"""Points closer to the camera plane than this (metres) are divided by this: their pixels are far outside."""


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Pixel centres (H, W, 2) as (u, v), in the dtype and on the device of ``like``."""
    v, u = torch.meshgrid(
        torch.arange(height, dtype=like.dtype, device=like.device),
        torch.arange(width, dtype=like.dtype, device=like.device),
        indexing="ij",
    )
    return torch.stack([u, v], dim=-1)


def resize_intrinsics(K: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """K (..., 3, 3) of an image resized from ``old`` to ``new``, both (height, width).

    What scales is the continuous plane, whose origin is the corner of the first pixel at -0.5.
    """
    sy, sx = new[0] / old[0], new[1] / old[1]
    scale = K.new_tensor([[sx, 0.0, 0.5 * sx - 0.5], [0.0, sy, 0.5 * sy - 0.5], [0.0, 0.0, 1.0]])
    return scale @ K


def _camera(K: Tensor, ndim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fx, fy, cx, cy with axes of size one appended until they have ``ndim`` axes."""
    missing = (1,) * (ndim - (K.ndim - 2))
    entries = (K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2])
    fx, fy, cx, cy = (entry.reshape(entry.shape + missing) for entry in entries)
    return fx, fy, cx, cy


def unproject(depth: Tensor, K: Tensor) -> Tensor:
    """Depth (..., H, W) in metres and K (..., 3, 3) -> points (..., H, W, 3) in the camera's frame.

    A pixel of unknown depth (0) becomes the origin; mask with ``depth > 0``.
    """
    u, v = pixel_grid(depth.shape[-2], depth.shape[-1], depth).unbind(-1)
    fx, fy, cx, cy = _camera(K.to(depth.dtype), depth.ndim)
    return torch.stack([(u - cx) / fx * depth, (v - cy) / fy * depth, depth], dim=-1)


def transform(points: Tensor, T: Tensor) -> Tensor:
    """Apply T (..., 4, 4) to points (..., [any axes,] 3); the leading axes are those of T."""
    batch = T.shape[:-2]
    if points.shape[: len(batch)] != batch:
        raise ValueError(f"points {tuple(points.shape)} do not start with the batch axes {tuple(batch)} of T")
    flat = points.reshape(*batch, -1, 3)
    return (flat @ T[..., :3, :3].mT + T[..., None, :3, 3]).reshape(points.shape)


def project(points: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Points (..., 3) in the camera's frame -> pixels (..., 2) as (u, v), and their depth z (...).

    Points behind the camera get pixels as well, without meaning: check ``z > 0``.
    """
    x, y, z = points.unbind(-1)
    fx, fy, cx, cy = _camera(K.to(points.dtype), z.ndim)
    safe = z.clamp_min(_NEAREST_Z)
    return torch.stack([fx * x / safe + cx, fy * y / safe + cy], dim=-1), z


class Splat(NamedTuple):
    """Result of :func:`splat`. ``coverage`` says which pixels at least one point fell on."""

    depth: Tensor
    """(..., H, W) metres of the nearest point; 0 where none."""
    values: Tensor
    """(..., H, W, C) values of that point; 0 where none."""
    winner: Tensor
    """(..., H, W) int64 index of that point; -1 where none."""
    coverage: Tensor
    """(..., H, W) bool."""


def splat(uv: Tensor, z: Tensor, values: Tensor, height: int, width: int) -> Splat:
    """Draw points into an image with a z-buffer: every pixel keeps its nearest point.

    Args:
        uv: (..., P, 2) pixels.
        z: (..., P) metres; points with z <= 0 or not finite are not drawn.
        values: (..., P, C).
        height: of the image.
        width: of the image.

    Each point covers the pixel whose centre is nearest. Of points at exactly the same depth the one with the lowest
    index wins. Both steps are minima, whose result does not depend on the order of the threads: deterministic on
    every device.
    """
    batch, count = z.shape[:-1], z.shape[-1]
    images = batch.numel()
    column, row = (uv.nan_to_num(-1.0).clamp(-1.0, max(height, width) + 1.0) + 0.5).floor().long().unbind(-1)
    drawn = (z > 0) & torch.isfinite(z) & torch.isfinite(uv).all(-1)
    drawn &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
    base = torch.arange(images, device=z.device).reshape(*batch, 1) * (height * width)
    # Points that are not drawn go to one spare pixel behind the last image.
    pixel = torch.where(drawn, base + row * width + column, images * height * width).reshape(-1)
    flat_z = torch.where(drawn, z, torch.inf).reshape(-1)
    buffer = z.new_full((images * height * width + 1,), torch.inf).scatter_reduce(0, pixel, flat_z, "amin")
    order = torch.arange(count, device=z.device).expand(images, count).reshape(-1)
    order = torch.where(flat_z == buffer[pixel], order, count)
    index = torch.full_like(buffer, count, dtype=torch.long).scatter_reduce(0, pixel, order, "amin")[:-1]
    index = index.reshape(images, height * width)
    buffer = buffer[:-1].reshape(images, height * width)
    coverage = torch.isfinite(buffer)
    padded = torch.cat(
        [values.reshape(images, count, values.shape[-1]), values.new_zeros(images, 1, values.shape[-1])], dim=1
    )
    chosen = torch.where(coverage, index, count)[..., None].expand(-1, -1, padded.shape[-1])
    shape = (*batch, height, width)
    return Splat(
        depth=torch.where(coverage, buffer, 0.0).reshape(shape),
        values=padded.gather(1, chosen).reshape(*shape, -1),
        winner=torch.where(coverage, index, -1).reshape(shape),
        coverage=coverage.reshape(shape),
    )


class Reprojection(NamedTuple):
    """Where the pixels of view A lie in view B."""

    uv: Tensor
    """(..., H, W, 2) pixels of B."""
    z: Tensor
    """(..., H, W) depth along B's axis, metres."""
    inside: Tensor
    """(..., H, W) bool: A's depth is known and the point lies in front of B, within its image."""
    visible: Tensor
    """(..., H, W) bool: inside, and B's own depth agrees, so that nothing stands before the point."""
    residual: Tensor
    """(..., H, W) signed distance of z from B's depth around that pixel, metres; NaN where B knows none."""


def reproject(
    depth_a: Tensor,
    K_a: Tensor,
    pose_a: Tensor,
    depth_b: Tensor,
    K_b: Tensor,
    pose_b: Tensor,
    *,
    relative: float = 0.03,
    absolute: float = 0.02,
) -> Reprojection:
    """Carry the depth map of view A into view B and test for occlusion.

    Args:
        depth_a: (..., H, W) metres, 0 unknown; ``depth_b`` (..., H', W') likewise.
        K_a: (..., 3, 3); ``K_b`` likewise.
        pose_a: (..., 4, 4) camera-to-world; ``pose_b`` likewise.
        depth_b: see ``depth_a``.
        K_b: see ``K_a``.
        pose_b: see ``pose_a``.
        relative: tolerated difference as a share of z.
        absolute: tolerated difference in metres, added to the relative one.

    B's depth at a pixel between four centres is taken as the interval of those four (unknown ones left out): on
    slanted surfaces and at edges any value in between is right, and interpolating would invent surfaces.
    """
    points = transform(unproject(depth_a, K_a), inverse(pose_b) @ pose_a)
    uv, z = project(points, K_b)
    height, width = depth_b.shape[-2:]
    u, v = uv.unbind(-1)
    inside = (depth_a > 0) & torch.isfinite(depth_a) & (z > _NEAREST_Z)
    inside &= (u >= -0.5) & (u < width - 0.5) & (v >= -0.5) & (v < height - 0.5)
    low, high = _depth_interval(depth_b, torch.where(inside[..., None], uv, 0.0))
    residual = torch.where(z > high, z - high, torch.where(z < low, z - low, 0.0))
    residual = torch.where(inside & torch.isfinite(low), residual, torch.nan)
    visible = residual.abs() <= absolute + relative * z
    return Reprojection(uv=uv, z=z, inside=inside, visible=visible, residual=residual)


def _depth_interval(depth: Tensor, uv: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest known depth of the four pixels around uv (..., H, W, 2); inf and -inf where none is."""
    height, width = depth.shape[-2:]
    flat = depth.reshape(*depth.shape[:-2], -1)
    corner = uv.floor().long()
    low = high = None
    for dv in (0, 1):
        for du in (0, 1):
            column = (corner[..., 0] + du).clamp(0, width - 1)
            row = (corner[..., 1] + dv).clamp(0, height - 1)
            index = (row * width + column).reshape(*flat.shape[:-1], -1)
            value = flat.gather(-1, index).reshape(row.shape)
            known = (value > 0) & torch.isfinite(value)
            least, greatest = torch.where(known, value, torch.inf), torch.where(known, value, -torch.inf)
            low = least if low is None else torch.minimum(low, least)
            high = greatest if high is None else torch.maximum(high, greatest)
    assert low is not None
    assert high is not None
    return low, high
