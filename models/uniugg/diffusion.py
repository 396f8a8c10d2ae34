"""The diffusion of UniUGG's unified model (arXiv 2508.11952, section 3.3, Eq. 4): latents of an unseen view, from what
the language model thinks of its rays.

The network is the UNet of Stable Diffusion 1.5; instead of a text encoder, hidden states of the language model enter
its cross-attention through a LayerNorm and a linear layer. It learns the noise in latents of the Spatial-VAE,
normalised by their measured statistics, under Stable Diffusion's schedule (1000 steps, scaled-linear).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import draws as random
from models.encoders.weights import local_folder, read_tensors, resolve_folder
from models.errors import ModelError, WeightsError
from models.spec import Batch
from models.uniugg.objectives import DiffusionObjective
from models.uniugg.vae import sample_posterior

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


class NoisePrediction(NamedTuple):
    """What one micro-batch predicted: all (B, latent channels, 2h, 2w) float32 but the last."""

    predicted: Tensor
    noise: Tensor
    weight: Tensor
    """(B,) of the loss at each sample's timestep."""


def alphas_cumprod(device: torch.device) -> Tensor:
    """The share of signal after each of the 1000 steps, float32 (1000,): the last is 0.00466."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64, device=device).square()
    return (1.0 - betas).cumprod(0).float()


class Conditioning(nn.Module):
    """Hidden states of the language model -> what the UNet attends to; or the learned null, for guidance."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, out)
        self.null = nn.Parameter(torch.randn(out) * 0.02)

    def forward(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """(B, Q, width) and bool (B,) -> (B, Q, out)."""
        projected = self.project(self.norm(condition.to(self.norm.weight.dtype)))
        return torch.where(dropped[:, None, None], self.null.to(projected.dtype), projected)


class ConditionedUNet(nn.Module):
    """Predicts the noise in latents (B, latent_channels, 2h, 2w) of any grid, under a condition (B, Q, width).

    Args:
        width: of the condition, that of the language model.
        latent_channels: of the latents.
        latent_mean: per channel, of the VAE's latents; () for 0.
        latent_scale: one over their deviation.
        unet: settings of diffusers' UNet2DConditionModel, ``cross_attention_dim`` among them.
    """

    latent_mean: Tensor
    latent_scale: Tensor
    network = "unet"
    """Child that its library can load alone, see :mod:`models.pretrained`."""
    unet: Any
    """diffusers' UNet2DConditionModel."""

    def __init__(
        self,
        *,
        width: int,
        latent_channels: int,
        latent_mean: Sequence[float],
        latent_scale: float,
        unet: Mapping[str, Any],
    ) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        mean = tuple(latent_mean) or (0.0,) * latent_channels
        if len(mean) != latent_channels:
            raise ModelError(f"latent_mean has {len(mean)} numbers for {latent_channels} latent channels")
        self.settings: dict[str, Any] = {
            "width": width, "latent_channels": latent_channels, "latent_mean": list(mean),
            "latent_scale": float(latent_scale), "unet": dict(unet),
        }  # fmt: skip
        self.latent_channels = latent_channels
        try:
            self.unet = UNet2DConditionModel(in_channels=latent_channels, out_channels=latent_channels, **unet)
        except (TypeError, ValueError) as error:
            raise ModelError(f"diffusion: {dict(unet)} is no UNet2DConditionModel: {error}") from error
        self.conditioning = Conditioning(width, int(self.unet.config.cross_attention_dim))
        self.register_buffer("latent_mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("latent_scale", torch.tensor(float(latent_scale)))

    def normalise(self, z: Tensor) -> Tensor:
        """Latents of the VAE (B, latent channels, 2h, 2w) -> what the diffusion works in: about unit variance."""
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise ModelError(f"the diffusion learns latents (B, {self.latent_channels}, 2h, 2w), got {tuple(z.shape)}")
        return (z - self.latent_mean[:, None, None]) * self.latent_scale

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        return z / self.latent_scale + self.latent_mean[:, None, None]

    def forward(self, condition: Tensor, batch: Batch, *, objective: DiffusionObjective) -> NoisePrediction:
        """Noise the target's latents of a micro-batch and predict that noise.

        Args:
            condition: (B, Q, width) hidden states at the queries.
            batch: ``mean`` and ``logvar`` (B, latent channels, 2h, 2w) of the target's posterior, and ``draw``.
            objective: see there.
        """
        draw, shape = batch["draw"], tuple(batch["mean"].shape[1:])
        with torch.autocast(condition.device.type, enabled=False):
            clean = self.normalise(_latent(batch, objective.latent))
            noise = random.normal(draw, shape, "noise")
            if objective.offset_noise:
                noise = noise + objective.offset_noise * random.normal(draw, (shape[0], 1, 1), "offset")
            timestep = random.integers(draw, TIMESTEPS, "timestep")
            signal = alphas_cumprod(draw.device)[timestep]
            kept, added = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
            noisy = kept * clean + added * noise
        dropped = random.uniform(draw, (), "condition") < objective.condition_dropout
        predicted = self.denoise(noisy, timestep, condition, dropped)
        return NoisePrediction(predicted, noise, _loss_weight(signal, objective.min_snr))

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Tensor, dropped: Tensor) -> Tensor:
        """The noise, float32 like ``noisy`` (B, latent channels, 2h, 2w), at timesteps (B,) under a condition."""
        states = self.conditioning(condition, dropped)
        return self.unet(noisy.to(self.unet.conv_in.weight.dtype), timestep, states).sample.float()


def _latent(batch: Batch, kind: str) -> Tensor:
    """The target's latent: a sample of the posterior or its mode, float32."""
    mean, logvar = batch["mean"].float(), batch["logvar"].float()
    if kind == "mode":
        return mean
    if kind != "sample":
        raise ModelError(f"latent={kind!r} must be sample or mode")
    return sample_posterior(mean, logvar, random.normal(batch["draw"], tuple(mean.shape[1:]), "posterior"))


def _loss_weight(signal: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight of predicting noise, min(snr, gamma) / snr (Hang et al. 2023, Eq. 5); 1 for gamma 0."""
    if not gamma:
        return torch.ones_like(signal)
    snr = signal / (1 - signal)
    return snr.clamp(max=gamma) / snr


def noise_loss(prediction: NoisePrediction, weight: Tensor) -> Tensor:
    """Weighted sum of squared errors (Eq. 4) over latent elements; samples of weight 0 add nothing."""
    error = (prediction.predicted - prediction.noise).square().flatten(1).sum(1) * prediction.weight
    return torch.where(weight > 0, error * weight, torch.zeros_like(error)).sum()


def counts(batch: Batch) -> float:
    """Weighted number of latent elements."""
    return float(batch["weight"].double().sum()) * batch["mean"][0].numel()


@torch.no_grad()
def sample(
    model: ConditionedUNet,
    condition: Tensor,
    *,
    size: tuple[int, int],
    draw: Tensor,
    steps: int,
    guidance: float,
    eta: float,
    clip: float = 0.0,
) -> Tensor:
    """Draw latents of the VAE, (B, latent channels, *size), by DDIM (Song et al. 2021).

    Args:
        model: in eval mode.
        condition: (B, Q, width) hidden states at the queries.
        size: height and width of the latent, twice those of the grid of tokens.
        draw: (B,) int64 keys of the draws, so that a sample does not depend on the batch it is in.
        steps: of the sampler, spread over the 1000 from the last one on ("trailing", Lin et al. 2024).
        guidance: classifier-free guidance; 1 is none, and costs half.
        eta: 0 is deterministic, 1 draws as DDPM does.
        clip: bound of the clean latent that each step predicts, in its deviations (0: none). Early in training the
            first steps, which divide by the little signal there is, otherwise throw it far out.
    """
    from diffusers import DDIMScheduler

    if not 1 <= steps <= TIMESTEPS:
        raise ModelError(f"generate.steps={steps} must be 1 to {TIMESTEPS}")
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=TIMESTEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear",
        clip_sample=clip > 0, clip_sample_range=clip or 1.0, set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    shape = (model.latent_channels, *size)
    z = random.normal(draw, shape, "generate")
    guided = guidance != 1.0
    dropped = torch.zeros(len(draw), dtype=torch.bool, device=draw.device)
    if guided:
        condition, dropped = torch.cat([condition, condition]), torch.cat([dropped, ~dropped])
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        doubled = torch.cat([z, z]) if guided else z
        times = torch.full((len(doubled),), timestep, device=z.device)
        noise = model.denoise(doubled, times, condition, dropped)
        if guided:
            with_condition, without = noise.chunk(2)
            noise = without + guidance * (with_condition - without)
        extra = random.normal(draw, shape, f"generate {index}") if eta else None
        z = scheduler.step(
            noise, timestep, z, eta=eta, variance_noise=extra, use_clipped_model_output=clip > 0
        ).prev_sample
    return model.denormalise(z)


UNET_FILE = "diffusion_pytorch_model.safetensors"
_UNET = "unet"
"""Folder of the UNet in a whole diffusion model."""


def find_unet(weights: str | Path) -> Path | None:
    """The stored UNet, where it is on this machine: nothing is downloaded.

    ``weights`` is diffusers' folder of a UNet, or of a whole diffusion model (Stable Diffusion), which may be given by
    its hub name.
    """
    folder = local_folder(str(weights))
    places = () if folder is None else (folder / UNET_FILE, folder / _UNET / UNET_FILE)
    return next((place for place in places if place.is_file()), None)


def unet_file(weights: str | Path) -> Path:
    """:func:`find_unet`, fetched where the hub can be reached. WeightsError says what is to be put where."""
    found = find_unet(weights)
    if found is None:
        folder = resolve_folder(str(weights), (f"{_UNET}/config.json", f"{_UNET}/{UNET_FILE}"))
        found = find_unet(folder)
        if found is None:
            raise WeightsError(
                f"{folder} holds neither {UNET_FILE} nor {_UNET}/{UNET_FILE}; give a UNet in diffusers' layout, as "
                "safetensors"
            )
    return found


def load_unet(model: ConditionedUNet, weights: str | Path) -> None:
    """Load the UNet of :func:`unet_file`; WeightsError lists what does not fit."""
    path = unet_file(weights)
    stored, own = read_tensors(path), model.unet.state_dict()
    missing, left = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    wrong = sorted(n for n in own.keys() & stored.keys() if own[n].shape != stored[n].shape)
    if missing or left or wrong:
        raise WeightsError(
            f"{path} does not fit this UNet: missing {missing[:10]}, left over {left[:10]}, of another shape "
            f"{[f'{n}: {tuple(stored[n].shape)} instead of {tuple(own[n].shape)}' for n in wrong[:10]]}"
        )
    model.unet.load_state_dict(stored)
