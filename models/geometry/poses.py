"""Rigid poses as 4x4 matrices: inverse, relative pose, angles, quaternions, cameras that look at a point.

A pose maps camera coordinates to world coordinates (camera-to-world) unless a name says otherwise. All functions
take any leading batch axes, keep dtype and device, and are differentiable where the mathematics is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def make_pose(rotation: Tensor, translation: Tensor) -> Tensor:
    """Rotation (..., 3, 3) and translation (..., 3) -> pose (..., 4, 4)."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], dim=-2)


def inverse(pose: Tensor) -> Tensor:
    """Inverse of rigid poses (..., 4, 4), by transposing the rotation: exact where a general inverse is not.

    Camera-to-world becomes world-to-camera and the other way round. The input must be rigid: see
    :func:`rigidity_error`.
    """
    rotation = pose[..., :3, :3].mT
    translation = -(rotation @ pose[..., :3, 3:]).squeeze(-1)
    return make_pose(rotation, translation)


def relative(pose_a: Tensor, pose_b: Tensor) -> Tensor:
    """Pose of camera b in the frame of camera a, (..., 4, 4): maps coordinates of b to coordinates of a."""
    return inverse(pose_a) @ pose_b


def rotation_angle(rotation: Tensor) -> Tensor:
    """Angle of rotations (..., 3, 3) in radians, in [0, pi].

    From the sine (skew part) and the cosine (trace) together: arccos of the trace alone loses half of the digits
    near 0 and near pi.
    """
    skew = torch.stack(
        [
            rotation[..., 2, 1] - rotation[..., 1, 2],
            rotation[..., 0, 2] - rotation[..., 2, 0],
            rotation[..., 1, 0] - rotation[..., 0, 1],
        ],
        dim=-1,
    )
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.atan2(torch.linalg.vector_norm(skew, dim=-1), trace - 1.0)


def rigidity_error(pose: Tensor) -> Tensor:
    """How far (..., 4, 4) is from a rigid pose: largest entry of |R R^T - I|, |det R - 1| and |last row - (0,0,0,1)|.

    0 for an exact pose, 2 for a mirrored one, NaN or infinite where an entry is not finite.
    """
    rotation = pose[..., :3, :3]
    identity = torch.eye(3, dtype=pose.dtype, device=pose.device)
    orthogonal = (rotation @ rotation.mT - identity).abs().amax(dim=(-2, -1))
    handed = (torch.linalg.det(rotation) - 1.0).abs()
    row = (pose[..., 3, :] - pose.new_tensor([0.0, 0.0, 0.0, 1.0])).abs().amax(dim=-1)
    moved = pose[..., :3, 3].sum(dim=-1) * 0.0  # NaN where the translation is not finite
    return torch.maximum(torch.maximum(orthogonal, handed), row) + moved


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Quaternions (..., 4), scalar first (w, x, y, z), of any non-zero length -> rotations (..., 3, 3)."""
    w, x, y, z = functional.normalize(quaternion, dim=-1, eps=1e-12).unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(entries, dim=-1).reshape(*quaternion.shape[:-1], 3, 3)


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Rotations (..., 3, 3) -> unit quaternions (..., 4), scalar first and never negative.

    Builds the quaternion four times, each time dividing by another component, and keeps the one that divides by
    the largest: no case of the rotation loses precision (Shepperd's method).
    """
    m00, m11, m22 = rotation[..., 0, 0], rotation[..., 1, 1], rotation[..., 2, 2]
    squares = torch.stack([1 + m00 + m11 + m22, 1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22], -1)
    wx = rotation[..., 2, 1] - rotation[..., 1, 2]
    wy = rotation[..., 0, 2] - rotation[..., 2, 0]
    wz = rotation[..., 1, 0] - rotation[..., 0, 1]
    xy = rotation[..., 1, 0] + rotation[..., 0, 1]
    xz = rotation[..., 0, 2] + rotation[..., 2, 0]
    yz = rotation[..., 2, 1] + rotation[..., 1, 2]
    # Row i is 4 q_i q: any row, normalised, is the quaternion.
    rows = torch.stack(
        [
            torch.stack([squares[..., 0], wx, wy, wz], -1),
            torch.stack([wx, squares[..., 1], xy, xz], -1),
            torch.stack([wy, xy, squares[..., 2], yz], -1),
            torch.stack([wz, xz, yz, squares[..., 3]], -1),
        ],
        dim=-2,
    )
    best = squares.argmax(dim=-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quaternion = functional.normalize(rows.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def look_at(eye: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """Camera-to-world pose (..., 4, 4) of a camera at ``eye`` (..., 3) whose axis goes through ``target``.

    ``up`` (..., 3) is the world's upward direction; the image's y axis points against it. Where ``up`` is parallel
    to the line of sight the roll is undetermined and the result is not finite.
    """
    forward = functional.normalize(target - eye, dim=-1)
    right = torch.linalg.cross(forward, up.expand_as(forward))
    right = right / torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    down = torch.linalg.cross(forward, right)
    return make_pose(torch.stack([right, down, forward], dim=-1), eye)
