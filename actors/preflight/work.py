"""Floating-point operations of a step, attention on the CPU's fake tensors among them, which PyTorch does not count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def counting() -> FlopCounterMode:
    """A silent counter of operations, wherever attention runs.

    Attention is two products of matrices forward, and four backward: its scores, which kernels compute again, count
    once. A mask takes nothing off.
    """
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
        },
    )


def _forward(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Shapes (B, heads, tokens, width)."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1])


def _backward(_: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * _forward(query, key, value)
