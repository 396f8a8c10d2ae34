"""Rays against projection and against the definition of a line."""

from __future__ import annotations

import torch

from models.geometry import poses, projection, rays

K = torch.tensor([[40.0, 0.0, 15.5], [0.0, 42.0, 11.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
POSE = poses.look_at(
    torch.tensor([1.0, -2.0, 1.5]).double(),
    torch.tensor([0.0, 0.0, 0.5]).double(),
    torch.tensor([0.0, 0.0, 1]).double(),
)


def test_every_point_of_a_ray_projects_to_its_pixel() -> None:
    origin, direction = rays.world_rays(K, POSE, 6, 8)
    world = origin + 2.5 * direction
    uv, z = projection.project(projection.transform(world, poses.inverse(POSE)), K)
    torch.testing.assert_close(uv, projection.pixel_grid(6, 8, K))
    assert (z > 0).all()
    torch.testing.assert_close(direction.norm(dim=-1), torch.ones(6, 8).double())


def test_plucker_order_is_direction_then_moment() -> None:
    line = rays.plucker(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(line, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0]))


def test_plucker_does_not_depend_on_the_point_of_the_line() -> None:
    origin, direction = torch.randn(10, 3).double(), torch.randn(10, 3).double()
    torch.testing.assert_close(rays.plucker(origin, direction), rays.plucker(origin + 3 * direction, 0.5 * direction))
    coordinates = rays.plucker(origin, direction)
    torch.testing.assert_close((coordinates[:, :3] * coordinates[:, 3:]).sum(-1), torch.zeros(10).double())


def test_plucker_rays_of_a_batch() -> None:
    batch = rays.plucker_rays(K.expand(2, 3, 3), torch.stack([POSE, torch.eye(4).double()]), 6, 8)
    assert batch.shape == (2, 6, 8, 6)
    assert (batch[1, ..., 3:] == 0).all()  # a camera at the world's origin: all moments vanish
    torch.testing.assert_close(batch[0], rays.plucker_rays(K, POSE, 6, 8))
