"""Ray queries: identities of Plücker rays, half pixels, the order of a patch, units, and poses that are none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from models.errors import ModelError
from models.geometry.poses import make_pose
from models.geometry.projection import project
from models.uniugg.raymap import (
    RayQueries,
    median_depth,
    ray_patches,
    ray_width,
    raymap,
    relative_pose,
)

K = torch.tensor([[[40.0, 0.0, 23.5], [0.0, 42.0, 15.5], [0.0, 0.0, 1.0]]])


def turn(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def pose(angle: float = 0.0, move: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> torch.Tensor:
    return make_pose(turn(angle), torch.tensor(move))


def test_without_a_move_the_moment_is_zero_and_rays_are_the_camera_s_own():
    both = torch.stack([pose(0.4, (1.0, 2.0, 3.0))] * 2)[None]
    rays = raymap(K, relative_pose(both), 32, 48)
    assert rays[..., 3:].abs().max() < 1e-12
    uv, _ = project(rays[..., :3].float(), K)
    assert torch.allclose(uv[0, 3, 7], torch.tensor([7.0, 3.0]), atol=1e-4), "through pixel centres at integers"


def test_turning_the_target_turns_its_rays():
    still = raymap(K, relative_pose(torch.stack([pose(), pose(0.0, (1.0, 0.0, 0.5))])[None]), 8, 8)
    both = torch.stack([pose(), pose(0.6, (1.0, 0.0, 0.5))])[None]
    turned = raymap(K, relative_pose(both), 8, 8)
    torch.testing.assert_close(turned[..., :3], still[..., :3] @ turn(0.6).double().T)


def test_only_the_relative_pose_counts():
    """Moving both cameras together changes nothing, even far from the origin."""
    first, second = pose(0.1), pose(0.5, (0.3, -0.2, 0.4))
    world = pose(1.1, (50.0, -20.0, 3.0)).double()
    a = relative_pose(torch.stack([first, second])[None])
    b = relative_pose(torch.stack([world @ first.double(), world @ second.double()])[None])
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_moment_is_origin_times_direction_whatever_point_of_the_ray():
    T = relative_pose(torch.stack([pose(), pose(0.5, (0.3, -0.2, 0.4))])[None])
    rays = raymap(K, T, 4, 4)[0]
    along = T[0, :3, 3] + 2.7 * rays[..., :3]
    torch.testing.assert_close(torch.linalg.cross(along, rays[..., :3]), rays[..., 3:])


def test_patches_keep_their_rays_in_order():
    T = relative_pose(torch.stack([pose(), pose(0.5, (0.3, -0.2, 0.4))])[None])
    patches = ray_patches(K, T, (2, 3), 16, "pixels")
    rays = raymap(K, T, 32, 48).float()
    assert patches.shape == (1, 2, 3, ray_width(16, "pixels")) == (1, 2, 3, 1536)
    assert torch.equal(patches[0, 1, 2].unflatten(0, (16, 16, 6)), rays[0, 16:32, 32:48])


def test_a_patch_s_centre_lies_between_its_pixels():
    """The ray of the centre is that of pixel (7.5, 7.5) of a patch of 16."""
    T = relative_pose(torch.stack([pose(), pose(0.5, (0.3, -0.2, 0.4))])[None])
    centres = ray_patches(K, T, (2, 3), 16, "centres")
    assert centres.shape == (1, 2, 3, ray_width(16, "centres")) == (1, 2, 3, 126)
    direction = torch.tensor([(32 + 7.5 - 23.5) / 40.0, (7.5 - 15.5) / 42.0, 1.0])
    want = T[0, :3, :3].float() @ F.normalize(direction, dim=0)
    torch.testing.assert_close(centres[0, 0, 2, :3], want)
    torch.testing.assert_close(centres[..., 6], centres[..., 0].sin())


def test_the_translation_is_divided_by_the_scale():
    both = torch.stack([pose(), pose(0.5, (0.3, -0.2, 0.4))])[None]
    plain, scaled = relative_pose(both), relative_pose(both, torch.tensor([2.0]))
    torch.testing.assert_close(scaled[:, :3, 3], plain[:, :3, 3] / 2)
    torch.testing.assert_close(scaled[:, :, :3], plain[:, :, :3])
    assert float(scaled[0, 3, 3]) == 1.0
    depth = torch.tensor([[[0.0, 1.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, math.inf]]])
    assert median_depth(depth).tolist() == [2.0, 1.0]


def test_queries_of_any_grid_with_positions_in_between():
    torch.manual_seed(0)
    queries = RayQueries(8, patch=16, grid=(4, 4), mode="centres")
    T = torch.eye(4).double()[None]
    assert queries(K, T, (4, 4)).shape == (1, 16, 8)
    with torch.no_grad():
        queries.position.fill_(1.0)
        flat = queries(K, T, (3, 6))
        queries.position.zero_()
        torch.testing.assert_close(flat - queries(K, T, (3, 6)), torch.ones(1, 18, 8))


@pytest.mark.parametrize("broken", [pose()[None] * 2, pose()[None] * torch.nan, -pose()[None]])
def test_a_pose_that_is_none_is_refused(broken: torch.Tensor):
    with pytest.raises(ModelError, match="sample 1 of the batch has a pose that is not rigid"):
        relative_pose(torch.stack([torch.stack([pose(), pose()]), torch.cat([pose()[None], broken])]))
    with pytest.raises(ModelError, match="rays='rows' must be"):
        ray_width(16, "rows")
