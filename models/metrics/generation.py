"""Generated views against true ones: PSNR, SSIM, LPIPS and coverage a picture; FID, KID and FD-DINOv2 over all.

The networks behind the scores (:class:`Judges`) stand apart from the sums (:class:`GenerationMetrics`), which cross
processes. A score whose weights are not given is not reported; nothing stands in for it under its name: without the
Inception file of FID there is neither FID nor KID, and the Fréchet distance of DINOv2 features is FD-DINOv2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.metrics.distances import FrechetDistance, KernelDistance
from models.metrics.images import psnr, ssim
from models.metrics.inception import FidInception, load_inception
from models.metrics.means import Means
from models.metrics.perceptual import Lpips, load_lpips

DINOV2_SIDE = 224


class Dinov2Features:
    """Normalised class tokens of a DINOv2 network in float32: the features of FD-DINOv2 (Stein et al. 2023).

    Pictures are resized to 224 x 224 by a bicubic filter with antialiasing and normalised as the network's folder
    says. The paper takes ViT-L/14: scores of another size compare among themselves only, so say which it was.
    """

    def __init__(self, folder: str | Path, *, device: torch.device | str = "cpu") -> None:
        from models.encoders.hf import load_encoder

        encoder = load_encoder("dinov2", str(folder), height=DINOV2_SIDE, width=DINOV2_SIDE, dtype="float32")
        self.encoder = encoder.load().to(device)

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, D) float32."""
        arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
        return self.encoder([self.encoder.prepare(array, {}) for array in arrays])["summary"][:, 0]


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Networks that scores need; None leaves the scores out."""

    lpips: Lpips | None = None
    inception: FidInception | None = None
    dinov2: Dinov2Features | None = None

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of the scores over networks that will be reported."""
        names = {"lpips": self.lpips, "fid": self.inception, "kid": self.inception, "fd_dinov2": self.dinov2}
        return tuple(name for name, network in names.items() if network is not None)


def load_judges(
    *,
    lpips_weights: str = "",
    inception_weights: str = "",
    dinov2_weights: str = "",
    device: torch.device | str = "cpu",
) -> Judges:
    """Networks from paths; "" leaves one out. WeightsError when a path that is given does not hold its weights."""
    return Judges(
        lpips=load_lpips(lpips_weights).to(device) if lpips_weights else None,
        inception=load_inception(inception_weights).to(device) if inception_weights else None,
        dinov2=Dinov2Features(dinov2_weights, device=device) if dinov2_weights else None,
    )


class GenerationMetrics:
    """Scores of one or several pictures (the projected cloud, the RGB head, a baseline) of the same true views.

    Args:
        ssim_variants: which of :data:`models.metrics.images.SSIM_VARIANTS` are reported.
        kid_subsets: of KID.
        kid_subset_size: of KID.
        seed: of KID's drawing.
    """

    def __init__(
        self,
        *,
        ssim_variants: Sequence[str] = ("ssim",),
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        seed: int = 0,
    ) -> None:
        self.ssim_variants = tuple(ssim_variants)
        self._kernel = {"subsets": kid_subsets, "subset_size": kid_subset_size, "seed": seed}
        self.means = Means()
        self.fid: dict[str, FrechetDistance] = {}
        self.kid: dict[str, KernelDistance] = {}
        self.fd_dinov2: dict[str, FrechetDistance] = {}

    @torch.no_grad()
    def update(
        self,
        judges: Judges,
        pictures: Mapping[str, Tensor],
        true: Tensor,
        *,
        coverage: Mapping[str, Tensor] | None = None,
        groups: Sequence[Sequence[str]] = (),
    ) -> dict[str, Tensor]:
        """Add a batch; returns the scores by sample, ``<picture>/<score>`` -> (B,).

        Args:
            judges: the networks.
            pictures: name -> (B, 3, H, W) in [0, 1].
            true: (B, 3, H, W) in [0, 1].
            coverage: name -> (B,) share of the picture that was drawn, where that is known.
            groups: for each sample the names of its groups (bins of angle and translation).
        """
        scores: dict[str, Tensor] = {}
        for name, picture in pictures.items():
            scores[f"{name}/psnr"] = psnr(picture, true)
            scores |= {f"{name}/{variant}": ssim(picture, true, variant=variant) for variant in self.ssim_variants}
            if judges.lpips is not None:
                scores[f"{name}/lpips"] = judges.lpips(picture, true)
        scores |= {f"{name}/coverage": share for name, share in (coverage or {}).items()}
        self.means.update(scores, groups)
        self._features(judges, pictures, true)
        return scores

    def _features(self, judges: Judges, pictures: Mapping[str, Tensor], true: Tensor) -> None:
        bytes_of = {name: to_bytes(picture) for name, picture in pictures.items()}
        if judges.inception is not None:
            real = judges.inception(to_bytes(true))
            for name, picture in bytes_of.items():
                features = judges.inception(picture)
                self.fid.setdefault(name, FrechetDistance()).update(features, real)
                self.kid.setdefault(name, KernelDistance(**self._kernel)).update(features, real)
        if judges.dinov2 is not None:
            real = judges.dinov2(to_bytes(true))
            for name, picture in bytes_of.items():
                self.fd_dinov2.setdefault(name, FrechetDistance()).update(judges.dinov2(picture), real)

    def merge(self, other: GenerationMetrics) -> None:
        """Add what another rank saw."""
        self.means.merge(other.means)
        for name in other.fid:
            self.fid.setdefault(name, FrechetDistance()).merge(other.fid[name])
        for name in other.kid:
            self.kid.setdefault(name, KernelDistance(**self._kernel)).merge(other.kid[name])
        for name in other.fd_dinov2:
            self.fd_dinov2.setdefault(name, FrechetDistance()).merge(other.fd_dinov2[name])

    def compute(self) -> dict[str, float]:
        """``<picture>/psnr``, ``/ssim``, ``/lpips``, ``/coverage`` (also ``@<group>``), ``/fid``, ``/kid``,
        ``/kid_std``, ``/kid_subset_size``, ``/fd_dinov2``.
        """
        numbers = self.means.compute()
        for score, distances in (("fid", self.fid), ("fd_dinov2", self.fd_dinov2)):
            for name, distance in distances.items():
                value = distance.compute()
                if value is not None:
                    numbers[f"{name}/{score}"] = value
        for name, kernel in self.kid.items():
            values = kernel.compute()
            numbers |= {f"{name}/{'kid' if k == 'mean' else 'kid_' + k}": value for k, value in values.items()}
        return numbers


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as uint8, rounded to the nearest."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
