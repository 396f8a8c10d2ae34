"""One window of a view for all that is known of it: the picture, its camera, depth and label maps of other sizes.

The window is that of the encoders' preprocessing (:func:`models.encoders.preprocess.crop_box`), so that what a model
is to predict lies pixel for pixel on what an encoder saw.
"""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
from PIL import Image

from models.encoders.preprocess import crop_box
from services.contracts import Intrinsics, View
from services.data.images import image_size

Window = tuple[float, float, float, float]
"""(left, top, right, bottom) in continuous pixels: the corner of the first pixel is at 0."""


def sample_nearest(array: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    """The pixels of ``array`` (H, W) that hold the centres of a (height, width) grid over ``window``.

    Centres outside the array give 0. No value is ever mixed with another: that would be a new class, or a surface
    in mid-air.
    """
    left, top, right, bottom = window
    rows = np.floor(top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(np.int64)
    columns = np.floor(left + (np.arange(width) + 0.5) * (right - left) / width).astype(np.int64)
    out = array[np.clip(rows, 0, array.shape[0] - 1)][:, np.clip(columns, 0, array.shape[1] - 1)]
    out[(rows < 0) | (rows >= array.shape[0])] = 0
    out[:, (columns < 0) | (columns >= array.shape[1])] = 0
    return np.ascontiguousarray(out)


def depth_window(window: Window, image: Intrinsics | None, depth: Intrinsics, size: tuple[int, int]) -> Window:
    """The window of an image, seen in the depth map that was taken from the same place.

    ``size`` is (H, W) of the image. Where the depth camera is the image camera at another size (or the image has
    no camera), positions scale with the size; otherwise they go through the rays of both cameras.
    """
    height, width = size
    left, top, right, bottom = window
    scaled = image.resized(depth.width, depth.height) if image else depth
    if all(abs(a - b) < 1e-2 for a, b in zip(astuple(scaled)[:4], astuple(depth)[:4], strict=True)):
        x, y = depth.width / width, depth.height / height
        return left * x, top * y, right * x, bottom * y
    assert image is not None, "without a camera of the image the two cameras were taken to be one"
    # Intrinsics have pixel centres at integers, the window has corners there: hence the half pixels.
    x, y = depth.fx / image.fx, depth.fy / image.fy
    x0, y0 = depth.cx + 0.5 - (image.cx + 0.5) * x, depth.cy + 0.5 - (image.cy + 0.5) * y
    return left * x + x0, top * y + y0, right * x + x0, bottom * y + y0


def picture_size(view: View) -> tuple[int, int]:
    """(height, width) of the view's picture: its camera's, or what its file says."""
    if view.K is not None:
        return view.K.height, view.K.width
    width, height = image_size(view.image)
    return height, width


def cut_picture(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (height, width, 3): the pixels that an encoder of that input size sees (bicubic)."""
    window = crop_box(picture.shape[:2], height, width)
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box=window)
    return np.asarray(resized)


def cut_camera(K: Intrinsics, height: int, width: int) -> np.ndarray:
    """K (3, 3) float32 of the cut and resized picture, pixel centres at integers.

    Positions are continuous with the corner of the first pixel at 0 in the window, hence the half pixels.
    """
    left, top, right, bottom = crop_box((K.height, K.width), height, width)
    x, y = width / (right - left), height / (bottom - top)
    matrix = K.matrix()
    matrix[0, 0], matrix[0, 2] = K.fx * x, (K.cx + 0.5 - left) * x - 0.5
    matrix[1, 1], matrix[1, 2] = K.fy * y, (K.cy + 0.5 - top) * y - 0.5
    return matrix.astype(np.float32)
