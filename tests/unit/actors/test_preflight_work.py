"""Attention of a plan's steps is counted, wherever it would run."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from actors.preflight.work import counting


@pytest.mark.parametrize("place", ["real", "fake", "meta"])
def test_attention_is_two_products_forward_and_four_backward(place: str) -> None:
    with FakeTensorMode() if place == "fake" else nullcontext():
        device = "meta" if place == "meta" else "cpu"
        query = torch.zeros(2, 4, 24, 8, device=device, requires_grad=True)
        key, value = (torch.zeros(2, 4, 40, 8, device=device, requires_grad=True) for _ in range(2))
        with counting() as counter:
            out = scaled_dot_product_attention(query, key, value)
            forward = counter.get_total_flops()
            out.sum().backward()
    product = 2 * (2 * 4) * 24 * 40 * 8
    assert (forward, counter.get_total_flops()) == (2 * product, 6 * product)
