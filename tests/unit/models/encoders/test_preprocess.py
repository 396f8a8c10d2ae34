"""One crop for the image and for what lies beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.encoders.preprocess import Preprocessing, crop_box, crop_nearest
from models.errors import ModelError

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 300), st.integers(1, 300))
def test_the_window_is_the_largest_centred_one_of_the_aspect_ratio(H, W, height, width):
    left, top, right, bottom = crop_box((H, W), height, width)
    assert left + right == pytest.approx(W)
    assert top + bottom == pytest.approx(H)
    assert (right - left) * height == pytest.approx((bottom - top) * width)
    assert right - left == pytest.approx(W) or bottom - top == pytest.approx(H)
    assert right - left <= W + 1e-9
    assert bottom - top <= H + 1e-9


def test_a_wide_image_loses_its_sides():
    assert crop_box((120, 160), 112, 112) == (20.0, 0.0, 140.0, 120.0)
    assert crop_box((480, 640), 336, 448) == (0.0, 0.0, 640.0, 480.0)


def test_a_depth_map_of_another_resolution_is_cut_like_the_image():
    """A checkerboard cell lands on the same output pixels whatever the resolution it was drawn in."""
    small = np.kron(np.arange(12).reshape(3, 4), np.ones((20, 20))).astype(np.float32)
    large = np.kron(np.arange(12).reshape(3, 4), np.ones((60, 60))).astype(np.float32)
    np.testing.assert_array_equal(crop_nearest(small, 42, 42), crop_nearest(large, 42, 42))
    image = np.repeat((small * 20).astype(np.uint8)[..., None], 3, axis=2)
    pixels = Preprocessing(height=42, width=42, **PLAIN)(image, {})[0].numpy() * 255 / 20
    agree = np.abs(pixels - crop_nearest(small, 42, 42)) < 0.5
    assert agree.mean() > 0.85  # all but the smoothed borders of the cells


def test_nearest_takes_values_that_are_there_and_flips_with_the_image():
    labels = np.array([[0, 7], [7, 255]], np.int32)
    assert set(np.unique(crop_nearest(labels, 5, 5))) == {0, 7, 255}
    assert crop_nearest(labels, 2, 2, {"flip": True}).tolist() == [[7, 0], [255, 7]]
    assert crop_nearest(labels, 1, 1, {"box": (0.5, 0.5, 1.0, 1.0)}).tolist() == [[255]]


def test_shrinking_is_antialiased():
    """Stripes of one pixel must become grey, not stripes again."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    out = Preprocessing(height=16, width=16, **PLAIN)(stripes, {})
    assert float((out[:, 2:-2, 2:-2] - 0.5).abs().max()) < 0.05


def test_normalisation_and_flip():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2] = (255, 0, 0)
    out = Preprocessing(height=4, width=4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))(image, {})
    assert out.shape == (3, 4, 4)
    assert out.dtype == torch.float32
    assert out[:, 0, 0].tolist() == [1.0, -1.0, 0.0]
    flipped = Preprocessing(height=4, width=4, **PLAIN)(image, {"flip": True})
    assert flipped[0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_the_same_input_gives_the_same_bits():
    image = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    prepare = Preprocessing(height=56, width=84, **PLAIN)
    assert torch.equal(prepare(image, {}), prepare(image.copy(), {}))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"rotate": 3}, "unknown transform parameters"),
        ({"box": (0.5, 0, 0.2, 1)}, "must be fractions"),
        ({"box": (0, 0, 1.5, 1)}, "must be fractions"),
    ],
)
def test_a_transform_that_cannot_be_is_refused(transform, message):
    with pytest.raises(ModelError, match=message):
        Preprocessing(height=4, width=4, **PLAIN)(np.zeros((4, 4, 3), np.uint8), transform)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ModelError, match="uint8"):
        Preprocessing(height=4, width=4, **PLAIN)(image, {})


def test_an_empty_image_is_refused():
    with pytest.raises(ModelError, match="sizes start at 1"):
        crop_box((0, 5), 4, 4)
