"""UniUGG's encoder: a ViT of RADIO's architecture (Ranzinger et al. 2024), as student and as teacher.

The network is transformers' RADIO, without its input conditioner (pictures come normalised) and without its
LayerScale, which RADIOv2.5 does not have and which that class holds as a factor of 1. There is no final norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import draws
from models.checkpoints import Part
from models.errors import ModelError, WeightsError
from models.spec import ModelSpec

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Normalisation of pictures in [0, 1]: OpenAI CLIP's, which RADIO takes over."""

SMALLEST_VIEWPORT, WIDEST_VIEWPORT, DROPPED_POSITIONS = math.sqrt(0.1), 4 / 3, 0.1
"""Random viewport of the position table: least side as a share of it, greatest aspect, share of samples without one."""


class VitOutput(NamedTuple):
    """Tokens of the last block."""

    tokens: Tensor
    """(B, h, w, C): one a patch."""
    prefix: Tensor
    """(B, class tokens + registers, C)."""
    summary: Tensor
    """(B, k, C): the first k class tokens."""


def normalise(image: Tensor) -> Tensor:
    """Bytes (..., H, W, 3) -> float32 (..., 3, H, W), normalised."""
    pixels = image.float()
    channels = [
        (pixels[..., c] - 255 * mean) / (255 * std) for c, (mean, std) in enumerate(zip(MEAN, STD, strict=True))
    ]
    return torch.stack(channels, dim=-3)


class StudentViT(nn.Module):
    """RADIO's ViT: patches, a position table that is resized to the grid, prefix tokens without positions, blocks.

    Args:
        width, depth, heads: channels, blocks, attention heads.
        patch: pixels of a patch's side.
        max_image: pixels of the side that the position table has one entry a patch for; other sizes interpolate it.
        class_tokens, registers: prefix tokens.
        summaries: how many of the class tokens, from the first on, are the summary.
        mlp_ratio: channels inside an MLP by those outside.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        max_image: int,
        class_tokens: int,
        registers: int,
        summaries: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(f"ViT: width {width} is not divisible by {heads} heads")
        if max_image % patch:
            raise ModelError(f"ViT: max_image={max_image} must be a multiple of patch={patch}")
        if not 1 <= summaries <= class_tokens:
            raise ModelError(f"ViT: summaries={summaries} must be from 1 to class_tokens={class_tokens}")
        self.settings: dict[str, Any] = {
            "width": width, "depth": depth, "heads": heads, "patch": patch, "max_image": max_image,
            "class_tokens": class_tokens, "registers": registers, "summaries": summaries, "mlp_ratio": mlp_ratio,
        }  # fmt: skip
        self.width, self.patch, self.prefix, self.summaries = width, patch, class_tokens + registers, summaries
        radio = _radio(self.settings)
        self.embeddings, self.layers = radio.embeddings, radio.encoder.layer
        for layer in self.layers:
            layer.layer_scale1, layer.layer_scale2 = nn.Identity(), nn.Identity()

    def forward(self, images: Tensor, viewport: Tensor | None = None) -> VitOutput:
        """Normalised images (B, 3, H, W) -> tokens.

        ``viewport`` (B, 5), numbers from [0, 1), chooses a random part of the position table for each image, see
        :func:`random_viewports`; without it every image sees the whole table (RADIO's evaluation).
        """
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ModelError(
                f"image of {height}x{width} pixels: both sides must be multiples of the patch, {self.patch}"
            )
        grid = (height // self.patch, width // self.patch)
        x = self.embeddings(images) if viewport is None else self._embed_viewport(images, viewport, grid)
        for layer in self.layers:
            x = layer(x)
        prefix, tokens = x[:, : self.prefix], x[:, self.prefix :].unflatten(1, grid)
        return VitOutput(tokens=tokens, prefix=prefix, summary=prefix[:, : self.summaries])

    def _embed_viewport(self, images: Tensor, viewport: Tensor, grid: tuple[int, int]) -> Tensor:
        """What ``embeddings`` does, with the positions of a part of the table for each image."""
        patches = self.embeddings.patch_projection(F.unfold(images, self.patch, stride=self.patch).mT)
        side = math.isqrt(self.embeddings.position_embedding.shape[1])
        table = self.embeddings.position_embedding.unflatten(1, (side, side)).movedim(-1, 1)
        where, kept = random_viewports(viewport, grid)
        positions = F.grid_sample(
            table.float().expand(len(images), -1, -1, -1), where, mode="bilinear", align_corners=True
        )
        positions = positions * kept[:, None, None, None]
        prefix = self.embeddings.cls_register_token.expand(len(images), -1, -1)
        return torch.cat([prefix, patches + positions.flatten(2).mT.to(patches.dtype)], dim=1)

    #: Of RADIO's checkpoint: the choice of summary tokens, the normalisation, and adaptors to other feature spaces.
    reference_ignored = ("*summary_idxs", "*input_conditioner.*", "*layer_scale*", "_heads.*", "_feature_projections.*")

    def reference_names(self) -> dict[str, str | Part]:
        """Our tensor name -> RADIOv2.5's; queries, keys and values are parts of one published tensor."""
        fixed = {
            "embeddings.patch_projection.weight": "model.patch_generator.embedder.weight",
            "embeddings.position_embedding": "model.patch_generator.pos_embed",
            "embeddings.cls_register_token": "model.patch_generator.cls_token.token",
        }
        names: dict[str, str | Part] = {}
        for name in self.state_dict():
            if name in fixed:
                names[name] = fixed[name]
                continue
            _, number, rest = name.split(".", 2)
            block, (module, _, kind) = f"model.blocks.{number}", rest.rpartition(".")
            projections = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
            if module in projections:
                names[name] = Part(f"{block}.attn.qkv.{kind}", projections.index(module), 3)
            else:
                names[name] = f"{block}.{'attn.proj' if module == 'attention.o_proj' else module}.{kind}"
        return names

    def adapt_reference(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict under RADIO's names, from what its wrappers or transformers make of them.

        Wrappers add a prefix (``radio_model.``; torch hub ``base_model.``); transformers renames and splits.
        WeightsError for a LayerScale that is not 1, which this network does not have.
        """
        prefixes = (("radio_model.", ""), ("base_model.", "model."))
        renamed: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            for prefix, instead in prefixes:
                if name.startswith(prefix):
                    name = instead + name.removeprefix(prefix)
            if "layer_scale" in name and not tensor.is_meta and not bool((tensor == 1).all()):
                raise WeightsError(f"{name} is not 1: these weights are of a network with LayerScale, not RADIOv2.5")
            renamed[name] = tensor
        return self._join(renamed) if "embeddings.patch_projection.weight" in renamed else renamed

    def _join(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From transformers' names to RADIO's; queries, keys and values become one tensor again."""
        names = {
            re.sub(r"^layers\.", "encoder.layer.", ours): theirs for ours, theirs in self.reference_names().items()
        }
        joined: dict[str, Tensor] = {}
        for name, tensor in state.items():
            theirs = names.get(name, name)
            if isinstance(theirs, str):
                joined[theirs] = tensor
            elif theirs.index == 0:
                parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
                if all(part in state for part in parts):  # otherwise the whole is reported as missing
                    joined[theirs.name] = torch.cat([state[part] for part in parts])
        return joined


def random_viewports(numbers: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """RADIO's augmentation in training: where in the position table the patches of each image look.

    Args:
        numbers: (B, 5) from [0, 1): scale, aspect, two offsets, and whether positions are dropped altogether.
        grid: rows and columns of patches.

    Returns:
        Places (B, rows, columns, 2) as (x, y) in [-1, 1], and a factor (B,) of 0 or 1.
    """
    scale = SMALLEST_VIEWPORT + (1 - SMALLEST_VIEWPORT) * numbers[:, 0]
    aspect = torch.exp((2 * numbers[:, 1] - 1) * math.log(WIDEST_VIEWPORT))
    size = torch.stack([scale * aspect, scale / aspect], dim=-1).clamp(max=1)
    corner = numbers[:, 2:4] * (1 - size)
    rows = torch.linspace(0, 1, grid[0], device=numbers.device)
    columns = torch.linspace(0, 1, grid[1], device=numbers.device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack([x, y], dim=-1) * size[:, None, None] + corner[:, None, None]
    return 2 * places - 1, (numbers[:, 4] >= DROPPED_POSITIONS).to(numbers.dtype)


def viewport_numbers(draw: Tensor, views: int) -> Tensor:
    """Numbers (B * views, 5) for :func:`random_viewports`, from the keys ``draw`` (B,) of the samples."""
    return draws.uniform(draw, (views, 5), "viewport").flatten(0, 1)


def _radio(settings: Mapping[str, Any]) -> Any:
    """RADIO of transformers at random."""
    from transformers import RadioConfig, RadioModel

    config = RadioConfig(
        hidden_size=settings["width"],
        num_hidden_layers=settings["depth"],
        num_attention_heads=settings["heads"],
        mlp_ratio=settings["mlp_ratio"],
        patch_size=settings["patch"],
        max_img_size=settings["max_image"],
        num_cls_tokens=settings["class_tokens"],
        num_registers=settings["registers"],
        summary_idxs=list(range(settings["summaries"])),
    )
    return RadioModel._from_config(config, attn_implementation="sdpa")


#: Architecture by size. Large is RADIOv2.5-L.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 96, "depth": 4, "heads": 3, "patch": 16, "max_image": 256},
    "small": {"width": 768, "depth": 12, "heads": 12, "patch": 16, "max_image": 1024},
    "large": {"width": 1024, "depth": 24, "heads": 16, "patch": 16, "max_image": 2048},
}
SIZES = {name: {**size, "class_tokens": 4, "registers": 4, "summaries": 3} for name, size in SIZES.items()}


def _size(family: str, size: str, doc: str) -> ModelSpec:
    return ModelSpec(name=f"{family}-{size}", build=StudentViT, defaults={**SIZES[size], "mlp_ratio": 4.0}, doc=doc)


_TEACHER = "RADIO's ViT: the teacher of UniUGG's encoder. A part; no recipe trains it by itself."
_STUDENT = "UniUGG's ViT. A part; recipe uniugg_encoder trains it together with the spatial decoder."
RADIO_TINY, RADIO_SMALL, RADIO_LARGE = (_size("radio", size, _TEACHER) for size in SIZES)
VIT_TINY, VIT_SMALL, VIT_LARGE = (_size("uniugg-vit", size, _STUDENT) for size in SIZES)
