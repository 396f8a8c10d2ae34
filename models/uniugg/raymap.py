"""Where the imagined camera looks, as the language model is asked: the rays of the target view in Plücker coordinates.

The relative pose ``T = inverse(pose_1) @ pose_2`` maps the target camera's coordinates into the reference camera's
frame, in which the spatial decoder gives its points. A ray is (direction, moment): six numbers that do not depend on
the point of the ray one starts from; without translation the moment is 0. Pixel centres lie at integers, so ``K`` is
that of the cut picture as it stands in the batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.geometry.poses import relative, rigidity_error
from models.geometry.projection import resize_intrinsics
from models.geometry.rays import plucker_rays
from models.layers.block import Mlp

PIXELS, CENTRES = "pixels", "centres"
OCTAVES = 10
"""Of the Fourier features where one ray stands for a patch."""
_RIGID = 1e-3
"""Poses are stored in float32; a sheared or mirrored one is far beyond this."""


def relative_pose(pose: Tensor, scale: Tensor | None = None) -> Tensor:
    """Poses (B, 2, 4, 4) of (reference, target), camera-to-world -> T (B, 4, 4), its translation divided by ``scale``.

    Computed in float64: scenes may lie kilometres from the origin of their world. ModelError names a pose that is
    not rigid.
    """
    error = rigidity_error(pose.double()).flatten(1).amax(1)
    if bool((error > _RIGID).any() | error.isnan().any()):
        worst = int(error.nan_to_num(math.inf).argmax())
        raise ModelError(
            f"sample {worst} of the batch has a pose that is not rigid (off by {float(error[worst]):.3g}, allowed "
            f"{_RIGID}): {pose[worst].tolist()}; poses are camera-to-world matrices without scale or shear"
        )
    T = relative(pose[:, 0].double(), pose[:, 1].double())
    if scale is not None:
        T = torch.cat([T[:, :, :3], T[:, :, 3:] / _homogeneous(scale.double())], dim=-1)
    return T


def _homogeneous(scale: Tensor) -> Tensor:
    """(B,) -> (B, 4, 1): the factor of a translation, and 1 for the last row."""
    return torch.stack([scale, scale, scale, torch.ones_like(scale)], dim=1)[..., None]


def median_depth(depth: Tensor) -> Tensor:
    """Median of the known depth of each picture (B, H, W) in metres; 1 where nothing is known."""
    known = torch.where(torch.isfinite(depth) & (depth > 0), depth, torch.nan)
    return known.flatten(1).nanmedian(dim=1).values.nan_to_num(1.0)


def raymap(K: Tensor, T: Tensor, height: int, width: int) -> Tensor:
    """Plücker rays (B, height, width, 6) of the target's pixels in the reference frame.

    Args:
        K: (B, 3, 3) of the target's picture of ``height`` x ``width`` pixels.
        T: (B, 4, 4) target camera -> reference camera.
        height: of the picture.
        width: of the picture.
    """
    return plucker_rays(K.to(T.dtype), T, height, width)


def ray_patches(K: Tensor, T: Tensor, grid: tuple[int, int], patch: int, mode: str) -> Tensor:
    """What the raymap MLP reads: float32 (B, h, w, numbers of a query); see :func:`ray_width`.

    ``pixels``: all rays of a patch, in order (row, column, coordinate). ``centres``: the ray through the centre of
    each patch (of an even number of pixels, so between two) with sines and cosines of ten octaves.
    """
    h, w = grid
    if mode == PIXELS:
        rays = raymap(K, T, h * patch, w * patch).float()
        return rays.unflatten(1, (h, patch)).unflatten(3, (w, patch)).transpose(2, 3).flatten(3)
    coarse = resize_intrinsics(K.to(T.dtype), (h * patch, w * patch), (h, w))
    rays = raymap(coarse, T, h, w).float()
    angles = rays[..., None] * (2.0 ** torch.arange(OCTAVES, device=rays.device))
    return torch.cat([rays, angles.sin().flatten(3), angles.cos().flatten(3)], dim=-1)


def ray_width(patch: int, mode: str) -> int:
    """Numbers of a query. ModelError for an unknown ``mode``."""
    if mode not in (PIXELS, CENTRES):
        raise ModelError(f"rays={mode!r} must be {PIXELS!r} or {CENTRES!r}")
    return 6 * patch * patch if mode == PIXELS else 6 * (1 + 2 * OCTAVES)


class RayQueries(nn.Module):
    """One query a patch of the target view: an MLP of its rays, plus a learned position.

    The table of positions is interpolated (bicubic) to other grids than ``grid``.
    """

    def __init__(self, width: int, *, patch: int, grid: tuple[int, int], mode: str) -> None:
        super().__init__()
        self.patch, self.mode = patch, mode
        self.mlp = Mlp(ray_width(patch, mode), width, width)
        self.position = nn.Parameter(torch.randn(1, width, *grid) * 0.02)

    def forward(self, K: Tensor, T: Tensor, grid: tuple[int, int]) -> Tensor:
        """K (B, 3, 3) and T (B, 4, 4) of the target -> queries (B, h * w, width), row by row."""
        with torch.autocast(K.device.type, enabled=False):  # rays lose their meaning in bfloat16
            rays = ray_patches(K, T, grid, self.patch, self.mode)
        queries = self.mlp(rays)
        position: Tensor = self.position
        if position.shape[-2:] != tuple(grid):
            position = F.interpolate(position, size=grid, mode="bicubic", align_corners=False)
        return (queries + position.permute(0, 2, 3, 1).to(queries.dtype)).flatten(1, 2)
