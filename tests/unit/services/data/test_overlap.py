"""View overlap against cases whose answer is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from services.data import overlap
from tests.unit.services.data import toy_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory):
    room = toy_scene.Room(things=[toy_scene.Thing("screen", 3, 3.7, (3.0, 0.6, 2.4))])
    room.cameras = [
        ((3, 1, 1.5), (3, 5, 1.3)),  # looks at the screen
        ((3.3, 1.1, 1.5), (3, 5, 1.3)),  # nearly the same
        ((3, 1.0, 1.5), (3, -3, 1.3)),  # turned away
        ((3, 4.7, 1.5), (3, 1, 1.3)),  # behind the screen, looks at its back
    ]
    return toy_scene.write(room, tmp_path_factory.mktemp("overlap"))


def test_overlap_of_known_views(scene) -> None:
    matrix = overlap.view_overlap(scene)
    np.testing.assert_allclose(np.diag(matrix), 1.0)
    assert matrix[0, 1] > 0.85
    assert matrix[1, 0] > 0.85
    assert matrix[0, 2] == matrix[2, 0] == 0
    # The screen hides each side from the other: without the occlusion test much of both would count.
    assert matrix[0, 3] < 0.1
    assert matrix[3, 0] < 0.1


def test_a_view_without_pose_or_depth_is_nan(scene) -> None:
    views = list(scene.views)
    views[1] = dataclasses.replace(views[1], depth=None)
    infinite = toy_scene.as_matrix(np.full((4, 4), -np.inf))
    views[2] = dataclasses.replace(views[2], pose=infinite)
    matrix = overlap.view_overlap(dataclasses.replace(scene, views=tuple(views)))
    known = np.isfinite(matrix)
    assert known.sum() == 4
    assert known[0, 3]
    assert known[3, 0]


def test_a_scene_without_depth_has_no_overlap(tmp_path: Path, scene) -> None:
    views = tuple(dataclasses.replace(v, depth=None) for v in scene.views)
    assert np.isnan(overlap.view_overlap(dataclasses.replace(scene, views=views))).all()


def test_thinning_keeps_the_camera_exact() -> None:
    depth = np.arange(48 * 64, dtype=np.float32).reshape(48, 64)
    small, K = overlap.thin_depth(depth, toy_scene.K.matrix(), side=20)
    assert max(small.shape) <= 20
    full = toy_scene.K.matrix()
    for row, column in ((0, 0), (5, 9)):
        source_row, source_column = divmod(int(small[row, column]), 64)
        ray = np.linalg.inv(full) @ [source_column, source_row, 1]
        np.testing.assert_allclose(np.linalg.inv(K) @ [column, row, 1], ray)


def test_views_of_different_size_are_padded_with_unknown(scene) -> None:
    maps = [np.full((6, 8), 2.0), np.full((4, 5), 2.0)]
    K = np.array([[8.0, 0, 3.5], [0, 8, 2.5], [0, 0, 1]])
    small = overlap.stack_depth([0, 1], maps, [K, K], [np.eye(4), np.eye(4)])
    assert small.depth.shape == (2, 6, 8)
    assert int((small.depth[1] > 0).sum()) == 20
    matrix = overlap.pairwise_overlap(small)
    assert matrix[1, 0] == 1.0
    assert matrix[0, 1] < 1.0
