"""Correspondences against a loop over pixels, and the sample that is drawn of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.data.correspondences import reciprocal_pixels, sample_matches
from tests.support import analytic

WIDTH, HEIGHT = 24, 18
K = np.diag([0.25, 0.25, 1.0]) @ analytic.K


def views(*numbers: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth (2, H, W), K (2, 3, 3) and poses (2, 4, 4) of views of the analytic room, a quarter as wide."""
    rays = analytic.pixel_rays(K, size[1], size[0])
    shots = [analytic.render(analytic.poses()[number], rays) for number in numbers]
    depth = np.stack([shot.depth for shot in shots]).astype(np.float32)
    return depth, np.stack([K, K]).astype(np.float32), np.stack([shot.pose for shot in shots]).astype(np.float32)


def target(depth: np.ndarray, K: np.ndarray, pose: np.ndarray, view: int, row: int, column: int) -> tuple[int, int]:
    """The pixel (row, column) of the other view that a pixel's point is nearest to; (-1, -1) for none."""
    z = float(depth[view, row, column])
    if not (np.isfinite(z) and z > 0):
        return -1, -1
    point = z * np.linalg.inv(K[view].astype(float)) @ [column, row, 1.0]
    world = pose[view].astype(float) @ [*point, 1.0]
    x, y, w = K[1 - view].astype(float) @ (np.linalg.inv(pose[1 - view].astype(float)) @ world)[:3]
    if w <= 1e-6:
        return -1, -1
    height, width = depth.shape[1:]
    return int(np.clip(np.rint(y / w), 0, height - 1)), int(np.clip(np.rint(x / w), 0, width - 1))


def looped(depth: np.ndarray, K: np.ndarray, pose: np.ndarray) -> set[tuple[int, int]]:
    found = set()
    for row, column in np.ndindex(*depth.shape[1:]):
        there = target(depth, K, pose, 0, row, column)
        if there != (-1, -1) and target(depth, K, pose, 1, *there) == (row, column):
            found.add((row * depth.shape[2] + column, there[0] * depth.shape[2] + there[1]))
    return found


@pytest.mark.parametrize("numbers", [(0, 1), (1, 3), (2, 0), (2, 2)])
def test_reciprocal_pixels_are_those_of_the_loop(numbers: tuple[int, int]) -> None:
    depth, cameras, pose = views(*numbers)
    depth[0, 3:6, 4:9] = 0.0
    depth[1, 0, :5] = np.nan
    found = reciprocal_pixels(depth, cameras, pose)
    expected = looped(depth, cameras, pose)
    assert len(expected) > 40
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert len(set(found.first.tolist())) == len(set(found.second.tolist())) == len(expected)


def test_the_same_view_twice_corresponds_to_itself() -> None:
    depth, cameras, pose = views(0, 0)
    found = reciprocal_pixels(depth, cameras, pose)
    np.testing.assert_array_equal(found.first, np.arange(WIDTH * HEIGHT))
    np.testing.assert_array_equal(found.second, found.first)


def test_a_depth_tolerance_drops_what_lies_across_a_gap() -> None:
    """A screen at 1 m before a wall at 3 m: pixels at its edge may round to each other from one to the other."""
    depth = np.full((2, 12, 16), 3.0, np.float32)
    depth[0, :, 5:10] = 1.0
    depth[1, :, 4:9] = 1.0
    camera = np.array([[16.0, 0, 7.5], [0, 16.0, 5.5], [0, 0, 1]])
    pose = np.stack([np.eye(4), np.eye(4)])
    loose = reciprocal_pixels(depth, np.stack([camera, camera]), pose)
    strict = reciprocal_pixels(depth, np.stack([camera, camera]), pose, depth_tolerance=0.1)
    # The cameras are one, so every pixel maps to itself; columns 4 and 9 have another depth in each view.
    assert len(loose.first) == 12 * 16
    assert len(strict.first) == 12 * 14
    assert not np.isin(strict.first % 16, (4, 9)).any()


def draw(
    depth: np.ndarray, cameras: np.ndarray, pose: np.ndarray, *, seed: int = 0, **settings: object
) -> tuple[np.ndarray, np.ndarray]:
    made = torch.Generator().manual_seed(seed)
    return sample_matches(depth, cameras, pose, generator=made, **settings)  # type: ignore[arg-type]


def test_a_sample_is_half_true_and_half_false() -> None:
    depth, cameras, pose = views(0, 1)
    true = reciprocal_pixels(depth, cameras, pose)
    pairs = set(zip(true.first.tolist(), true.second.tolist(), strict=True))
    indices, valid = draw(depth, cameras, pose, matches=100, share=0.5)
    assert (indices.dtype, indices.shape, valid.dtype, valid.shape) == (np.int32, (2, 100), bool, (100,))
    assert valid.sum() == 50
    assert {tuple(pair) for pair in indices[:, valid].T.tolist()} <= pairs
    for view, used in enumerate(true):
        false = indices[view, ~valid]
        assert len(set(false.tolist())) == 50
        assert not np.isin(false, used).any()
    again = draw(depth, cameras, pose, matches=100, share=0.5)
    np.testing.assert_array_equal(again[0], indices)
    other = draw(depth, cameras, pose, seed=1, matches=100, share=0.5)
    assert (other[0] != indices).any()


def test_what_is_short_is_made_up_for() -> None:
    depth, cameras, pose = views(0, 1)
    true, pixels = len(reciprocal_pixels(depth, cameras, pose).first), WIDTH * HEIGHT
    # More false ones than asked for where true ones are short ...
    _, valid = draw(depth, cameras, pose, matches=2 * true + 20, share=0.9)
    assert valid.sum() == true
    # ... more true ones than their share where false ones are ...
    _, valid = draw(depth, cameras, pose, matches=pixels, share=0.01)
    assert valid.sum() == true
    # ... and index 0, invalid, where both are.
    indices, valid = draw(depth, cameras, pose, matches=pixels + 7, share=0.5)
    assert valid.sum() == true
    assert (indices[:, pixels:] == 0).all()
    assert not valid[pixels:].any()
    for view in (0, 1):
        assert sorted(indices[view, :pixels].tolist()) == list(range(pixels))


def test_views_that_share_nothing_have_no_valid_match() -> None:
    depth, cameras, pose = views(0, 0)
    pose[1, :3, :3] = pose[1, :3, :3] @ np.diag([-1.0, 1.0, -1.0])  # turned round
    for case in (depth, np.zeros_like(depth)):
        indices, valid = draw(case, cameras, pose, matches=64, share=0.5)
        assert not valid.any()
        assert all(len(set(view.tolist())) == 64 for view in indices)
