"""Random draws of a sample: noise, timesteps, dropped conditions, positions.

A batch carries one key a sample (column ``draw``), made of (seed, step, sample id). Every draw comes from a generator
of that key and a purpose, on CPU, so that it depends neither on the device, nor on how samples are spread over
micro-batches and ranks, nor on what else was drawn before.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(draw: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose ("noise", "timestep", ...) of the sample whose key is ``draw``."""
    digest = hashlib.sha256(f"{draw}/{purpose}".encode()).digest()
    made = torch.Generator()
    made.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return made


def normal(draws: Tensor, shape: tuple[int, ...], purpose: str) -> Tensor:
    """Standard normal numbers (B, *shape), float32 on the device of ``draws`` (B,)."""
    made = [torch.randn(shape, generator=generator(draw, purpose)) for draw in draws.tolist()]
    return torch.stack(made).to(draws.device) if made else torch.empty((0, *shape), device=draws.device)


def uniform(draws: Tensor, shape: tuple[int, ...], purpose: str) -> Tensor:
    """Numbers from [0, 1) (B, *shape), float32 on the device of ``draws`` (B,)."""
    made = [torch.rand(shape, generator=generator(draw, purpose)) for draw in draws.tolist()]
    return torch.stack(made).to(draws.device) if made else torch.empty((0, *shape), device=draws.device)


def integers(draws: Tensor, high: int, purpose: str) -> Tensor:
    """One whole number of [0, high) a sample, int64 (B,) on the device of ``draws`` (B,)."""
    made = [torch.randint(high, (1,), generator=generator(draw, purpose)) for draw in draws.tolist()]
    return torch.cat(made).to(draws.device) if made else torch.empty(0, dtype=torch.int64, device=draws.device)


def permutations(draws: Tensor, length: int, purpose: str) -> Tensor:
    """An independent permutation of range(length) a sample, int64 (B, length) on the device of ``draws`` (B,)."""
    made = [torch.randperm(length, generator=generator(draw, purpose)) for draw in draws.tolist()]
    if not made:
        return torch.empty((0, length), dtype=torch.int64, device=draws.device)
    return torch.stack(made).to(draws.device)
