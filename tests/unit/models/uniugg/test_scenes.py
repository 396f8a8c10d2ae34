"""Pictures of point clouds: the nearest wins, discs, holes, coverage."""

from __future__ import annotations

import torch

from models.geometry.poses import make_pose
from models.geometry.projection import unproject
from models.geometry.rendering import fill_holes
from models.uniugg.scenes import PointCloud, render, select_points

K = torch.tensor([[20.0, 0.0, 11.5], [0.0, 20.0, 7.5], [0.0, 0.0, 1.0]])
EYE = torch.eye(4)


def cloud(depth: torch.Tensor) -> PointCloud:
    points = unproject(depth, K).flatten(0, 1)
    colours = torch.rand(len(points), 3, generator=torch.Generator().manual_seed(0))
    return PointCloud(points, colours)


def test_a_view_of_its_own_points_is_itself():
    depth = torch.rand(16, 24, generator=torch.Generator().manual_seed(1)) + 1
    given = cloud(depth)
    out = render(given, K, EYE, height=16, width=24, radius=0.0, fill=0)
    torch.testing.assert_close(out.image, given.colours.unflatten(0, (16, 24)))
    torch.testing.assert_close(out.depth, depth)
    assert out.coverage == 1.0


def test_the_camera_s_pose_carries_the_points():
    pose = make_pose(torch.eye(3), torch.tensor([0.1, 0.0, -1.0]))
    one = PointCloud(torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1, 3))
    out = render(one, K, pose, height=16, width=24, radius=0.0, fill=0)
    assert out.drawn.nonzero().tolist() == [[8, 11]], "u = 11.5 - 20 * 0.1 / 2 = 10.5, v = 7.5"
    assert float(out.depth[8, 11]) == 2.0
    assert not render(one, K, make_pose(torch.eye(3), torch.tensor([0.0, 0.0, 2.0])), height=16, width=24,
                      radius=0.0, fill=0).drawn.any()  # fmt: skip  # behind the camera


def test_discs_grow_with_the_picture_and_the_nearest_wins():
    near = torch.tensor([[0.025, 0.025, 1.0], [0.15, 0.05, 2.0]])
    given = PointCloud(near, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    radius = 1.0 * 224 / 24
    out = render(given, K, EYE, height=16, width=24, radius=radius, fill=0)
    red = out.image[..., 0] == 1
    assert red.sum() == 5, "a disc of radius 1: the pixel and its four neighbours"
    assert red[8, 12]
    assert out.image[8, 13].tolist() == [1.0, 0.0, 0.0], "where both fall, the nearer"
    assert out.image[8, 14].tolist() == [0.0, 1.0, 0.0]


def test_holes_take_their_nearest_neighbour_up_to_a_distance():
    picture, known = torch.zeros(1, 9, 1), torch.zeros(1, 9, dtype=torch.bool)
    for place, value in ((0, 1.0), (8, 2.0)):
        picture[0, place], known[0, place] = value, True
    out, filled = fill_holes(picture, known, 2)
    assert out[0, :, 0].tolist() == [1, 1, 1, 0, 0, 0, 2, 2, 2]
    assert filled[0].tolist() == [True] * 3 + [False] * 3 + [True] * 3
    nearest, _ = fill_holes(picture, known, 7)
    assert nearest[0, :, 0].tolist()[1:4] == [1, 1, 1]
    assert nearest[0, :, 0].tolist()[5:8] == [2, 2, 2]
    same, still = fill_holes(picture, known, 0)
    assert torch.equal(same, picture)
    assert torch.equal(still, known)


def test_coverage_counts_what_is_filled_and_drawn_does_not():
    depth = torch.ones(16, 24)
    given = cloud(depth)
    keep = torch.ones(16, 24, dtype=torch.bool)
    keep[5, 5] = False
    keep[8:13, 10:15] = False
    holed = PointCloud(given.points[keep.flatten()], given.colours[keep.flatten()])
    out = render(holed, K, EYE, height=16, width=24, radius=0.0, fill=1)
    assert torch.equal(out.drawn, keep)
    assert out.covered[5, 5]
    assert (~out.covered).sum() == 9, "a hole of 5 x 5 keeps its middle 3 x 3"
    assert out.image[~out.covered].abs().sum() == 0
    assert out.coverage == 1 - 9 / (16 * 24)


def test_points_without_confidence_or_place_are_left_out():
    points = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, torch.nan], [1.0, 0.0, 1.0]])
    chosen = select_points(points, torch.eye(3), torch.tensor([1.6, 9.0, 1.4]), 1.5)
    assert chosen.points.tolist() == [[0.0, 0.0, 1.0]]
    assert chosen.colours.tolist() == [[1.0, 0.0, 0.0]]
