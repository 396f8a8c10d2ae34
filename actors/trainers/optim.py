"""Optimiser, learning-rate schedule, gradient clipping and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import TrainerConfig


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name, in a fixed order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def build_optimizer(module: nn.Module, config: TrainerConfig, no_decay: Sequence[str]) -> torch.optim.AdamW:
    """AdamW with two groups: parameters of one axis or whose name holds one of ``no_decay`` get no weight decay."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in trainable(module).items():
        exempt = parameter.ndim < 2 or any(part in name for part in no_decay)
        (rest if exempt else decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(config.betas[0], config.betas[1])
    )


def learning_rate(step: int, config: TrainerConfig) -> float:
    """Rate of the optimiser step ``step`` (from 0): linear warm-up, then half a cosine to ``min_lr_ratio``.

    A pure function of the step, so that a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients, a scalar tensor; not finite if any gradient is not."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale the gradients down to ``limit`` (0: leave them)."""
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


class MovingAverage:
    """Exponential moving average of the trained weights, in float32, for validation and the final model."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in trainable(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module's weights by ``1 - decay``."""
        for name, parameter in trainable(module).items():
            self.weights[name].lerp_(parameter.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights and the averaged ones; a second call exchanges them back."""
        for name, parameter in trainable(module).items():
            mine = self.weights[name].clone()
            self.weights[name].copy_(parameter)
            parameter.copy_(mine)
