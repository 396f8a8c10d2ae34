"""Augmentation: what comes out must still be two photographs of the same room."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from configs.schema import AugmentConfig
from services.contracts import Intrinsics
from services.data.augment import Augment, PairViews
from services.data.correspondences import reciprocal_pixels
from services.errors import DataError
from services.streams.cut import cut_camera, cut_picture
from tests.support import analytic

WIDTH, HEIGHT = 192, 144
CAMERA = Intrinsics(
    fx=70.0, fy=71.0, cx=46.3, cy=36.9, width=analytic.WIDTH, height=analytic.HEIGHT
).resized(WIDTH, HEIGHT)  # fmt: skip
SMALL = CAMERA.resized(96, 72)
SIZES = [(48, 64), (64, 64), (60, 40)]


def shots(camera: Intrinsics = CAMERA) -> list[analytic.Shot]:
    rays = analytic.pixel_rays(camera.matrix(), camera.width, camera.height)
    return [analytic.render(pose, rays) for pose in analytic.poses()]


SHOTS, SMALL_SHOTS = shots(), shots(SMALL)


def augmented(
    config: AugmentConfig, size: tuple[int, int] = (48, 64), seed: int = 0, first: int = 0, second: int = 1
) -> PairViews:
    chosen = SHOTS[first], SHOTS[second]
    return Augment(config).pair(
        [shot.color for shot in chosen],
        [shot.depth.astype(np.float32) for shot in chosen],
        [CAMERA, CAMERA],
        np.stack([shot.pose for shot in chosen]),
        torch.Generator().manual_seed(seed),
        size,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_crops_are_photographs_of_the_same_room(size: tuple[int, int], seed: int) -> None:
    made = augmented(AugmentConfig(crops=4, min_crop=0.3), size, seed)
    assert made.images.shape == (2, *size, 3)
    assert (made.images.dtype, made.depths.dtype, made.K.dtype, made.poses.dtype) == (
        np.uint8, np.float32, np.float32, np.float32,
    )  # fmt: skip
    for view, shot in enumerate(SHOTS[:2]):
        # No corner leaves the picture, so every pixel of this room has depth; the principal point is in the middle.
        assert (made.depths[view] > 0).all()
        np.testing.assert_allclose(made.K[view, :2, 2], [(size[1] - 1) / 2, (size[0] - 1) / 2])
        np.testing.assert_allclose(made.poses[view, :3, 3], shot.pose[:3, 3], atol=1e-6)
        turn = made.poses[view, :3, :3]
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-5)
        # The room's own texture at the points that depth, K and pose say are seen: all of them would have to be wrong
        # in the same way to agree. A pixel of the source is 3 cm on the wall; the texture's waves are 60 cm long.
        error = analytic.world_error(made.images[view], made.depths[view], made.K[view], made.poses[view])
        assert error < 6.0
        exact = analytic.render(
            made.poses[view].astype(float), analytic.pixel_rays(made.K[view].astype(float), size[1], size[0])
        )
        assert np.median(np.abs(made.depths[view] - exact.depth) / exact.depth) < 0.01
        assert np.abs(made.images[view].astype(float) - exact.color).mean() < 4.0
    sides = [(made.images[v], made.depths[v], made.K[v].astype(float), made.poses[v].astype(float)) for v in (0, 1)]
    error, compared = analytic.reprojection_error(*sides)
    assert compared > 0.05
    assert error < 8.0


def test_a_wrong_camera_would_be_seen() -> None:
    """The measure of the test above tells a turned camera from one that was not."""
    made = augmented(AugmentConfig(crops=4, min_crop=0.3), seed=2)
    right = analytic.world_error(made.images[0], made.depths[0], made.K[0], made.poses[0])
    wrong = analytic.world_error(made.images[0], made.depths[0], made.K[0], SHOTS[0].pose)
    assert wrong > 3 * right


def test_the_best_of_more_crops_shares_more() -> None:
    def shared(crops: int) -> float:
        counts = []
        for seed in range(12):
            made = augmented(AugmentConfig(crops=crops, min_crop=0.2), seed=seed)
            counts.append(len(reciprocal_pixels(made.depths, made.K, made.poses).first))
        return float(np.mean(counts))

    assert shared(6) > 1.3 * shared(1)


def test_depth_of_another_size_than_the_picture() -> None:
    config, size = AugmentConfig(crops=3, min_crop=0.5), (48, 64)
    arguments = (np.stack([SHOTS[0].pose, SHOTS[1].pose]), torch.Generator().manual_seed(5), size)
    colors = [SHOTS[0].color, SHOTS[1].color]
    depths = [shot.depth.astype(np.float32) for shot in SMALL_SHOTS[:2]]
    made = Augment(config).pair(colors, depths, [CAMERA, CAMERA], *arguments, depth_K=[SMALL, SMALL])
    arguments[1].manual_seed(5)
    implied = Augment(config).pair(colors, depths, [CAMERA, CAMERA], *arguments)
    np.testing.assert_array_equal(made.depths, implied.depths)
    assert analytic.world_error(made.images[1], made.depths[1], made.K[1], made.poses[1]) < 10.0


def test_nothing_asked_for_is_the_centre_crop() -> None:
    size = (64, 48)
    assert not Augment(AugmentConfig()).active
    made = augmented(AugmentConfig(), size)
    for view, shot in enumerate(SHOTS[:2]):
        np.testing.assert_array_equal(made.images[view], cut_picture(shot.color, *size))
        np.testing.assert_allclose(made.K[view], cut_camera(CAMERA, *size))
        np.testing.assert_allclose(made.poses[view], shot.pose, atol=1e-6)
        assert analytic.world_error(made.images[view], made.depths[view], made.K[view], made.poses[view]) < 6.0


def test_the_same_view_twice() -> None:
    made = augmented(AugmentConfig(same_image=1.0))
    np.testing.assert_array_equal(made.images[0], made.images[1])
    np.testing.assert_array_equal(made.poses[0], made.poses[1])
    drawn = [augmented(AugmentConfig(same_image=0.5), seed=seed) for seed in range(40)]
    same = sum(bool((views.poses[0] == views.poses[1]).all()) for views in drawn)
    assert 10 <= same <= 30


def test_the_generator_decides() -> None:
    config = AugmentConfig(crops=4, jitter=[0.5, 0.5, 0.5, 0.1], same_image=0.1)
    one, again, other = augmented(config, seed=3), augmented(config, seed=3), augmented(config, seed=4)
    for name in ("images", "depths", "K", "poses"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert (one.images != other.images).any()


def test_each_view_is_jittered_by_itself() -> None:
    made = augmented(AugmentConfig(same_image=1.0, jitter=[0.5, 0.5, 0.5, 0.1]))
    assert (made.images[0] != made.images[1]).any()


@pytest.mark.parametrize("which", range(4))
def test_jitter_is_what_it_says(which: int) -> None:
    """One entry at a time on a picture of two flat colours, where every operation can be done by hand."""
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[:, :3], picture[:, 3:] = (120, 60, 40), (30, 90, 150)
    jitter = [0.0, 0.0, 0.0, 0.0]
    jitter[which] = (0.5, 0.5, 0.5, 0.1)[which]
    augment = Augment(AugmentConfig(jitter=jitter))
    seen = []
    for seed in range(8):
        made = torch.Generator().manual_seed(seed)
        result = augment.jitter(picture, made)
        made.manual_seed(seed)
        torch.randperm(4, generator=made)
        drawn = jitter[which] * (2 * torch.rand(4, generator=made, dtype=torch.float64)[which].item() - 1)
        for column in (0, 5):
            expected = _by_hand(picture, column, which, drawn)
            np.testing.assert_allclose(result[0, column], np.clip(expected, 0, 255), atol=1.0)
        seen.append(drawn)
    assert min(seen) < 0 < max(seen)


def _by_hand(picture: np.ndarray, column: int, which: int, drawn: float) -> np.ndarray:
    pixel = picture[0, column].astype(float)
    grey = picture.astype(float) @ [0.299, 0.587, 0.114]
    if which == 3:
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        return 255 * np.array(colorsys.hsv_to_rgb((hue + drawn) % 1.0, saturation, value))
    base = (0.0, grey.mean(), grey[0, column])[which]
    return base + (1 + drawn) * (pixel - base)


def test_a_single_picture_keeps_its_shape() -> None:
    picture = SHOTS[0].color
    plain = Augment(AugmentConfig(crops=4)).image(picture, torch.Generator(), (48, 48))
    np.testing.assert_array_equal(plain, cut_picture(picture, 48, 48))
    changed = Augment(AugmentConfig(jitter=[0.5, 0.0, 0.0, 0.0])).image(picture, torch.Generator(), (48, 48))
    assert changed.shape == plain.shape
    assert (changed != plain).any()


def test_a_picture_of_another_size_than_its_camera_is_an_error() -> None:
    wrong = [SHOTS[0].color[:-1], SHOTS[1].color]
    depths = [shot.depth.astype(np.float32) for shot in SHOTS[:2]]
    with pytest.raises(DataError, match="the image is 192x143 but its intrinsics are for 192x144"):
        Augment(AugmentConfig(crops=1)).pair(
            wrong, depths, [CAMERA, CAMERA], np.stack([np.eye(4)] * 2), torch.Generator(), (48, 64)
        )


def test_views_that_share_nothing_still_make_a_pair() -> None:
    made = Augment(AugmentConfig(crops=2)).pair(
        [SHOTS[0].color, SHOTS[1].color],
        [np.zeros((HEIGHT, WIDTH), np.float32)] * 2,
        [CAMERA, CAMERA],
        np.stack([SHOTS[0].pose, SHOTS[1].pose]),
        torch.Generator(),
        (48, 64),
    )
    assert not made.depths.any()
    assert np.isfinite(made.K).all()
