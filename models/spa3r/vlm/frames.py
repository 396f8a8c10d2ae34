"""The size at which frames of a video are read, as the published model was trained (supplement of arXiv 2602.21186,
and its released code).

A frame is made ``SIDE`` pixels wide and keeps its shape up to a multiple of the patch; of a portrait the middle is
kept. The geometry encoder sees all of it, the vision tower its upper left part with both sides multiples of 28.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from models.errors import InputError, ModelError

SIDE, PATCH, MERGED = 518, 14, 28

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of the picture."""


@dataclass(frozen=True, kw_only=True)
class FrameSize:
    """How one frame is cut, for both encoders; boxes as the ``transform`` of a request takes them."""

    resized: tuple[int, int]
    """(height, width) before anything is cut off."""
    geometry: tuple[int, int]
    """(height, width) that the geometry encoder sees."""
    geometry_box: Box
    visual: tuple[int, int]
    """(height, width) that the vision tower sees."""
    visual_box: Box

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of merged visual tokens."""
        return self.visual[0] // MERGED, self.visual[1] // MERGED

    @property
    def visual_tokens(self) -> int:
        """Placeholders of this frame."""
        return self.grid[0] * self.grid[1]

    def visual_transform(self) -> dict[str, Any]:
        """``transform`` of a request to the vision tower (family qwen2_5_vl)."""
        return {"box": list(self.visual_box), "size": list(self.visual)}


def frame_size(height: int, width: int, *, side: int = SIDE) -> FrameSize:
    """The sizes for a frame of ``height`` x ``width`` pixels. InputError for one too flat to have a row of tokens.

    ``side`` is the width that it gets, a multiple of 14.
    """
    if side % PATCH or min(height, width) < 1:
        raise ModelError(f"a frame of {height}x{width} at side {side}: sizes begin at 1, side is a multiple of {PATCH}")
    tall = round(height * side / width / PATCH) * PATCH
    if tall < MERGED or side < MERGED:
        raise InputError(
            f"a frame of {height}x{width} pixels would be {tall}x{side}, which has no row of {MERGED} pixels; "
            f"the widest frame at side {side} is {side / MERGED:.0f} times as wide as high"
        )
    rows = min(tall, side)
    top = (tall - rows) // 2
    visual = (rows // MERGED * MERGED, side // MERGED * MERGED)
    return FrameSize(
        resized=(tall, side),
        geometry=(rows, side),
        geometry_box=(0.0, top / tall, 1.0, (top + rows) / tall),
        visual=visual,
        visual_box=(0.0, top / tall, visual[1] / side, (top + visual[0]) / tall),
    )


def cut_frame(image: np.ndarray, *, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3) -> what the geometry encoder and what the vision tower see of it, uint8, bicubic."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ModelError(f"a frame is uint8 (H, W, 3), got {image.dtype} {image.shape}")
    size = frame_size(image.shape[0], image.shape[1], side=side)
    tall, wide = size.resized
    resized = np.asarray(Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC))
    top = (tall - size.geometry[0]) // 2
    geometry = resized[top : top + size.geometry[0]]
    return geometry, geometry[: size.visual[0], : size.visual[1]]
