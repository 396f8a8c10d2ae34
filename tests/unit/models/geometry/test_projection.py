"""Projection by round trips, analytic planes and a brute-force z-buffer."""

from __future__ import annotations

import pytest
import torch

from models.geometry import poses, projection
from services.contracts import Intrinsics

K = torch.tensor([[40.0, 0.0, 15.5], [0.0, 42.0, 11.5], [0.0, 0.0, 1.0]], dtype=torch.float64)


def camera(eye: list[float], target: list[float]) -> torch.Tensor:
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return poses.look_at(torch.tensor(eye).double(), torch.tensor(target).double(), up)


def plane_depth(pose: torch.Tensor, height: int = 24, width: int = 32, level: float = 0.0) -> torch.Tensor:
    """Exact depth of the plane z = level."""
    rays = projection.unproject(torch.ones(height, width, dtype=torch.float64), K) @ pose[:3, :3].T
    depth = (level - pose[2, 3]) / rays[..., 2]
    return torch.where(depth > 0, depth, 0.0)


def test_project_inverts_unproject_for_batches() -> None:
    depth = torch.rand(3, 2, 5, 7, dtype=torch.float64) + 0.5
    cameras = K.repeat(3, 2, 1, 1) * torch.linspace(0.8, 1.2, 6).double().reshape(3, 2, 1, 1)
    cameras[..., 2, 2] = 1
    uv, z = projection.project(projection.unproject(depth, cameras), cameras)
    torch.testing.assert_close(z, depth)
    torch.testing.assert_close(uv, projection.pixel_grid(5, 7, depth).expand(3, 2, 5, 7, 2))


def test_transform_refuses_points_of_another_batch() -> None:
    with pytest.raises(ValueError, match="batch axes"):
        projection.transform(torch.zeros(2, 5, 3), torch.eye(4).expand(3, 4, 4))


def test_resize_intrinsics_agrees_with_the_contract_and_keeps_corners() -> None:
    camera = Intrinsics(fx=40, fy=42, cx=15.5, cy=11.5, width=32, height=24)
    small = projection.resize_intrinsics(K, (24, 32), (9, 8))
    torch.testing.assert_close(small, torch.from_numpy(camera.resized(8, 9).matrix()))
    # The ray of the image's corner (-0.5, -0.5) is the same before and after.
    corner = torch.tensor([-0.5, -0.5, 1.0]).double()
    torch.testing.assert_close(torch.linalg.inv(K) @ corner, torch.linalg.inv(small) @ corner)


def brute_force(uv, z, values, height, width):
    depth = torch.zeros(height, width, dtype=z.dtype)
    index = torch.full((height, width), -1)
    for i in range(len(z)):
        column, row = round(float(uv[i, 0])), round(float(uv[i, 1]))
        if z[i] <= 0 or not (0 <= column < width and 0 <= row < height):
            continue
        if index[row, column] < 0 or z[i] < depth[row, column]:
            depth[row, column], index[row, column] = z[i], i
    return depth, index


def test_splat_is_a_z_buffer() -> None:
    generator = torch.Generator().manual_seed(0)
    uv = torch.rand(2, 300, 2, generator=generator) * torch.tensor([14.0, 10.0]) - 2
    z = torch.rand(2, 300, generator=generator) * 3 - 0.5
    z[0, 50] = torch.nan
    uv[1, 7] = torch.inf
    z[:, 100:] = (z[:, 100:] * 4).round() / 4  # ties
    values = torch.rand(2, 300, 3, generator=generator)
    result = projection.splat(uv, z, values, 8, 10)
    assert result.coverage.float().mean() > 0.5
    for b in range(2):
        keep = torch.isfinite(z[b]) & torch.isfinite(uv[b]).all(-1)
        z_b = torch.where(keep, z[b], -1.0)
        depth, index = brute_force(uv[b].nan_to_num(0, 0, 0), z_b, values[b], 8, 10)
        torch.testing.assert_close(result.depth[b], depth)
        assert torch.equal(result.winner[b], index)
        covered = index >= 0
        assert torch.equal(result.coverage[b], covered)
        torch.testing.assert_close(result.values[b][covered], values[b][index[covered]])
        assert (result.values[b][~covered] == 0).all()


def test_splat_without_points_covers_nothing() -> None:
    result = projection.splat(torch.zeros(1, 1, 2), torch.tensor([[-1.0]]), torch.ones(1, 1, 3), 4, 4)
    assert not result.coverage.any()
    assert (result.depth == 0).all()


def test_reproject_agrees_with_an_exact_plane() -> None:
    a, b = camera([0, -2, 1.5], [0, 0, 0]), camera([0.8, -1.8, 1.6], [0.1, 0.1, 0])
    result = projection.reproject(plane_depth(a), K, a, plane_depth(b), K, b, relative=0.0, absolute=0.01)
    assert result.inside.double().mean() > 0.4
    # At the very border the plane lies between the last pixel centre and the edge, where B has no sample.
    within = ((result.uv > 0) & (result.uv < torch.tensor([31.0, 23.0]))).all(-1)
    assert result.visible[result.inside & within].all()
    # The colour of a plane is a function of its world point: the pixel it lands on sees the same point.
    world = projection.transform(projection.unproject(plane_depth(a), K), a)
    seen_z = (torch.linalg.inv(b) @ torch.cat([world, torch.ones(24, 32, 1).double()], -1)[..., None])[..., 2, 0]
    torch.testing.assert_close(result.z, seen_z)


def test_reproject_finds_what_is_hidden() -> None:
    a, b = camera([0, -2, 1.5], [0, 0, 0]), camera([0.4, -1.9, 1.5], [0, 0, 0])
    wall_before_b = torch.full((24, 32), 0.4, dtype=torch.float64)
    result = projection.reproject(plane_depth(a), K, a, wall_before_b, K, b)
    assert result.inside.any()
    assert not result.visible.any()
    assert (result.residual[result.inside] > 0.5).all()


def test_unknown_depth_is_neither_visible_nor_inside() -> None:
    a = camera([0, -2, 1.5], [0, 0, 0])
    depth = plane_depth(a)
    blind = projection.reproject(torch.zeros_like(depth), K, a, depth, K, a)
    assert not blind.inside.any()
    unknown_b = projection.reproject(depth, K, a, torch.zeros_like(depth), K, a)
    assert unknown_b.inside.any()
    assert not unknown_b.visible.any()
    assert unknown_b.residual.isnan().all()


def test_reproject_takes_batches() -> None:
    a, b = camera([0, -2, 1.5], [0, 0, 0]), camera([0.8, -1.8, 1.6], [0.1, 0.1, 0])
    depths, pose = torch.stack([plane_depth(a), plane_depth(b)]), torch.stack([a, b])
    both = projection.reproject(depths, K.expand(2, 3, 3), pose, depths.flip(0), K.expand(2, 3, 3), pose.flip(0))
    single = projection.reproject(depths[1], K, pose[1], depths[0], K, pose[0])
    assert torch.equal(both.visible[1], single.visible)
