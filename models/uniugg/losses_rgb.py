"""The loss of the colour heads: L1, LPIPS and SSIM of whole pictures (UniUGG, equation 1, and its release)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from models.metrics.images import ssim
from models.metrics.perceptual import Lpips, load_lpips


def colour_terms(predicted: Tensor, image: Tensor, *, lpips: float, ssim_weight: float, lpips_weights: str) -> Tensor:
    """Loss of each picture, (N,): mean absolute difference + ``lpips`` LPIPS + ``ssim_weight`` (1 - SSIM).

    Args:
        predicted: (N, H, W, 3) in [0, 1].
        image: (N, H, W, 3) bytes.
        lpips: weight of LPIPS (AlexNet), which sees pictures in [-1, 1].
        ssim_weight: weight of 1 - SSIM.
        lpips_weights: file or folder of AlexNet's convolutions; "" leaves LPIPS out. WeightsError when they do not
            load: a random network is never used.
    """
    guess, true = predicted.float().permute(0, 3, 1, 2), image.permute(0, 3, 1, 2).float() / 255
    loss = (guess - true).abs().mean((1, 2, 3))
    if lpips and lpips_weights:
        # The network inside: the ranges are known here, and looking at them would wait for the device.
        network = _lpips(lpips_weights, guess.device).network
        loss = loss + lpips * network(guess * 2 - 1, true * 2 - 1).flatten()
    if ssim_weight:
        loss = loss + ssim_weight * (1 - ssim(guess, true).float())
    return loss


@functools.lru_cache(maxsize=2)
def _lpips(weights: str, device: torch.device) -> Lpips:
    """The network, loaded once in a process. It is no part of the model: nothing trains, shards or saves it."""
    return load_lpips(weights).to(device)
