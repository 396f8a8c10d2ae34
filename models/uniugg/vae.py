"""The Spatial-VAE of UniUGG (arXiv 2508.11952, section 3.2 and Table 4): patch tokens to a latent image and back.

A grid of h x w tokens becomes a latent of 2h x 2w pixels with few channels: 64 times fewer numbers at the paper's
1024 channels and 4 latent ones. Nothing depends on the size of the grid. Kernels, heads and depth are ours; the
shapes of every row of the table follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.layers.block import Block
from models.spec import ModelSpec

LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to this, so that their exponential is finite in float32."""


class Posterior(NamedTuple):
    """A normal distribution with independent elements for every latent."""

    mean: Tensor
    """(B, latent channels, 2h, 2w)."""
    logvar: Tensor
    """Like ``mean``: the natural logarithm of the variance."""


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """``mean + exp(logvar / 2) * noise``, all of one shape, in float32."""
    return mean.float() + (0.5 * logvar.float().clamp(*LOGVAR_RANGE)).exp() * noise


def sincos_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Fixed 2-D sine-cosine positions (height * width, channels), half of the channels for rows, half for columns.

    Frequencies fall geometrically from 1 to 1/10000 (Vaswani et al. 2017, in two dimensions as MAE has it).
    """
    quarter = channels // 4
    rates = 10_000.0 ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    angles = [axis.reshape(-1, 1) * rates for axis in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=-1)


class _Mixer(nn.Module):
    """Transformer blocks over the pixels of a map, with fixed positions."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> the same shape."""
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + sincos_positions(height, width, tokens.shape[-1], x.device).to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.transpose(1, 2).unflatten(2, (height, width))


class LatentEncoder(nn.Module):
    """Table 4, encoder: convolution, doubling of the grid, transformer, two parallel convolutions."""

    def __init__(self, channels: int, width: int, depth: int, heads: int, latent_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.mixer = _Mixer(width, depth, heads)
        self.mean = nn.Conv2d(width, latent_channels, 3, padding=1)
        self.logvar = nn.Conv2d(width, latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Posterior:
        """(B, channels, h, w) -> posterior of (B, latent channels, 2h, 2w)."""
        x = F.silu(self.conv_in(x))
        x = F.silu(self.up(x))
        x = self.mixer(F.silu(self.conv(x)))
        return Posterior(self.mean(x), self.logvar(x).clamp(*LOGVAR_RANGE))


class LatentDecoder(nn.Module):
    """Table 4, decoder: convolution, transformer, halving of the grid, convolution to the token's channels."""

    def __init__(self, channels: int, width: int, depth: int, heads: int, latent_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.mixer = _Mixer(width, depth, heads)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.conv_out = nn.Conv2d(2 * width, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent channels, 2h, 2w) -> (B, channels, h, w)."""
        x = self.mixer(self.conv_in(z))
        x = F.silu(self.conv(x))
        x = F.silu(self.down(x))
        return self.conv_out(x)


class SpatialVae(nn.Module):
    """Patch tokens (B, h, w, channels) to a latent (B, latent_channels, 2h, 2w) and back.

    Tokens are normalised per channel before the first layer, and that is undone after the last: tokens of a ViT are
    far from unit variance, and the balance of reconstruction and KL depends on it. The latent's own statistics are
    stored too, for the diffusion that learns it: it sees ``(z - latent_mean) * latent_scale``.

    Args:
        channels: of a token.
        width: channels of the transformer; the convolutions beside it have twice as many.
        depth: transformer blocks of the encoder, and of the decoder.
        heads: attention heads.
        latent_channels: of the latent.
    """

    token_mean: Tensor
    token_std: Tensor
    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(self, *, channels: int, width: int, depth: int, heads: int, latent_channels: int) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ModelError(f"spatial VAE: width={width} must be divisible by 4 and by heads={heads}")
        self.settings: dict[str, Any] = {
            "channels": channels, "width": width, "depth": depth, "heads": heads, "latent_channels": latent_channels,
        }  # fmt: skip
        self.channels, self.latent_channels = channels, latent_channels
        self.encoder = LatentEncoder(channels, width, depth, heads, latent_channels)
        self.decoder = LatentDecoder(channels, width, depth, heads, latent_channels)
        self.register_buffer("token_mean", torch.zeros(channels))
        self.register_buffer("token_std", torch.ones(channels))
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_scale", torch.ones(()))

    def normalise(self, tokens: Tensor) -> Tensor:
        """Tokens (..., channels) with the measured mean and deviation taken out, float32."""
        return (tokens.float() - self.token_mean) / self.token_std

    def encode(self, tokens: Tensor) -> Posterior:
        """Tokens (B, h, w, channels) -> float32 mean and log-variance (B, latent_channels, 2h, 2w)."""
        if tokens.ndim != 4 or tokens.shape[-1] != self.channels:
            raise ModelError(
                f"the spatial VAE takes tokens (B, h, w, {self.channels}), got {tuple(tokens.shape)}: it was built, or "
                "trained, for another encoder"
            )
        mean, logvar = self.encoder(self.normalise(tokens).permute(0, 3, 1, 2))
        return Posterior(mean.float(), logvar.float())

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, latent_channels, 2h, 2w) -> float32 tokens (B, h, w, channels)."""
        if z.ndim != 4 or z.shape[1] != self.latent_channels or z.shape[2] % 2 or z.shape[3] % 2:
            raise ModelError(
                f"the spatial VAE decodes latents (B, {self.latent_channels}, 2h, 2w), got {tuple(z.shape)}; they must "
                "come from the VAE (or a diffusion trained on the latents) of these weights"
            )
        tokens = self.decoder(z).permute(0, 2, 3, 1).float()
        return tokens * self.token_std + self.token_mean

    def forward(self, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """Tokens (B, h, w, channels) and normal numbers (B, latent_channels, 2h, 2w) -> reconstruction, posterior."""
        posterior = self.encode(tokens)
        return self.decode(sample_posterior(*posterior, noise)), posterior

    @torch.no_grad()
    def calibrate_tokens(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and deviation per channel on tokens (..., channels), before training.

        A channel that hardly varies keeps a deviation of 1. ModelError when there is nothing to measure.
        """
        moments = _Moments(self.channels)
        for tokens in batches:
            moments.add(tokens.reshape(-1, self.channels))
        mean, variance = moments.result("tokens")
        deviation = variance.sqrt()
        self.token_mean.copy_(mean)
        self.token_std.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    @torch.no_grad()
    def calibrate_latents(self, batches: Iterable[Tensor]) -> None:
        """Measure the latents of tokens (B, h, w, channels), after training.

        The variance of a posterior sample is that of the means plus the mean of the variances: exact, without a
        draw. One scale serves all channels (as in Stable Diffusion), so that their proportions stay.
        """
        moments, within, count = _Moments(self.latent_channels), torch.zeros((), dtype=torch.float64), 0
        for tokens in batches:
            mean, logvar = self.encode(tokens.to(self.token_mean.device))
            moments.add(mean.transpose(0, 1).flatten(1).T)
            within += logvar.double().exp().sum().cpu()
            count += logvar.numel()
        mean, between = moments.result("latents")
        variance = between.mean() + within / count
        self.latent_mean.copy_(mean)
        self.latent_scale.copy_(variance.clamp_min(1e-12).rsqrt())


class _Moments:
    """Mean and variance of rows that arrive in batches, in float64."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._square = torch.zeros(channels, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Rows (N, channels). Merges by the update of Chan et al. (1979), which does not cancel digits."""
        rows = rows.detach().double().cpu()
        if not len(rows):
            return
        mean, total = rows.mean(0), self._count + len(rows)
        apart = mean - self._mean
        self._square += (rows - mean).square().sum(0) + apart.square() * (self._count * len(rows) / total)
        self._mean += apart * (len(rows) / total)
        self._count = total

    def result(self, what: str) -> tuple[Tensor, Tensor]:
        """Mean and variance (channels,). ModelError when no row arrived."""
        if not self._count:
            raise ModelError(f"spatial VAE: there are no {what} to measure the statistics on")
        return self._mean, self._square / self._count


_DOC = "UniUGG's Spatial-VAE: tokens <-> latent image. A part; recipe uniugg_vae trains it with the spatial decoder."


def _size(name: str, **defaults: object) -> ModelSpec:
    build: Callable[..., nn.Module] = SpatialVae
    return ModelSpec(name=name, build=build, defaults=defaults, doc=_DOC)


# channels follow from the encoder of a run; what stands here is the encoder that the size is meant for.
SPATIAL_VAE_BASE = _size("spatial-vae-base", channels=1024, width=128, depth=4, heads=4, latent_channels=4)
SPATIAL_VAE_SMALL = _size("spatial-vae-small", channels=768, width=128, depth=4, heads=4, latent_channels=4)
SPATIAL_VAE_TINY = _size("spatial-vae-tiny", channels=96, width=64, depth=2, heads=4, latent_channels=4)
