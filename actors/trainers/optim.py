"""Optimiser, learning-rate schedule, gradient clipping and the moving average of the weights."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actors.trainers.tensors import local, trainable
from configs import ConfigError
from configs.schema import TrainerConfig


def build_optimizer(
    module: nn.Module, config: TrainerConfig, no_decay: Sequence[str], unclipped: Sequence[str] = ()
) -> torch.optim.AdamW:
    """AdamW over the groups of :func:`parameter_groups`."""
    groups = parameter_groups(module, config, no_decay, unclipped)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))


def parameter_groups(
    module: nn.Module, config: TrainerConfig, no_decay: Sequence[str], unclipped: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The trained parameters by weight decay, by factor on the learning rate, kept under ``scale``, and by whether
    they fit a glob of ``unclipped``, kept under ``clipped``.

    Parameters of one axis or whose name holds one of ``no_decay`` get no weight decay. The factor is that of the first
    glob of ``trainer.lr_scale`` that fits the name. ConfigError for a glob that fits no parameter; one that fits frozen
    ones alone has no effect, so that an ablation may freeze what a size gives a factor.
    """
    parameters = trainable(module)
    names = [name for name, _ in module.named_parameters()]
    unused = [glob for glob in config.lr_scale if not any(fnmatch.fnmatchcase(name, glob) for name in names)]
    if unused:
        raise ConfigError(
            f"trainer.lr_scale: {unused} fits none of the {len(names)} parameters, which begin with "
            f"{sorted({name.split('.')[0] for name in names})}; in a run of several roles set it for one of them, "
            "under roles.<role>.trainer.lr_scale"
        )
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        exempt = parameter.ndim < 2 or any(part in name for part in no_decay)
        key = (_factor(name, config.lr_scale), exempt, fits_any(name, unclipped))
        groups.setdefault(key, []).append(parameter)
    # The order does not depend on which parameter comes first: factor 1, decay and clipped before the others.
    order = sorted(groups, key=lambda key: (key[0] != 1.0, key))
    return [
        {
            "params": groups[scale, exempt, free],
            "weight_decay": 0.0 if exempt else config.weight_decay,
            "scale": scale,
            "clipped": not free,
        }
        for scale, exempt, free in order
    ]


def fits_any(name: str, globs: Sequence[str]) -> bool:
    """Whether a parameter's name fits one of the globs."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _factor(name: str, scales: Mapping[str, float]) -> float:
    return next((float(factor) for glob, factor in scales.items() if fnmatch.fnmatchcase(name, glob)), 1.0)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


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


def gradient_norm(counted: Sequence[nn.Parameter], others: Sequence[nn.Parameter] = ()) -> Tensor:
    """Euclidean norm over the gradients of ``counted``, a scalar tensor.

    Not finite if any gradient is not, those of ``others`` as well. Collective if sharded.
    """
    norm = _norm(counted)
    return norm + 0 * _norm(others) if others else norm


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    return local(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]), full=True)


def split(
    parameters: Mapping[str, nn.Parameter], unclipped: Sequence[str]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that fit no glob of ``unclipped``, and those that do."""
    found: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in parameters.items():
        found[fits_any(name, unclipped)].append(parameter)
    return found


def clip(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale the gradients down to ``limit`` (0: leave them)."""
    if limit <= 0:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    # A factor that is no DTensor cannot be multiplied onto one; the rank's own part is scaled in place instead.
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)


class MovingAverage:
    """Exponential moving average of the trained weights, in float32, for validation and the final model.

    It is spread over the ranks as the weights are.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in trainable(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module's weights by ``1 - decay``."""
        for name, parameter in trainable(module).items():
            local(self.weights[name]).lerp_(local(parameter.detach()).float(), 1.0 - self.decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights and the averaged ones; a second call exchanges them back."""
        for name, parameter in trainable(module).items():
            average, current = local(self.weights[name]), local(parameter.detach())
            mine = average.clone()
            average.copy_(current)
            current.copy_(mine)
