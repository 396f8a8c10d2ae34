"""Rays of a pinhole camera, and their Plücker coordinates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from models.geometry.projection import pixel_grid


def camera_rays(K: Tensor, height: int, width: int) -> Tensor:
    """Unit directions (..., H, W, 3) through the pixel centres, in the camera's frame, from K (..., 3, 3)."""
    u, v = pixel_grid(height, width, K).unbind(-1)
    fx, fy, cx, cy = (K[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    x, y = (u - cx) / fx, (v - cy) / fy
    return functional.normalize(torch.stack([x, y, torch.ones_like(x)], dim=-1), dim=-1)


def world_rays(K: Tensor, pose: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Origins (..., 3) and unit directions (..., H, W, 3) in the world; ``pose`` (..., 4, 4) is camera-to-world."""
    directions = camera_rays(K, height, width)
    return pose[..., :3, 3], torch.einsum("...ij,...hwj->...hwi", pose[..., :3, :3], directions)


def plucker(origin: Tensor, direction: Tensor) -> Tensor:
    """Plücker coordinates (..., 6) of lines: the unit direction first, then the moment ``origin x direction``.

    The moment is the same for every origin on the line, so equal lines have equal coordinates. Some papers write
    the moment first; this project keeps the order (direction, moment).
    """
    direction = functional.normalize(direction, dim=-1)
    return torch.cat([direction, torch.linalg.cross(origin.expand_as(direction), direction)], dim=-1)


def plucker_rays(K: Tensor, pose: Tensor, height: int, width: int) -> Tensor:
    """Plücker coordinates (..., H, W, 6) of all pixels, in the world: (direction, moment), moment in metres."""
    origin, direction = world_rays(K, pose, height, width)
    return plucker(origin[..., None, None, :], direction)
