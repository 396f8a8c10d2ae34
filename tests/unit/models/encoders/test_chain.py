"""Encoders of records: what they compute, and that their identity holds all that came before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.encoders.chain import PCAProjection, PooledTokens
from models.encoders.hf import load_encoder
from models.errors import ModelError, WeightsError

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
ARCH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def upstream(**changes):
    settings = {"arch": ARCH, "height": 56, "width": 84, "layers": [1, 2], "dtype": "float32", **changes}
    return load_encoder("dinov2", "random", **settings)


def record(encoder):
    outputs = encoder([encoder.prepare(IMAGE, {})])
    return {name: value[0] for name, value in outputs.items()}


def test_pooling_averages_windows():
    first = upstream()
    encoder = PooledTokens(first, "none", height=2, width=3, dtype="float32")
    given = record(first)
    out = encoder([encoder.prepare(given, {})])
    want = given["tokens"].reshape(2, 2, 2, 3, 2, 32).mean(dim=(2, 4))
    torch.testing.assert_close(out["tokens"][0], want)
    assert tuple(out["tokens"].shape[1:]) == encoder.outputs()["tokens"].shape == (2, 2, 3, 32)
    assert torch.equal(out["summary"][0], given["summary"])


def test_a_random_projection_is_orthonormal_and_seeded():
    first = upstream()
    make = lambda seed: PCAProjection(  # noqa: E731
        first, "none", weights="random", channels=8, seed=seed, dtype="bfloat16"
    )
    encoder = make(0)
    torch.testing.assert_close(encoder.components @ encoder.components.T, torch.eye(8), atol=1e-5, rtol=0)
    assert encoder.identity() == make(0).identity()
    assert encoder.identity() != make(1).identity()
    out = encoder([encoder.prepare(record(first), {})])
    assert out["tokens"].shape == (1, 2, 4, 6, 8)
    assert out["tokens"].dtype == torch.bfloat16


def test_a_stored_pca_reconstructs_what_lies_in_its_span(tmp_path):
    first = upstream()
    tokens = record(first)["tokens"].reshape(-1, 32)
    mean = tokens.mean(dim=0)
    components = torch.linalg.svd(tokens - mean, full_matrices=False).Vh[:16].contiguous()
    save_file({"mean": mean, "components": components}, tmp_path / "model.safetensors")
    encoder = PCAProjection(first, "none", weights=str(tmp_path), channels=16, seed=0, dtype="float32")
    reduced = encoder([encoder.prepare(record(first), {})])["tokens"].reshape(-1, 16)
    back = reduced @ components + mean
    residual = (back - tokens).square().sum() / (tokens - mean).square().sum()
    spectrum = torch.linalg.svdvals(tokens - mean).square()
    assert float(residual) == pytest.approx(float(spectrum[16:].sum() / spectrum.sum()), abs=1e-4)


@pytest.mark.parametrize("change", [{"seed": 3}, {"layers": [2, 2]}, {"height": 112}, {"dtype": "bfloat16"}])
def test_a_change_upstream_is_a_change_here(change):
    make = lambda first, codec="none": PooledTokens(first, codec, height=1, width=1, dtype="float32")  # noqa: E731
    assert make(upstream()).identity() == make(upstream()).identity()
    assert make(upstream()).identity() != make(upstream(**change)).identity()
    assert make(upstream()).identity() != make(upstream(), "fp8_e4m3").identity()


def test_a_chain_of_three_nests_every_identity():
    first = upstream()
    second = PooledTokens(first, "none", height=2, width=2, dtype="float32")
    third = PCAProjection(second, "none", weights="random", channels=4, seed=0, dtype="float32")
    nested = third.identity()["upstream"]
    assert nested == second.identity()
    assert nested["upstream"] == first.identity()
    pooled = second([second.prepare(record(first), {})])
    out = third([third.prepare({name: value[0] for name, value in pooled.items()}, {})])
    assert out["tokens"].shape == (1, 2, 2, 2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: PooledTokens(f, "none", height=9, width=1, dtype="float32"), "between 1x1 and the grid 4x6"),
        (
            lambda f: PCAProjection(f, "none", weights="random", channels=33, seed=0, dtype="float32"),
            "must have 1 to 32",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message):
    with pytest.raises(ModelError, match=message):
        make(upstream())


def test_a_projection_of_another_width_is_refused(tmp_path):
    save_file({"mean": torch.zeros(5), "components": torch.zeros(2, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="this projection needs"):
        PCAProjection(upstream(), "none", weights=str(tmp_path), channels=2, seed=0, dtype="float32")


def test_a_record_of_another_shape_and_a_transform_are_refused():
    encoder = PooledTokens(upstream(), "none", height=1, width=1, dtype="float32")
    with pytest.raises(ModelError, match=r"takes tokens \(2, 4, 6, 32\)"):
        encoder.prepare({"tokens": torch.zeros(1, 4, 6, 32), "summary": torch.zeros(1, 32)}, {})
    with pytest.raises(ModelError, match="has no transform"):
        encoder.prepare(record(upstream()), {"flip": True})
