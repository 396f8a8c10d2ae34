"""Poses against scipy and against their defining properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from models.geometry import poses


def random_poses(count: int, seed: int = 0) -> torch.Tensor:
    rotation = torch.from_numpy(Rotation.random(count, random_state=seed).as_matrix())
    translation = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return poses.make_pose(rotation, translation)


def test_inverse_matches_the_general_inverse() -> None:
    T = random_poses(20).reshape(4, 5, 4, 4)
    torch.testing.assert_close(poses.inverse(T), torch.linalg.inv(T))


def test_relative_maps_b_to_a() -> None:
    a, b = random_poses(8, 1), random_poses(8, 2)
    point = torch.randn(8, 4, 1, dtype=torch.float64)
    torch.testing.assert_close(a @ (poses.relative(a, b) @ point), b @ point)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 0.3, math.pi / 2, 3.0, math.pi - 1e-7, math.pi])
def test_rotation_angle_is_exact_also_near_zero_and_pi(angle: float) -> None:
    axis = np.array([1.0, -2.0, 0.5]) / np.linalg.norm([1.0, -2.0, 0.5])
    R = torch.from_numpy(Rotation.from_rotvec(axis * angle).as_matrix())
    assert float(poses.rotation_angle(R)) == pytest.approx(angle, abs=1e-12)


def test_quaternions_agree_with_scipy() -> None:
    rotations = Rotation.random(500, random_state=3)
    wxyz = torch.from_numpy(rotations.as_quat()[:, [3, 0, 1, 2]].copy())
    R = torch.from_numpy(rotations.as_matrix())
    torch.testing.assert_close(poses.quaternion_to_matrix(3.0 * wxyz), R)
    ours = poses.matrix_to_quaternion(R)
    torch.testing.assert_close(ours, torch.where(wxyz[:, :1] < 0, -wxyz, wxyz))


@pytest.mark.parametrize("axis", [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0]])
def test_half_turns_survive_the_round_trip(axis: list[float]) -> None:
    R = torch.from_numpy(Rotation.from_rotvec(np.array(axis) * math.pi).as_matrix())
    torch.testing.assert_close(poses.quaternion_to_matrix(poses.matrix_to_quaternion(R)), R)


def test_look_at_puts_the_target_on_the_axis_and_the_sky_above() -> None:
    eye = torch.tensor([[1.0, 2.0, 1.5], [0.0, 0.0, 1.0]])
    target = torch.tensor([[4.0, 1.0, 0.5], [0.0, 3.0, 1.0]])
    T = poses.look_at(eye, target, torch.tensor([0.0, 0.0, 1.0]))
    assert float(poses.rigidity_error(T).max()) < 1e-6
    local = (poses.inverse(T) @ torch.cat([target, torch.ones(2, 1)], -1)[..., None])[..., :3, 0]
    torch.testing.assert_close(local[:, :2], torch.zeros(2, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(local[:, 2], torch.linalg.vector_norm(target - eye, dim=-1))
    above = poses.inverse(T) @ torch.cat([target + torch.tensor([0, 0, 1.0]), torch.ones(2, 1)], -1)[..., None]
    assert (above[:, 1, 0] < 0).all()


@pytest.mark.parametrize(
    ("change", "at_least"),
    [
        (lambda T: T, 0.0),
        (lambda T: T * torch.tensor([[-1.0, 1, 1, 1]] * 4).double(), 1.9),
        (lambda T: torch.cat([T[:3] * 1.1, T[3:]]), 0.2),
        (lambda T: torch.cat([T[:3], T[3:] + 1]), 0.9),
    ],
    ids=["rigid", "mirrored", "scaled", "last row"],
)
def test_rigidity_error(change, at_least: float) -> None:
    error = float(poses.rigidity_error(change(random_poses(1)[0])))
    assert error < 1e-12 if at_least == 0 else error > at_least


def test_a_pose_that_is_not_finite_is_not_rigid() -> None:
    T = random_poses(2)
    T[0, 0, 3], T[1, 1, 1] = -math.inf, math.nan
    assert not torch.isfinite(poses.rigidity_error(T)).any()
