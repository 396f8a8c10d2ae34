"""PSNR and SSIM of single pictures in [0, 1], by their published definitions; a variant has a name of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
SSIM_VARIANTS = ("ssim", "ssim_sample_covariance", "ssim_padded")


def check_pictures(predicted: Tensor, true: Tensor) -> None:
    """ValueError unless both are (B, 3, H, W) floating-point pictures in [0, 1] of one shape."""
    if predicted.shape != true.shape or predicted.ndim != 4 or predicted.shape[1] != 3:
        raise ValueError(f"two batches of pictures (B, 3, H, W) are needed, got {[*predicted.shape]}, {[*true.shape]}")
    for picture in (predicted, true):
        if not picture.is_floating_point():
            raise ValueError(f"pictures are floating point in [0, 1], got {picture.dtype}; divide bytes by 255")
        if picture.numel() and not (picture.min() >= -1e-4 and picture.max() <= 1 + 1e-4):
            low, high = float(picture.min()), float(picture.max())
            raise ValueError(f"pictures lie in [0, 1], these lie in [{low:.3g}, {high:.3g}]")


def psnr(predicted: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB with range 1, one a picture: (B, 3, H, W) twice -> (B,) float64.

    Infinite where the pictures are equal.
    """
    check_pictures(predicted, true)
    return -10 * (predicted.double() - true.double()).square().mean((1, 2, 3)).log10()


def ssim(predicted: Tensor, true: Tensor, *, variant: str = "ssim") -> Tensor:
    """Structural similarity (Wang et al. 2004) with range 1: (B, 3, H, W) twice -> (B,) float64.

    ``variant``:
        ``ssim``: Gaussian window of 11 x 11 with sigma 1.5, population covariance, mean over the pixels whose window
            lies in the picture (scikit-image with ``gaussian_weights=True, use_sample_covariance=False``).
        ``ssim_sample_covariance``: covariances times 121 / 120, as evaluations on RE10K have it.
        ``ssim_padded``: windows over the border see the reflected picture and count (torchmetrics).

    ValueError for an unknown variant, or pictures smaller than the window.
    """
    check_pictures(predicted, true)
    if variant not in SSIM_VARIANTS:
        raise ValueError(f"unknown variant of SSIM {variant!r}; there are {', '.join(SSIM_VARIANTS)}")
    if min(predicted.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW} pixels, got {[*predicted.shape[-2:]]}")
    a, b = predicted.double(), true.double()
    if variant == "ssim_padded":
        a, b = (F.pad(x, [WINDOW // 2] * 4, mode="reflect") for x in (a, b))
    mean_a, mean_b = _blur(a), _blur(b)
    factor = WINDOW**2 / (WINDOW**2 - 1) if variant == "ssim_sample_covariance" else 1.0
    variance_a = factor * (_blur(a * a) - mean_a * mean_a)
    variance_b = factor * (_blur(b * b) - mean_b * mean_b)
    covariance = factor * (_blur(a * b) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    return similarity.mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean of the windows that lie in (B, C, H, W)."""
    distance = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-(distance**2) / (2 * SIGMA**2)).exp()
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(x, weights, groups=x.shape[1])
    return F.conv2d(x, weights.mT, groups=x.shape[1])
