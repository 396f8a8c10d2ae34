"""Point clouds drawn into a camera."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.geometry.projection import unproject
from models.geometry.rendering import depth_in, render_points

EYE = torch.eye(4)[None]


def camera(focal: float = 10.0, centre: float = 4.0) -> Tensor:
    return torch.tensor([[[focal, 0.0, centre], [0.0, focal, centre], [0.0, 0.0, 1.0]]])


def point(u: float, v: float, z: float, K: Tensor) -> list[float]:
    return [float((u - K[0, 0, 2]) / K[0, 0, 0] * z), float((v - K[0, 1, 2]) / K[0, 1, 1] * z), z]


def drawn(mask: Tensor) -> set[tuple[int, int]]:
    """(row, column) of the true pixels."""
    return {(int(v), int(u)) for v, u in mask.nonzero()}


def test_a_depth_map_is_drawn_back_onto_itself() -> None:
    K = camera()
    depth = torch.linspace(1, 3, 81).view(1, 9, 9)
    color = torch.rand(1, 81, 3)
    result = render_points(unproject(depth, K).reshape(1, 81, 3), color, K, EYE, 9, 9, radius=0, fill=0)
    torch.testing.assert_close(result.depth, depth)
    torch.testing.assert_close(result.color.reshape(1, 81, 3), color)
    assert result.coverage().tolist() == [1.0]


def test_radius_is_stated_at_a_width_of_224() -> None:
    K = camera()
    points = torch.tensor([[point(4, 4, 1.0, K)]])
    color = torch.ones(1, 1, 3)

    def pixels(radius: float) -> set[tuple[int, int]]:
        return drawn(render_points(points, color, K, EYE, 9, 9, radius=radius * 224 / 9, fill=0).drawn[0])

    assert pixels(0.5) == {(4, 4)}
    assert pixels(1.0) == {(4, 4), (3, 4), (5, 4), (4, 3), (4, 5)}
    assert len(pixels(1.5)) == 9
    # One pixel at 224 is a 25th of one at a width of 9: the pixel that the point falls on is covered all the same.
    assert drawn(render_points(points, color, K, EYE, 9, 9, fill=0).drawn[0]) == {(4, 4)}


def test_the_nearest_point_wins_also_by_its_disc() -> None:
    K = camera()
    points = torch.tensor([[point(4, 4, 2.0, K), point(5, 4, 1.0, K)]])
    color = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    result = render_points(points, color, K, EYE, 9, 9, radius=224 / 9, fill=0)
    assert result.color[0, 4, 4].tolist() == [0.0, 1.0, 0.0]
    assert result.depth[0, 4, 4] == 1.0
    assert result.color[0, 4, 3].tolist() == [1.0, 0.0, 0.0]
    # Of two points at one depth, the one on the pixel itself beats the disc of its neighbour.
    level = points.clone()
    level[..., 2] = 1.0
    level[0, 0, :2] = torch.tensor(point(4, 4, 1.0, K)[:2])
    assert render_points(level, color, K, EYE, 9, 9, radius=224 / 9).color[0, 4, 4].tolist() == [1.0, 0.0, 0.0]


def test_holes_are_filled_from_the_nearest_within_reach_only() -> None:
    K = camera()
    points = torch.tensor([[point(0, 4, 1.0, K), point(5, 4, 2.0, K)]])
    color = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    result = render_points(points, color, K, EYE, 9, 9, radius=0, fill=2)
    row = result.color[0, 4]
    assert [row[u].tolist() for u in (1, 2)] == [[1.0, 0.0, 0.0]] * 2
    assert [row[u].tolist() for u in (3, 4, 6, 7)] == [[0.0, 1.0, 0.0]] * 4
    assert row[8].tolist() == [0.0, 0.0, 0.0]
    assert result.depth[0, 4].tolist() == [1, 1, 1, 2, 2, 2, 2, 2, 0]
    # Discs of radius 2: 13 pixels around (4, 5); around (4, 0) the 9 of its columns 0 to 2; they meet nowhere.
    assert int(result.covered.sum()) == 13 + 9
    assert int(result.drawn.sum()) == 2
    assert result.coverage().tolist() == [pytest.approx(22 / 81)]


def test_points_that_cannot_be_seen_are_not_drawn() -> None:
    K = camera()
    points = torch.tensor([[point(4, 4, 1.0, K), [0.0, 0.0, -1.0], [float("nan")] * 3, point(40, 4, 1.0, K)]])
    color = torch.ones(1, 4, 1)
    result = render_points(points, color, K, EYE, 9, 9, radius=0, fill=0)
    assert drawn(result.drawn[0]) == {(4, 4)}
    hidden = render_points(points, color, K, EYE, 9, 9, valid=torch.zeros(1, 4, dtype=torch.bool))
    assert hidden.coverage().tolist() == [0.0]
    assert float(hidden.color.abs().sum()) == 0


def test_a_turned_camera_sees_what_stands_beside_it() -> None:
    K = camera()
    # 90 degrees to the right: the camera's z axis is the world's x axis.
    pose = torch.eye(4)[None].clone()
    pose[0, :3, :3] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    pose[0, :3, 3] = torch.tensor([1.0, 0.0, 0.0])
    points = torch.tensor([[[3.0, 0.0, 0.0]]])
    result = render_points(points, torch.ones(1, 1, 1), K, pose, 9, 9, radius=0, fill=0)
    assert drawn(result.drawn[0]) == {(4, 4)}
    assert float(result.depth[0, 4, 4]) == 2.0
    assert depth_in(points, pose).tolist() == [[2.0]]


def test_a_cloud_without_points_is_an_empty_picture() -> None:
    result = render_points(
        torch.zeros(2, 0, 3), torch.zeros(2, 0, 3), camera().expand(2, 3, 3), EYE.expand(2, 4, 4), 4, 5
    )
    assert result.coverage().tolist() == [0.0, 0.0]
    assert result.color.shape == (2, 4, 5, 3)
