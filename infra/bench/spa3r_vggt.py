"""Benchmarks of VGGT: the asymmetric aggregator without a mask, one pass for two, and what a pass holds and takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from infra.bench import baselines_vggt
from infra.bench.harness import Bench, Context, Measured, Target
from infra.bench.joint_models import peak_bytes

THREADS = 2
VIEWS = 12
LAYERS = 4
"""Of the aggregator, for figures whose ratio does not depend on it: 24 would take minutes a round on two cores."""

_TOLERANCE = 1e-5


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _equal(got: Any, expected: Any, what: str, tolerance: float = _TOLERANCE) -> float:
    """Largest difference as a share of the largest value; AssertionError above ``tolerance``."""
    error = float((got - expected).abs().max() / expected.abs().max())
    if error > tolerance:
        raise AssertionError(f"{what}: the two sides differ by {error:.2e} of their scale, allowed {tolerance:g}")
    return error


def _seeded() -> Any:
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    return torch


def _partition(views: int) -> Any:
    """Half of the views are targets, every other one from the second: bool (V,)."""
    import torch

    return torch.arange(views) % 2 == 1


def prepare_attention(context: Context) -> Measured:
    """The attention of one global block: two calls over the context and over all, against one with a dense mask."""
    torch = _seeded()
    from models.layers import Attention
    from models.layers.attention import context_first_attention

    width, heads, views = context.size(768, 32), context.size(12, 2), context.size(VIEWS, 4)
    length = 5 + context.size(256, 6)
    attention = Attention(width, heads, qk_norm="layernorm").eval().requires_grad_(False)
    x = torch.randn(1, views * length, width)
    # Both sides get the context first, so that they are asked for the very same.
    mask = baselines_vggt.view_mask(torch.arange(views) >= views // 2, length)
    split = views // 2 * length
    q, k, v = attention.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)

    def ours() -> Any:
        return context_first_attention(q, k, v, split)

    def dense() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    error = _equal(ours(), dense(), "attention")
    _equal(attention(x, context=split), attention(x, mask=mask), "the layer around it")

    def extra() -> dict[str, Any]:
        sides = [_seconds(lambda: attention(x, context=split)), _seconds(lambda: attention(x, mask=mask))]
        return {
            "threads": THREADS, "tokens": views * length, "flop_ideal": 0.75, "error": error,
            "with_projections_ratio": round(sides[0] / sides[1], 3),
        }  # fmt: skip

    return Measured(value=lambda: _seconds(ours), baseline=lambda: _seconds(dense), extra=extra)


class _Sized:
    """An aggregator and patch tokens of the size that three figures share."""

    def __init__(self, context: Context) -> None:
        torch = _seeded()
        from models.encoders.vggt import Aggregator

        self.views = context.size(VIEWS, 4)
        self.grid = (context.size(16, 2), context.size(16, 3))
        self.settings: dict[str, Any] = {
            "width": context.size(768, 32), "heads": context.size(12, 2), "depth": context.size(LAYERS, 2),
            "vit_depth": 1, "patch": 14, "image_size": 28, "layer_scale": 1.0,
        }  # fmt: skip
        self.aggregator = Aggregator(**self.settings).eval().requires_grad_(False)
        self.last = self.settings["depth"] - 1
        self.patches = torch.randn(1, self.views, self.grid[0] * self.grid[1], self.settings["width"])
        self.targets = _partition(self.views)

    def joint(self) -> Any:
        return self.aggregator(self.patches, self.grid, self.targets[None], keep=[self.last])[self.last]

    def plain(self, patches: Any) -> Any:
        return self.aggregator(patches, self.grid, keep=[self.last])[self.last]

    def flops(self, run: Callable[[_Sized], object]) -> int:
        """Floating-point operations of ``run``, counted on the meta device."""
        import copy

        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from models.encoders.vggt import Aggregator

        fake = copy.copy(self)
        fake.patches = self.patches.to("meta")
        with torch.device("meta"):
            fake.aggregator = Aggregator(**self.settings).requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(fake)
        return int(counter.get_total_flops())

    def extra(
        self, ours: Callable[[_Sized], object], other: Callable[[_Sized], object], error: float
    ) -> dict[str, Any]:
        ideal = self.flops(ours) / self.flops(other)
        return {
            "threads": THREADS, "layers": self.settings["depth"], "flop_ideal": round(ideal, 3), "error": error,
        }  # fmt: skip


def prepare_aggregator(context: Context) -> Measured:
    """The aggregator behind the cached stage of single pictures, against one with a dense mask made once a pass."""
    sized = _Sized(context)

    def masked(of: _Sized) -> Any:
        mask = baselines_vggt.view_mask(of.targets, of.patches.shape[2] + of.aggregator.prefix)
        return baselines_vggt.aggregate_with_mask(of.aggregator, of.patches, of.grid, mask.to(of.patches.device))

    error = _equal(sized.joint(), masked(sized), "aggregator")
    return Measured(
        value=lambda: _seconds(sized.joint),
        baseline=lambda: _seconds(lambda: masked(sized)),
        extra=lambda: sized.extra(_Sized.joint, masked, error),
    )


def prepare_one_pass(context: Context) -> Measured:
    """One asymmetric pass, against the context alone and then all views. The context's features are the same.

    The targets' are not: in the second of the two passes the context has seen them.
    """
    sized = _Sized(context)

    def twice(of: _Sized) -> Any:
        return of.plain(of.patches[:, ~of.targets]), of.plain(of.patches)

    error = _equal(sized.joint()[:, ~sized.targets], twice(sized)[0], "context features")
    return Measured(
        value=lambda: _seconds(sized.joint),
        baseline=lambda: _seconds(lambda: twice(sized)),
        extra=lambda: sized.extra(_Sized.joint, twice, error),
    )


class _Whole:
    """A small VGGT of 24 layers, from pictures to poses and the outputs that a dense head reads."""

    def __init__(self, context: Context) -> None:
        torch = _seeded()
        from models.encoders.vggt import Vggt

        depth, side = context.size(24, 8), context.size(224, 56)
        self.layers = tuple(int((depth - 1) * share) for share in (0.2, 0.5, 0.75, 1))
        self.model = Vggt(
            width=context.size(384, 32), heads=context.size(6, 2), depth=depth, vit_depth=context.size(12, 2),
            image_size=side, camera_heads=context.size(6, 2), dpt_layers=self.layers, dpt_levels=(16, 24, 32, 32),
            dpt_features=32, layer_scale=0.2,
        ).eval().requires_grad_(False)  # fmt: skip
        self.images = torch.rand(1, context.size(8, 3), 3, side, side)
        self.error = self._compare()

    def ours(self) -> Any:
        out = self.model(self.images, keep=self.layers, depth=False)
        return [out.kept[layer] for layer in self.layers], out.poses[-1]

    def explicit(self) -> Any:
        outputs = baselines_vggt.aggregate_explicitly(self.model.aggregator, self.images)
        return [outputs[layer] for layer in self.layers], self.model.camera_head(outputs[-1][:, :, 0])[-1]

    def _compare(self) -> float:
        (kept, poses), (expected, other) = self.ours(), self.explicit()
        errors = [_equal(got, want, "kept outputs", 1e-4) for got, want in zip(kept, expected, strict=True)]
        return max(*errors, _equal(poses, other, "poses", 1e-4))

    def extra(self) -> dict[str, Any]:
        return {"threads": THREADS, "views": self.images.shape[1], "pixels": self.images.shape[-1], "error": self.error}


def prepare_memory(context: Context) -> Measured:
    """Peak bytes beyond the weights of a pass, against attention written out with every layer's output kept."""
    whole = _Whole(context)
    return Measured(
        value=lambda: peak_bytes(whole.ours), baseline=lambda: peak_bytes(whole.explicit), extra=whole.extra
    )


def prepare_time(context: Context) -> Measured:
    """Seconds of the same pass."""
    whole = _Whole(context)
    return Measured(value=lambda: _seconds(whole.ours), baseline=lambda: _seconds(whole.explicit), extra=whole.extra)


def _at_most(limit: float) -> Target:
    return Target(on="ratio", op="<=", limit=limit)


TABLE = [
    Bench(name="global_attention", unit="s", target=_at_most(0.83), prepare=prepare_attention, rounds=9),
    Bench(name="aggregator", unit="s", target=_at_most(1.0), prepare=prepare_aggregator),
    Bench(name="one_pass", unit="s", target=_at_most(0.77), prepare=prepare_one_pass),
    Bench(name="vggt_memory", unit="B", target=_at_most(0.5), prepare=prepare_memory, rounds=3),
    Bench(name="vggt_time", unit="s", target=_at_most(1.0), prepare=prepare_time),
]
