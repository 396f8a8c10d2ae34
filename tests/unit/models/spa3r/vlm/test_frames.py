"""Frame sizes against the published numbers, and pixels against plain resizing and cutting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.encoders.preprocess import Preprocessing
from models.errors import ModelError
from models.spa3r.vlm.frames import cut_frame, frame_size

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("picture", "geometry", "visual", "tokens"),
    [
        ((968, 1296), (392, 518), (392, 504), 252),
        ((480, 640), (392, 518), (392, 504), 252),
        ((1080, 1920), (294, 518), (280, 504), 180),
        ((1920, 1440), (518, 518), (504, 504), 324),
        ((1920, 1080), (518, 518), (504, 504), 324),
    ],
)
def test_published_sizes(
    picture: tuple[int, int], geometry: tuple[int, int], visual: tuple[int, int], tokens: int
) -> None:
    size = frame_size(*picture)
    assert (size.geometry, size.visual, size.visual_tokens) == (geometry, visual, tokens)
    assert size.grid == (visual[0] // 28, visual[1] // 28)


@given(st.integers(60, 3000), st.integers(60, 3000))
def test_every_size_fits_its_patches(height: int, width: int) -> None:
    if height * 518 < 28 * width:
        return
    size = frame_size(height, width)
    assert size.geometry[1] == 518
    assert size.geometry[0] % 14 == 0
    assert 28 <= size.geometry[0] <= 518
    assert all(0 <= whole - part < 28 for whole, part in zip(size.geometry, size.visual, strict=True))
    for box in (size.geometry_box, size.visual_box):
        assert 0 <= box[0] < box[2] <= 1
        assert 0 <= box[1] < box[3] <= 1


@pytest.mark.parametrize("picture", [(300, 400), (400, 300)])
def test_pixels_are_those_of_resizing_then_cutting(picture: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*picture, 3), dtype=np.uint8)
    geometry, visual = cut_frame(image)
    tall = round(picture[0] * 518 / picture[1] / 14) * 14
    whole = np.asarray(Image.fromarray(image).resize((518, tall), Image.Resampling.BICUBIC))
    top = max(0, (tall - 518) // 2)
    assert np.array_equal(geometry, whole[top : top + min(tall, 518)])
    assert np.array_equal(visual, geometry[: visual.shape[0], :504])
    size = frame_size(*picture)
    for (height, width), box, expected in (
        (size.geometry, size.geometry_box, geometry),
        (size.visual, size.visual_box, visual),
    ):
        seen = Preprocessing(height=height, width=width, mean=ZERO, std=ONE)(image, {"box": list(box)})
        levels = np.abs(seen.permute(1, 2, 0).numpy() * 255 - expected)
        # Pillow rounds between its two passes, so that a level or two is lost here and there.
        assert levels.max() < 2.5
        assert levels.mean() < 0.05
    assert size.visual_transform() == {"box": list(size.visual_box), "size": list(size.visual)}


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ModelError, match="a frame of 10x1000 pixels would be 0x518"):
        frame_size(10, 1000)
    with pytest.raises(ModelError, match="side is a multiple of 14"):
        frame_size(10, 10, side=500)
    with pytest.raises(ModelError, match=r"a frame is uint8 \(H, W, 3\), got float64"):
        cut_frame(np.zeros((4, 4, 3)))
