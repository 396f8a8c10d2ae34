"""What Spa3R knows of a camera: the rays through its patches, and its projection matrix.

VGGT's pose encoding (translation and quaternion of world-to-camera, fields of view) is taken as it is emitted: neither
moved to another origin nor scaled. The principal point lies in the middle, so all that follows depends on the fields of
view and the grid, and the number of pixels of a patch cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.encoders.vggt.poses import extrinsics_intrinsics
from models.errors import ModelError
from models.geometry.poses import inverse, make_pose
from models.geometry.rays import camera_rays, plucker_rays
from models.layers.prope import projection_matrices

POSE = 9
"""Numbers of a pose encoding."""
MIN_FIELD_OF_VIEW = 1e-2
"""Radians. The camera head's ReLU may say 0, whose focal length is infinite; untrained heads do."""


class Cameras(NamedTuple):
    """Of N cameras, all float32."""

    rays: Tensor
    """(N, h*w, 3) unit directions through the middles of the patches in the camera's frame; (N, h*w, 6) Plücker
    coordinates (direction, moment) in VGGT's world."""
    projection: Tensor
    """(N, 4, 4)."""
    back: Tensor
    """Inverse of ``projection``."""


def cameras_of(pose: Tensor, grid: tuple[int, int], *, plucker: bool = False) -> Cameras:
    """Cameras of pose encodings (N, 9) for pictures of ``grid`` (rows, columns) patches."""
    if pose.ndim != 2 or pose.shape[1] != POSE:
        raise ModelError(f"poses are VGGT's encodings (cameras, {POSE}), got {tuple(pose.shape)}")
    with torch.autocast(pose.device.type, enabled=False):
        encoding = torch.cat([pose[:, :7], pose[:, 7:].clamp_min(MIN_FIELD_OF_VIEW)], dim=-1).float()
        extrinsics, K = extrinsics_intrinsics(encoding, grid)
        projection, back = projection_matrices(extrinsics, K, grid)
        # Here the first patch begins at 0, for the rays of this project its middle is at 0.
        K = K - 0.5 * K.new_tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        if plucker:
            pose_in_world = inverse(make_pose(extrinsics[:, :3, :3], extrinsics[:, :3, 3]))
            rays = plucker_rays(K, pose_in_world, *grid)
        else:
            rays = camera_rays(K, *grid)
        return Cameras(rays.flatten(1, 2), projection, back)
