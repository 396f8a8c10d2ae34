"""From an image file's pixels to an encoder's input, and the same crop for what lies beside the image.

The rule is "resize the short side, then crop the centre", done as one resampling: the largest centred window with
the aspect ratio of the input is scaled to the input's size. The window is a box in continuous pixel coordinates of
the source (corner of the first pixel at 0), so that a depth or label map of another resolution but the same field
of view is cut exactly alike: scale the box by the ratio of the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from models.errors import ModelError

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in continuous pixels of the source; right and bottom are exclusive edges."""

TRANSFORM_KEYS = ("box", "flip")
"""Per-sample parameters: ``box`` (left, top, right, bottom) as fractions of the image, ``flip`` left to right."""


def crop_box(image_size: Sequence[int], height: int, width: int) -> Box:
    """The largest centred window of an image of ``image_size`` = (H, W) with the aspect ratio height : width.

    Resizing this window to (height, width) equals resizing the short side and cropping the centre. Returns
    (left, top, right, bottom) in continuous source pixels; it is exact for every size, nothing is rounded.
    """
    image_height, image_width = int(image_size[0]), int(image_size[1])
    if min(image_height, image_width, height, width) < 1:
        raise ModelError(f"an image of {tuple(image_size)} cannot be cropped to {height}x{width}: sizes start at 1")
    # Compare the two aspect ratios as integers, so that equal ratios give the whole image without rounding.
    if image_width * height >= image_height * width:
        crop_height, crop_width = float(image_height), image_height * width / height
    else:
        crop_height, crop_width = image_width * height / width, float(image_width)
    left = (image_width - crop_width) / 2
    top = (image_height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def transformed_box(image_size: Sequence[int], height: int, width: int, transform: Mapping[str, Any]) -> Box:
    """The window that :func:`prepare_image` reads under ``transform``. ModelError for an unknown parameter."""
    unknown = sorted(set(transform) - set(TRANSFORM_KEYS))
    if unknown:
        raise ModelError(f"unknown transform parameters {unknown}; an image encoder knows {list(TRANSFORM_KEYS)}")
    if "box" not in transform:
        return crop_box(image_size, height, width)
    left, top, right, bottom = (float(x) for x in transform["box"])
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ModelError(f"transform box {transform['box']} must be fractions 0 <= left < right <= 1, likewise down")
    H, W = int(image_size[0]), int(image_size[1])
    return left * W, top * H, right * W, bottom * H


def crop_nearest(array: np.ndarray, height: int, width: int, transform: Mapping[str, Any] | None = None) -> np.ndarray:
    """Depth, labels or ids (H, W, ...) -> (height, width, ...) with the window of the image, nearest pixel.

    Every output pixel takes the source pixel that holds its centre: no value is ever mixed with another, which for
    ids would be a new object and for depth a surface in mid-air. Use the ``transform`` of the image's request.
    """
    left, top, right, bottom = transformed_box(array.shape[:2], height, width, transform or {})
    rows = np.floor(top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(np.int64)
    columns = np.floor(left + (np.arange(width) + 0.5) * (right - left) / width).astype(np.int64)
    out = array[np.clip(rows, 0, array.shape[0] - 1)][:, np.clip(columns, 0, array.shape[1] - 1)]
    return out[:, ::-1].copy() if transform and transform.get("flip") else out


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Input size and normalisation of an image encoder."""

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    window: tuple[int, int] | None = None
    """(height, width) of the shape whose largest central window is read and stretched; None: that of the input."""

    def identity(self) -> dict[str, Any]:
        """All of it as JSON, with the version of the library that resamples."""
        return {
            "height": self.height,
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": "short side, centre crop, one pass",
            "filter": "bicubic, antialiased",
            "pillow": PIL.__version__,
            **({"window": list(self.window)} if self.window else {}),
        }

    def __call__(self, image: np.ndarray, transform: Mapping[str, Any]) -> Tensor:
        """uint8 (H, W, 3) -> normalised float32 (3, height, width)."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ModelError(f"an image is uint8 (H, W, 3), got {image.dtype} {image.shape}")
        height, width = self.window or (self.height, self.width)
        box = transformed_box(image.shape[:2], height, width, transform)
        # Pillow widens the filter when it shrinks (antialiasing) and reads beyond the box, as cropping after does.
        resized = Image.fromarray(image).resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)
        if transform.get("flip"):
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div_(255.0)
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return pixels.sub_(mean).div_(std).contiguous()
