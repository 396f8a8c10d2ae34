"""VGGT's dense heads: a DPT (Ranftl et al. 2021) with position embeddings, to depth or points with a confidence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.vggt.blocks import Grid, exactly
from models.errors import ModelError
from models.layers.dpt import LEVELS, ResidualUnit

UV_BASE, UV_SCALE = 100.0, 0.1
HIDDEN = 32


class Refine(nn.Module):
    """Add a finer level to what came from the coarser ones, refine, and upsample to the next level's size.

    What :class:`models.layers.dpt.Fusion` does, with the published names and the rectified skips of VGGT.
    """

    def __init__(self, width: int, *, with_skip: bool) -> None:
        super().__init__()
        self.resConfUnit1 = ResidualUnit(width, rectified_skip=True) if with_skip else None
        self.resConfUnit2 = ResidualUnit(width, rectified_skip=True)
        self.out_conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        """(B, width, h, w), optional level of the same size -> (B, width, *size)."""
        if skip is not None and self.resConfUnit1 is not None:
            x = x + self.resConfUnit1(skip)
        # The 1x1 convolution and the upsampling commute; on the small map it costs a quarter.
        x = self.out_conv(self.resConfUnit2(x))
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class Scratch(nn.Module):
    """The four levels brought to one width, fused from coarse to fine, and the convolutions that read them out."""

    def __init__(self, levels: Sequence[int], width: int, channels: int) -> None:
        super().__init__()
        for number, level in enumerate(levels, 1):
            self.add_module(f"layer{number}_rn", nn.Conv2d(level, width, 3, padding=1, bias=False))
        for number in range(1, LEVELS + 1):
            self.add_module(f"refinenet{number}", Refine(width, with_skip=number < LEVELS))
        self.output_conv1 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(width // 2, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, channels, 1)
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Four levels, fine one first -> (B, width / 2, 2 H, 2 W) of the finest one's (H, W)."""
        reduced = [self.get_submodule(f"layer{number}_rn")(level) for number, level in enumerate(levels, 1)]
        sizes = [level.shape[-2:] for level in reduced]
        x = self.get_submodule("refinenet4")(reduced[3], None, sizes[2])
        x = self.get_submodule("refinenet3")(x, reduced[2], sizes[1])
        x = self.get_submodule("refinenet2")(x, reduced[1], sizes[0])
        x = self.get_submodule("refinenet1")(x, reduced[0], [2 * side for side in sizes[0]])
        return self.output_conv1(x)


class DenseHead(nn.Module):
    """Four outputs of the aggregator to a map of every view: ``depth`` (1 channel) or ``points`` (3), and confidence.

    Everything is float32. Views go through a few at a time, which bounds the memory.

    Args:
        width: channels of an output of the aggregator.
        kind: ``depth``: exp of what is read; ``points``: sign(v) (exp|v| - 1). Confidences are 1 + exp.
        levels: channels of the four pyramid levels, fine one first.
        features: channels of the fusion.
        patch: pixels of a patch's side.
    """

    def __init__(self, width: int, *, kind: str, levels: Sequence[int], features: int, patch: int) -> None:
        super().__init__()
        if kind not in ("depth", "points"):
            raise ModelError(f"VGGT: a dense head is for depth or points, got {kind!r}")
        if len(levels) != LEVELS or any(channels % 4 for channels in (*levels, features // 2)):
            raise ModelError(
                f"VGGT: a dense head needs {LEVELS} levels and half of `features`, all multiples of 4 for the position "
                f"embedding; got {list(levels)} and {features}"
            )
        self.kind, self.patch = kind, patch
        self.norm = nn.LayerNorm(width)
        self.projects = nn.ModuleList(nn.Conv2d(width, level, 1) for level in levels)
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
                nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
            )
        )
        self.scratch = Scratch(levels, features, 2 if kind == "depth" else 4)

    def forward(self, outputs: Sequence[Tensor], grid: Grid, *, chunk: int = 8) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, V, h * w, width) of the four layers -> values (B, V, H, W, c) and confidences (B, V, H, W).

        ``chunk`` is how many views go through at a time; 0 takes all at once.
        """
        batch, views = outputs[0].shape[:2]
        flat = [output.flatten(0, 1) for output in outputs]
        with exactly(flat[0]):
            parts = [
                self._read([output[start : start + (chunk or len(output))] for output in flat], grid)
                for start in range(0, batch * views, chunk or batch * views)
            ]
        raw = torch.cat(parts).unflatten(0, (batch, views)).permute(0, 1, 3, 4, 2)
        values, confidence = raw[..., :-1], 1 + raw[..., -1].exp()
        if self.kind == "depth":
            return values.exp(), confidence
        return values.sign() * torch.expm1(values.abs()), confidence

    def _read(self, outputs: Sequence[Tensor], grid: Grid) -> Tensor:
        """(N, h * w, width) of the four layers -> (N, channels, H, W)."""
        size = (grid[0] * self.patch, grid[1] * self.patch)
        levels = []
        for output, project, resize in zip(outputs, self.projects, self.resize_layers, strict=True):
            x = self.norm(output.float()).unflatten(1, grid).permute(0, 3, 1, 2)
            levels.append(resize(add_uv(project(x), size)))
        x = F.interpolate(self.scratch(levels), size=size, mode="bilinear", align_corners=True)
        return self.scratch.output_conv2(add_uv(x, size))


def add_uv(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Add a sinusoidal embedding of where each cell of ``x`` (B, C, h, w) lies in a picture of ``size`` (H, W).

    The picture spans a rectangle of its own aspect whose half diagonal is 1. The first half of the channels holds
    sines, then cosines, of the column's coordinate, the second half those of the row's.
    """
    height, width = size
    diagonal = (height**2 + width**2) ** 0.5
    half = x.shape[1] // 2
    across = _waves(x.shape[-1], width / diagonal, half, x)[:, None, :]
    down = _waves(x.shape[-2], height / diagonal, half, x)[:, :, None]
    return torch.cat([x[:, :half] + across, x[:, half:] + down], dim=1)


def _waves(cells: int, span: float, channels: int, like: Tensor) -> Tensor:
    """(channels, cells): sines, then cosines, of coordinates from -span to span at the cells' centres."""
    edge = span * (cells - 1) / cells
    centres = torch.linspace(-edge, edge, cells, dtype=torch.float64, device=like.device)
    exponent = torch.arange(channels // 2, dtype=torch.float64, device=like.device) / (channels / 2)
    angle = UV_BASE ** -exponent[:, None] * centres
    return (torch.cat([angle.sin(), angle.cos()]) * UV_SCALE).to(like.dtype)
