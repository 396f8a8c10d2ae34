"""The vision tower of Qwen2.5-VL with its merger, as a frozen encoder of pictures (Bai et al. 2025, section 2.1).

``tokens`` (1, height/28, width/28, C): merged visual tokens, as the language model takes them in the placeholders'
    places. ``summary`` (1, C): their mean.

A picture is a video of one frame to it, doubled to fill its two. Sizes are multiples of 28: patches of 14, merged two
by two. A request may ask for a size of its own (``size`` beside ``box`` in its transform): pictures of other shapes
then keep theirs, and their records have grids of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.encoders.base import FrozenEncoder, InputKind
from models.encoders.hf import CLIP, architecture_identity, cast_stored, library_versions, random_config
from models.encoders.preprocess import Preprocessing
from models.encoders.weights import (
    RANDOM,
    resolve_folder,
    same_digest,
    seeded,
    stored_digest,
    tensor_digest,
    torch_dtype,
)
from models.errors import ModelError
from models.spa3r.vlm.frames import frame_size
from models.spa3r.vlm.qwen import OLD_VISION, VISION, build_tower, fill_tower, qwen_settings
from models.spec import TensorSpec


class QwenVision(FrozenEncoder):
    """Merged visual tokens. Weights from a folder (a whole Qwen2.5-VL) load at the first :meth:`encode`.

    Args:
        weights: random, a local folder, or a hub name.
        arch: of random weights: keys of ``Qwen2_5_VLVisionConfig``.
        seed: of random weights.
        height: of the input in pixels, where a request does not say.
        width: likewise.
        dtype: compute dtype.
        side: width to which pictures of any shape are brought, of which the part that is multiples of 28 is read
            (:mod:`models.spa3r.vlm.frames`); 0 gives all of them the size above.
    """

    input_kind = InputKind.IMAGE

    def __init__(
        self,
        weights: str,
        *,
        arch: Mapping[str, Any] | None = None,
        seed: int = 0,
        height: int,
        width: int,
        dtype: str = "bfloat16",
        side: int = 0,
    ) -> None:
        super().__init__()
        self.side = side
        self.folder, self.seed = None if weights == RANDOM else resolve_folder(weights), seed
        self.config = _vision_config(weights, arch or {})
        self.unit = int(self.config.patch_size * self.config.spatial_merge_size)
        self.dtype_name, self.dtype = dtype, torch_dtype(dtype)
        mean, std = CLIP
        self.preprocessing = Preprocessing(height=height, width=width, mean=mean, std=std)
        self._check_size(height, width)
        self.model: Any = None
        self._digest = ""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of merged tokens of an input of the configured size."""
        return self.preprocessing.height // self.unit, self.preprocessing.width // self.unit

    def load(self) -> QwenVision:
        """Build the tower now; WeightsError when the folder does not fit, or has changed. Returns self."""
        if self.model is not None:
            return self
        if self.folder is None:
            self.model = seeded(lambda: build_tower(self.config), self.seed)
            self._digest = tensor_digest(self.model.state_dict())
        else:
            self.model = build_tower(self.config)
            fill_tower(self.model, str(self.folder))
            self._digest = same_digest(self._stored(), self._digest, self.folder)
        cast_stored(self.model, self.dtype)
        self.freeze()
        return self

    def _stored(self) -> str:
        """Digest of the tower alone: finetuning the language model leaves its features what they are."""
        assert self.folder is not None
        return stored_digest(self.folder, (VISION, OLD_VISION))

    def identity(self) -> Mapping[str, Any]:  # noqa: D102
        if not self._digest and self.folder is None:
            self.load()
        self._digest = self._digest or self._stored()
        return {
            "kind": "image",
            "model": type(self).__name__,
            "architecture": architecture_identity(self.config),
            "weights": self._digest,
            "dtype": self.dtype_name,
            "attention": "sdpa",
            "preprocessing": self.preprocessing.identity(),
            "libraries": library_versions(),
            "padding": [self.preprocessing.height, self.preprocessing.width],
            **({"side": self.side} if self.side else {}),
            "layout": self.layout_version,
        }

    def outputs(self) -> Mapping[str, TensorSpec]:
        """Shapes for inputs of the configured size."""
        width = self.config.out_hidden_size
        return {
            "tokens": TensorSpec(shape=(1, *self.grid, width), dtype=self.dtype_name),
            "summary": TensorSpec(shape=(1, width), dtype=self.dtype_name),
        }

    def prepare(self, value: np.ndarray, transform: Mapping[str, Any]) -> Tensor:
        """uint8 (H, W, 3) -> normalised float32 (3, height, width).

        ``transform`` as in preprocess.py, and ``size``: [height, width] in the place of the configured one.
        """
        rest = {key: item for key, item in transform.items() if key != "size"}
        if "size" not in transform and self.side and "box" not in transform:
            frame = frame_size(value.shape[0], value.shape[1], side=self.side).visual_transform()
            transform, rest = {**transform, **frame}, {**rest, "box": frame["box"]}
        if "size" not in transform:
            return self.preprocessing(value, rest)
        height, width = (int(side) for side in transform["size"])
        self._check_size(height, width)
        return dataclasses.replace(self.preprocessing, height=height, width=width)(value, rest)

    def encode(self, inputs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Prepared images of one size -> tokens (B, 1, gh, gw, C) and summary (B, 1, C), in the compute dtype."""
        model = self.load().model
        device = next(model.parameters()).device
        pixels = torch.stack(list(inputs)).to(device=device, dtype=self.dtype)
        tokens = self.run(model, pixels)
        return {"tokens": tokens[:, None], "summary": tokens.flatten(1, 2).mean(1, keepdim=True)}

    def run(self, model: Any, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, H, W) -> merged tokens (B, H/28, W/28, C)."""
        patches, grid = tower_input(pixels, self.config)
        merged = model(patches, grid_thw=grid.to(pixels.device)).pooler_output
        rows, columns = pixels.shape[-2] // self.unit, pixels.shape[-1] // self.unit
        return merged.unflatten(0, (len(pixels), rows, columns))

    def flops_per_image(self) -> int:
        """Floating-point operations of one picture's forward pass, from the sizes of its products of matrices."""
        c, p = self.config, self.preprocessing
        tokens, width = (p.height // c.patch_size) * (p.width // c.patch_size), c.hidden_size
        window = min(tokens, (c.window_size // c.patch_size) ** 2)
        full = sum(index < c.depth for index in c.fullatt_block_indexes)
        merged, wide = tokens // c.spatial_merge_size**2, width * c.spatial_merge_size**2
        patches = tokens * c.in_channels * c.temporal_patch_size * c.patch_size**2 * width
        linear = c.depth * tokens * (4 * width * width + 3 * width * c.intermediate_size)
        attention = 2 * tokens * width * (full * tokens + (c.depth - full) * window)
        return 2 * (patches + linear + attention + merged * wide * (wide + c.out_hidden_size))

    def parameter_count(self) -> int:
        """Parameters of the tower, counted on the meta device."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build_tower(self.config).parameters())

    def _check_size(self, height: int, width: int) -> None:
        if min(height, width) < self.unit or height % self.unit or width % self.unit:
            near = [max(1, round(side / self.unit)) * self.unit for side in (height, width)]
            raise ModelError(
                f"encoder input {height}x{width}: Qwen2.5-VL takes positive multiples of {self.unit}, patches of "
                f"{self.config.patch_size} merged {self.config.spatial_merge_size} by {self.config.spatial_merge_size};"
                f" {near[0]}x{near[1]} would do"
            )


def tower_input(pixels: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """What the tower reads of pictures (B, 3, H, W): patches (B * n, 3 * 2 * 14 * 14), and grids (B, 3) on CPU.

    Patches that are merged stand together; each holds its picture twice, as two frames.
    """
    patch, merge, frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    size, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    cut = pixels.reshape(size, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)
    doubled = cut[..., None, :, :].expand(*cut.shape[:6], frames, patch, patch)
    grid = torch.tensor([[1, rows, columns]] * size)
    return doubled.reshape(size * rows * columns, channels * frames * patch * patch), grid


def _vision_config(weights: str, arch: Mapping[str, Any]) -> Any:
    from transformers import Qwen2_5_VLVisionConfig

    if weights == RANDOM:
        return random_config(Qwen2_5_VLVisionConfig, arch)
    if arch:
        raise ModelError(f"encoder arch {dict(arch)} is for weights=random only; {weights!r} has its own")
    values = qwen_settings(weights)["vision_config"]
    return Qwen2_5_VLVisionConfig(**{key: value for key, value in values.items() if key != "model_type"})
