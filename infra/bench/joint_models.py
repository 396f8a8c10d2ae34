"""Benchmarks of UniUGG's networks: the dual decoder's time, the matching loss's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from infra.bench import baselines_pair
from infra.bench.harness import Bench, Context, Measured, Target

THREADS = 2
GRID = (24, 32)
_TOLERANCE = 1e-4


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prepare_decoder(context: Context) -> Measured:
    """Forward and backward of the dual decoder alone, one pair; results and gradients of both sides must be equal."""
    import torch

    from models.encoders.mast3r import DualDecoder

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    depth, width, heads = context.size(12, 2), context.size(768, 48), context.size(12, 3)
    grid = GRID if not context.quick else (4, 6)
    decoder = DualDecoder(in_width=context.size(1024, 64), width=width, depth=depth, heads=heads)
    tokens = tuple(torch.randn(1, grid[0] * grid[1], context.size(1024, 64)) for _ in range(2))
    state = decoder.state_dict(keep_vars=True)

    def ours() -> list[Any]:
        return [features[-1] for features in decoder(*tokens, grid, grid)]

    def explicit() -> list[Any]:
        return baselines_pair.decode_explicitly(state, (tokens[0], tokens[1]), grid, heads)

    def train(forward: Callable[[], list[Any]]) -> None:
        decoder.zero_grad(set_to_none=True)
        sum(last.square().mean() for last in forward()).backward()

    _assert_equal(decoder, train, ours, explicit)
    return Measured(
        value=lambda: _seconds(lambda: train(ours)),
        baseline=lambda: _seconds(lambda: train(explicit)),
        extra=lambda: {"threads": THREADS, "tokens": grid[0] * grid[1], "whole_model_s": _whole_model(context)},
    )


def _assert_equal(decoder: Any, train: Callable[[Any], None], *sides: Callable[[], list[Any]]) -> None:
    """Outputs, and gradients of every parameter, of both sides: each within a share of its tensor's scale.

    Rounding is allowed on top, as a share of the largest gradient: that of a key's bias, which moves no softmax, is
    nothing else.
    """
    outputs, gradients = [], []
    for side in sides:
        train(side)
        gradients.append([parameter.grad.clone() for parameter in decoder.parameters()])
        outputs.append([last.detach() for last in side()])
    for found in (outputs, gradients):
        rounding = 1e-6 * max(float(tensor.abs().max()) for tensor in found[1])
        for got, expected in zip(*found, strict=True):
            error, scale = float((got - expected).abs().max()), float(expected.abs().max())
            if error > _TOLERANCE * scale + rounding:
                raise AssertionError(f"the two decoders differ by {error:.2e} where values reach {scale:.2e}")


def _whole_model(context: Context) -> float:
    """Seconds of a forward and backward of the whole of MASt3R at 384 x 512, or tiny with --quick."""
    import torch

    import models

    model = models.build("mast3r-tiny" if context.quick else "mast3r-large")
    height, width = context.size(384, 32), context.size(512, 48)
    images = [torch.randn(1, 3, height, width) for _ in range(2)]

    def run() -> None:
        views = model(*images)
        torch.stack([view[name].square().mean() for view in views for name in ("pts3d", "desc")]).sum().backward()

    return round(_seconds(run), 3)


def prepare_matching(context: Context) -> Measured:
    """Peak bytes of the matching loss, forward and backward, against the dense form; equal value and gradients."""
    import torch

    from models.uniugg.losses_matching import matching_terms

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    count = context.size(8192, 512)
    first = torch.nn.functional.normalize(torch.randn(1, count, 24), dim=-1)
    second = torch.nn.functional.normalize(first + 0.3 * torch.randn_like(first), dim=-1)
    first.requires_grad_()
    second.requires_grad_()
    valid, ones = torch.rand(1, count) < 0.5, torch.ones(1, count)

    def blockwise() -> Any:
        terms = matching_terms(
            (first, second), (ones, ones), valid, temperature=0.05, beta=0.0, block=context.size(1024, 64)
        )
        return terms.sum() / valid.sum()

    def dense() -> Any:
        return baselines_pair.match_densely(first, second, valid, 0.05)

    values = []
    for side in (blockwise, dense):
        loss = side()
        values.append((loss.detach(), *torch.autograd.grad(loss, (first, second))))
    for got, expected in zip(*values, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    seconds: dict[str, float] = {}

    def peak(name: str, side: Callable[[], Any]) -> float:
        first.grad = second.grad = None
        seconds[name] = round(_seconds(lambda: side().backward()), 3)
        return peak_bytes(lambda: side().backward())

    return Measured(
        value=lambda: peak("blockwise", blockwise),
        baseline=lambda: peak("dense", dense),
        extra=lambda: {"matches": count, "loss": round(float(values[0][0]), 6), "took_s": dict(seconds)},
    )


def peak_bytes(work: Callable[[], object]) -> float:
    """Most bytes that PyTorch's CPU allocator held at once while ``work`` ran, beyond what it held before."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    held = highest = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        highest = max(highest, held)
    return float(highest)


TABLE = [
    Bench(name="mast3r_decoder", unit="s", target=Target(on="ratio", op="<=", limit=0.8), prepare=prepare_decoder),
    Bench(name="matching_memory", unit="B", target=Target(on="ratio", op="<=", limit=0.25), prepare=prepare_matching),
]
