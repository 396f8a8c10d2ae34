"""Probe heads on frozen features: depth (linear, DPT) and semantic segmentation (linear).

The heads share no trainable parameter, so training them together gives each what it would have got alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.layers.dpt import LEVELS, DPTHead


class Standardise(nn.Module):
    """Subtract a mean and divide by a deviation per channel, both measured once on training features.

    It stands where published probes have a BatchNorm or SyncBatchNorm. Measured statistics make the result
    independent of how a batch is split over micro-batches and ranks; the learned scale and shift of a BatchNorm are
    left out, since the linear layer that follows absorbs them.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("deviation", torch.ones(*shape))

    def fit(self, values: Tensor) -> None:
        """Measure on ``values`` (N, *shape). A channel that hardly varies keeps a deviation of 1."""
        values = values.double()
        deviation = values.std(0, correction=0)
        self.mean.copy_(values.mean(0))
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., *shape) of any float dtype -> float32."""
        return (x.float() - self.mean) / self.deviation


class Probe(nn.Module):
    """Three heads on the tokens of a frozen encoder.

    Args:
        channels: channels C of a patch token.
        layers: number of tapped layers L; the linear heads read the last one, the DPT head four spread over all.
        summaries: number k of summary tokens.
        summary_channels: channels of a summary token; 0 for those of a patch token. CLIP's are projected to another
            width.
        classes: semantic classes.
        dpt_levels, dpt_width, dpt_hidden: see :class:`models.layers.dpt.DPTHead`.
    """

    log_depth_offset: Tensor

    def __init__(
        self,
        *,
        channels: int,
        layers: int,
        summaries: int,
        classes: int,
        dpt_levels: Sequence[int],
        dpt_width: int,
        dpt_hidden: int,
        summary_channels: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("layers", layers), ("classes", classes)):
            if value < 1:
                raise ModelError(f"probe: {name} must be at least 1, got {value}")
        self.taps = tap_layers(layers)
        self.token_scale = Standardise(layers, channels)
        summary_channels = summary_channels or channels
        self.summary_scale = Standardise(summaries, summary_channels)
        self.register_buffer("log_depth_offset", torch.zeros(()))
        self.depth_linear = nn.Linear(channels + summaries * summary_channels, 1)
        self.depth_dpt = DPTHead(
            in_channels=[channels] * LEVELS,
            level_channels=dpt_levels,
            width=dpt_width,
            out_channels=1,
            hidden=dpt_hidden,
        )
        self.segmentation = nn.Linear(channels, classes)

    def forward(self, tokens: Tensor, summary: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Predictions at ``size`` (H, W).

        Args:
            tokens: (B, L, h, w, C) patch tokens of the tapped layers, any float dtype.
            summary: (B, k, C') summary tokens.
            size: height and width of the targets.

        Returns:
            ``depth_linear`` and ``depth_dpt``, (B, H, W) natural logarithms of metres, and ``segmentation``,
            (B, classes, H, W) logits; all float32.
        """
        grid = self.token_scale(tokens.movedim(1, 3)).movedim(3, 1)
        last = grid[:, -1]
        context = self.summary_scale(summary).flatten(1)[:, None, None, :].expand(*last.shape[:3], -1)
        linear = self.depth_linear(torch.cat([last, context], dim=-1)).permute(0, 3, 1, 2)
        dense = self.depth_dpt([grid[:, tap] for tap in self.taps], size)
        classes = self.segmentation(last).permute(0, 3, 1, 2)
        return {
            "depth_linear": _resize(linear, size)[:, 0] + self.log_depth_offset,
            "depth_dpt": dense.float()[:, 0] + self.log_depth_offset,
            "segmentation": _resize(classes, size),
        }

    @torch.no_grad()
    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Measure the standardisation, and the mean log depth that the depth heads start from.

        ``batches`` yields (tokens, summary, depth in metres with 0 = unknown) of training samples.
        """
        tokens, summaries, logs = [], [], []
        for token, summary, depth in batches:
            tokens.append(token.float().movedim(1, 3).flatten(0, 2))
            summaries.append(summary.float())
            logs.append(depth[torch.isfinite(depth) & (depth > 0)].double().log())
        if not tokens:
            raise ModelError("probe: no training sample to measure the features on")
        self.token_scale.fit(torch.cat(tokens))
        self.summary_scale.fit(torch.cat(summaries))
        depths = torch.cat(logs)
        if depths.numel():
            self.log_depth_offset.copy_(depths.mean())


def tap_layers(layers: int) -> tuple[int, ...]:
    """Indices of the four tapped layers that feed the DPT levels, spread evenly up to the last one.

    With fewer than four tapped layers some feed two levels.
    """
    return tuple(
        (level + 1) * layers // LEVELS - 1 if layers >= LEVELS else level * layers // LEVELS for level in range(LEVELS)
    )


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x.float(), size=size, mode="bilinear", align_corners=False)
