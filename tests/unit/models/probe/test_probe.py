from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import models
from models.probe.losses import counts, cross_entropy, log_depth_l1
from models.probe.model import Probe, Standardise, tap_layers
from models.probe.spec import TRAINER


def build(**overrides: Any) -> Probe:
    torch.manual_seed(0)
    module = models.build("probe-tiny", **{"channels": 8, "layers": 4, "classes": 5, **overrides})
    assert isinstance(module, Probe)
    return module


def make_batch(n: int = 3, *, seed: int = 0, layers: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    depth = torch.rand(n, 12, 16, generator=g) * 4 + 0.5
    depth[:, :2] = 0.0
    depth[0, 5, 5] = math.inf
    return {
        "tokens": torch.randn(n, layers, 3, 4, 8, generator=g).bfloat16(),
        "summary": torch.randn(n, 1, 8, generator=g),
        "depth": depth,
        "labels": torch.randint(-1, 5, (n, 12, 16), generator=g),
        "weight": torch.ones(n),
    }


def test_shapes_and_taps() -> None:
    out = build()(make_batch()["tokens"], make_batch()["summary"], (12, 16))
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "depth_linear": (3, 12, 16), "depth_dpt": (3, 12, 16), "segmentation": (3, 5, 12, 16),
    }  # fmt: skip
    assert [tap_layers(n) for n in (1, 2, 4, 12)] == [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 3), (2, 5, 8, 11)]


def test_summaries_may_have_a_width_of_their_own() -> None:
    """CLIP's are projected."""
    batch = make_batch() | {"summary": torch.randn(3, 2, 5)}
    module = build(summaries=2, summary_channels=5)
    module.calibrate([(batch["tokens"], batch["summary"], batch["depth"])])
    assert module(batch["tokens"], batch["summary"], (12, 16))["depth_linear"].shape == (3, 12, 16)
    moved = module(batch["tokens"], batch["summary"] + 1, (12, 16))["depth_linear"]
    assert not torch.equal(moved, module(batch["tokens"], batch["summary"], (12, 16))["depth_linear"])


def test_heads_share_no_parameter() -> None:
    """The gradient of each loss term reaches its own head only."""
    module = build()
    for term, prefix in (("depth_linear", "depth_linear"), ("depth_dpt", "depth_dpt"), ("segmentation", "segm")):
        module.zero_grad()
        TRAINER.step(module, make_batch(), {}).sums[term].backward()
        touched = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert touched
        assert all(name.startswith(prefix) for name in touched)


def test_losses_by_hand() -> None:
    batch = make_batch()
    prediction = torch.zeros(3, 12, 16, requires_grad=True)
    expected, pixels = 0.0, 0
    for depth in batch["depth"].flatten().tolist():
        if depth > 0 and math.isfinite(depth):
            expected += abs(math.log(depth))
            pixels += 1
    loss = log_depth_l1(prediction, batch)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert counts(batch)["depth_linear"] == counts(batch)["depth_dpt"] == pixels
    loss.backward()
    assert prediction.grad is not None
    assert torch.isfinite(prediction.grad).all()
    logits = torch.randn(3, 5, 12, 16)
    valid = batch["labels"] >= 0
    by_hand = F.cross_entropy(logits.movedim(1, -1)[valid], batch["labels"][valid], reduction="sum")
    assert float(cross_entropy(logits, batch)) == pytest.approx(float(by_hand), rel=1e-5)
    assert counts(batch)["segmentation"] == int(valid.sum())


def test_a_sample_of_weight_zero_counts_for_nothing() -> None:
    module, batch = build(), make_batch()
    batch["weight"] = torch.tensor([1.0, 0.0, 1.0])
    kept = {k: v[[0, 2]] for k, v in batch.items()}
    a, b = TRAINER.step(module, batch, {}).sums, TRAINER.step(module, kept, {}).sums
    for term, value in a.items():
        torch.testing.assert_close(value, b[term], rtol=1e-5, atol=1e-4)
    assert counts(batch) == counts(kept)


def test_a_batch_without_depth_or_labels_gives_zero_not_nan() -> None:
    module, batch = build(), make_batch()
    batch["depth"] = torch.zeros_like(batch["depth"])
    batch["labels"] = torch.full_like(batch["labels"], -1)
    assert set(counts(batch).values()) == {0.0}
    sums = TRAINER.step(module, batch, {}).sums
    assert [float(v) for v in sums.values()] == [0.0, 0.0, 0.0]
    sum(sums.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_cutting_a_batch_leaves_sums_as_they_are() -> None:
    """A BatchNorm in the heads would fail here."""
    module, batch = build().train(), make_batch(4)
    whole = TRAINER.step(module, batch, {}).sums
    parts = [TRAINER.step(module, {k: v[i : i + 1] for k, v in batch.items()}, {}).sums for i in range(4)]
    for term, value in whole.items():
        torch.testing.assert_close(value, sum(part[term] for part in parts), rtol=1e-5, atol=1e-3)


def test_calibration_standardises_and_starts_at_the_mean_depth() -> None:
    module = build()
    batch = make_batch(8)
    batch["tokens"] = batch["tokens"] * 7 + 3
    tokens = batch["tokens"].float()
    tokens[..., 2] = 5.0  # a constant channel
    module.calibrate([(tokens[:4], batch["summary"][:4], batch["depth"][:4]),
                      (tokens[4:], batch["summary"][4:], batch["depth"][4:])])  # fmt: skip
    seen = module.token_scale(tokens.movedim(1, 3)).flatten(0, 2)
    rest = [0, 1, 3, 4, 5, 6, 7]
    torch.testing.assert_close(seen.mean(0)[:, rest], torch.zeros(4, 7), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen.std(0, correction=0)[:, rest], torch.ones(4, 7), rtol=1e-4, atol=1e-4)
    assert torch.equal(seen[..., 2], torch.zeros_like(seen[..., 2]))
    valid = batch["depth"][(batch["depth"] > 0) & torch.isfinite(batch["depth"])]
    assert float(module.log_depth_offset) == pytest.approx(float(valid.log().mean()), rel=1e-5)


def test_statistics_are_saved_but_not_trained() -> None:
    module = build()
    assert {"token_scale.mean", "summary_scale.deviation", "log_depth_offset"} <= module.state_dict().keys()
    assert not any("scale" in name for name, _ in module.named_parameters())
    assert Standardise(2, 3)(torch.ones(4, 2, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_it_learns_what_its_features_say() -> None:
    """Depth and class are linear in the features here, so the linear heads must find them."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(16, 4, 3, 4, 8, generator=g)
    depth = (0.3 * tokens[:, -1, :, :, 0]).exp().repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels = tokens[:, -1, :, :, :5].argmax(-1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    batch = {"tokens": tokens, "summary": torch.zeros(16, 1, 8), "depth": depth, "labels": labels,
             "weight": torch.ones(16)}  # fmt: skip
    module = build()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.005)
    totals = counts(batch)
    history = []
    for _ in range(150):
        sums = TRAINER.step(module, batch, {}).sums
        losses = {term: value / totals[term] for term, value in sums.items()}
        history.append({term: float(value.detach()) for term, value in losses.items()})
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    # Bilinear upsampling blurs what is constant within a patch, so no head can reach zero.
    assert history[-1]["depth_linear"] < 0.6 * history[0]["depth_linear"]
    assert history[-1]["depth_dpt"] < 0.6 * history[0]["depth_dpt"]
    assert history[-1]["segmentation"] < 0.7 * history[0]["segmentation"]
