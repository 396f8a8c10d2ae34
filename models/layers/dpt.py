"""The DPT head (Ranftl et al. 2021, "Vision Transformers for Dense Prediction", section 3).

Four feature maps of one patch grid become a pyramid (strides 4, 2, 1, 1/2 of the grid), which is fused from the
coarsest level to the finest with residual convolutions, then read out at the size that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError

LEVELS = 4


class DPTTrunk(nn.Module):
    """Four maps (B, h, w, C_i) fused to one (B, width, 8h, 8w), which tails read out.

    Args:
        in_channels: channels of the four maps, shallow layer first.
        level_channels: channels of the four pyramid levels, fine level first.
        width: channels of the fusion.
        crop: how the coarsest level, half a grid rounded up, meets the next: True doubles it and cuts what is too
            much off at the bottom and at the right, as DUSt3R does; False resizes to the size that is needed.
    """

    def __init__(
        self, *, in_channels: Sequence[int], level_channels: Sequence[int], width: int, crop: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("level_channels", level_channels)):
            if len(value) != LEVELS:
                raise ModelError(f"DPT head: {name} needs {LEVELS} numbers, one a level, got {list(value)}")
        self.project = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(in_channels, level_channels, strict=True))
        self.resample = nn.ModuleList(
            (
                nn.ConvTranspose2d(level_channels[0], level_channels[0], 4, stride=4),
                nn.ConvTranspose2d(level_channels[1], level_channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(level_channels[3], level_channels[3], 3, stride=2, padding=1),
            )
        )
        self.reduce = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=False) for c in level_channels)
        # The coarsest level has nothing to be fused with, hence one residual unit less.
        self.fuse = nn.ModuleList(Fusion(width, with_skip=level < LEVELS - 1) for level in range(LEVELS))
        self.crop = crop

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (B, h, w, C_i) -> (B, width, 8h, 8w)."""
        if len(maps) != LEVELS:
            raise ModelError(f"DPT head: needs {LEVELS} feature maps, got {len(maps)}")
        levels = []
        for level, grid in enumerate(maps):
            x = self.project[level](grid.permute(0, 3, 1, 2))
            levels.append(self.reduce[level](self.resample[level](x)))
        height, width = _size(levels[2])
        coarse = (2 * levels[3].shape[-2], 2 * levels[3].shape[-1]) if self.crop else (height, width)
        x = self.fuse[3](levels[3], None, coarse)[..., :height, :width]
        x = self.fuse[2](x, levels[2], _size(levels[1]))
        x = self.fuse[1](x, levels[1], _size(levels[0]))
        return self.fuse[0](x, levels[0], (2 * levels[0].shape[-2], 2 * levels[0].shape[-1]))


class DPTTail(nn.Module):
    """Reads a prediction (B, out_channels, H, W) out of the fused map; ``hidden`` channels before the last layer."""

    def __init__(self, width: int, out_channels: int, hidden: int) -> None:
        super().__init__()
        self.neck = nn.Conv2d(width, width // 2, 3, padding=1)
        self.head = nn.Sequential(
            nn.Conv2d(width // 2, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, out_channels, 1)
        )

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, width, h, w) -> (B, out_channels, *size)."""
        return self.head(F.interpolate(self.neck(x), size=size, mode="bilinear", align_corners=True))


class DPTHead(DPTTrunk):
    """Trunk and one tail: four maps (B, h, w, C_i) -> (B, out_channels, H, W). For the arguments see the two."""

    def __init__(
        self, *, in_channels: Sequence[int], level_channels: Sequence[int], width: int, out_channels: int, hidden: int
    ) -> None:
        super().__init__(in_channels=in_channels, level_channels=level_channels, width=width)
        self.tail = DPTTail(width, out_channels, hidden)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Four maps (B, h, w, C_i) -> (B, out_channels, *size)."""
        return self.tail(super().forward(maps), size)


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each behind a ReLU, around a skip connection (the pre-activation residual unit).

    With ``rectified_skip`` the skip connection carries relu(x), as in networks whose first ReLU works in place.
    """

    def __init__(self, width: int, *, rectified_skip: bool = False) -> None:
        super().__init__()
        self.rectified_skip = rectified_skip
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same shape."""
        active = F.relu(x)
        return (active if self.rectified_skip else x) + self.conv2(F.relu(self.conv1(active)))


class Fusion(nn.Module):
    """Add a finer level to what came from the coarser ones, refine, and upsample to the next level's size."""

    def __init__(self, width: int, *, with_skip: bool) -> None:
        super().__init__()
        self.residual1 = ResidualUnit(width) if with_skip else None
        self.residual2 = ResidualUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """(B, width, h, w), optional level of the same size -> (B, width, *size)."""
        if skip is not None and self.residual1 is not None:
            x = x + self.residual1(skip)
        # The paper upsamples first. A 1x1 convolution and bilinear weights (which sum to 1) commute, and on the
        # small map it costs a quarter.
        return F.interpolate(self.out(self.residual2(x)), size=size, mode="bilinear", align_corners=True)


def _size(x: Tensor) -> tuple[int, int]:
    return (x.shape[-2], x.shape[-1])
