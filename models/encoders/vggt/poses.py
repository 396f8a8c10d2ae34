"""VGGT's encoding of a camera in nine numbers, both ways.

Translation t (3) and rotation as a quaternion x, y, z, w (4) of the world-to-camera map [R | t], then the vertical and
the horizontal field of view in radians. Axes are OpenCV's; the world is the frame of the first camera as it was
predicted, in a unit that is the network's own; the principal point is the picture's centre.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.geometry.poses import matrix_to_quaternion, quaternion_to_matrix

ENCODING = 9


def extrinsics_intrinsics(encoding: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Encodings (..., 9) of pictures of ``size`` (H, W) -> world-to-camera (..., 3, 4) and intrinsics (..., 3, 3).

    Intrinsics are in pixels. The quaternion may have any length but 0. A field of view of 0 gives infinite focal
    lengths.
    """
    translation, (x, y, z, w) = encoding[..., :3], encoding[..., 3:7].unbind(-1)
    rotation = quaternion_to_matrix(torch.stack([w, x, y, z], dim=-1))
    half = encoding.new_tensor(size) / 2
    focal = half / torch.tan(encoding[..., 7:] / 2)
    zero, one = torch.zeros_like(focal[..., 0]), torch.ones_like(focal[..., 0])
    rows = [
        torch.stack([focal[..., 1], zero, half[1].expand_as(zero)], dim=-1),
        torch.stack([zero, focal[..., 0], half[0].expand_as(zero)], dim=-1),
        torch.stack([zero, zero, one], dim=-1),
    ]
    return torch.cat([rotation, translation[..., None]], dim=-1), torch.stack(rows, dim=-2)


def pose_encoding(extrinsics: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse: world-to-camera (..., 3, 4) and intrinsics (..., 3, 3) in pixels -> encodings (..., 9).

    The quaternion has unit length and its scalar is not negative; the principal point is not kept.
    """
    w, x, y, z = matrix_to_quaternion(extrinsics[..., :3, :3]).unbind(-1)
    half = intrinsics.new_tensor(size) / 2
    focal = torch.stack([intrinsics[..., 1, 1], intrinsics[..., 0, 0]], dim=-1)
    view = 2 * torch.atan(half / focal)
    return torch.cat([extrinsics[..., :3, 3], torch.stack([x, y, z, w], dim=-1), view], dim=-1)
