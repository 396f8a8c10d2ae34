"""Names, shapes and sizes of the published checkpoint, and the norm that is found in one."""

from __future__ import annotations

import ast
import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models.encoders.vggt import Vggt, qk_norm_of
from models.errors import WeightsError

KEYS = Path(__file__).parents[4] / "parity" / "keys" / "vggt1b_keys.txt.gz"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Every tensor of facebook/VGGT-1B, on meta."""
    lines = gzip.decompress(KEYS.read_bytes()).decode().splitlines()
    shapes = {name: ast.literal_eval(shape) for name, shape in (line.split("\t") for line in lines)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def large() -> Vggt:
    with torch.device("meta"):
        model = models.build("vggt-1b")
    assert isinstance(model, Vggt)
    return model


def millions(tensors: Any) -> float:
    return round(sum(tensor.numel() for tensor in tensors) / 1e6, 2)


def test_names_and_shapes_are_the_published_ones(large: Vggt, published: dict[str, Tensor]) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in large.state_dict().items()}
    assert ours == {name: tuple(t.shape) for name, t in published.items() if not name.startswith("track_head.")}
    report = models.load_reference(large, published, skip=("track_head.*",))
    assert report.complete
    assert len(report.loaded) == len(ours)
    assert {name.split(".")[0] for name in report.skipped} == {"track_head"}
    assert len(report.loaded) + len(report.skipped) == 1797


def test_sizes_are_the_published_ones(large: Vggt, published: dict[str, Tensor]) -> None:
    parts = {name: millions(child.parameters()) for name, child in large.named_children()}
    assert parts == {"aggregator": 909.11, "camera_head": 216.17, "point_head": 32.65, "depth_head": 32.65}
    assert millions(published.values()) == 1256.54


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("depth_head.norm.weight"), r"missing \(1\): depth_head.norm.weight"),
        (lambda state: state.update({"depth_head.extra": torch.empty(1)}), r"unexpected \(1\): depth_head.extra"),
        (
            lambda state: state.update({"aggregator.camera_token": torch.empty(1, 2, 1, 8)}),
            r"camera_token: expected \(1, 2, 1, 1024\), got \(1, 2, 1, 8\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(large: Vggt, published: dict[str, Tensor], change: Any, message: str) -> None:
    state = dict(published)
    change(state)
    with pytest.raises(WeightsError, match=message):
        models.load_reference(large, state)


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as Spa3R's release stores them: no bias beside the global blocks' q/k norms."""
    lost = tuple(f".attn.{norm}.bias" for norm in ("q_norm", "k_norm"))
    return {n: t for n, t in state.items() if not (n.startswith("aggregator.global_blocks.") and n.endswith(lost))}


@torch.no_grad()
def test_the_norm_of_queries_and_keys_follows_the_checkpoint() -> None:
    torch.manual_seed(0)
    model = models.build("vggt-tiny")
    assert isinstance(model, Vggt)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in whole.items():
        if "_norm." in name:
            tensor += torch.randn_like(tensor) * 0.3
    images = torch.rand(1, 3, 3, 28, 28)
    assert qk_norm_of(whole) == "layernorm"
    assert qk_norm_of(released(whole)) == "rmsnorm"
    assert qk_norm_of(["camera_head.trunk.0.attn.qkv.weight"]) is None
    models.load_reference(model, whole)
    with_layernorm = model(images).features
    models.load_reference(model, released(whole))
    norms = {type(block.attn.q_norm) for block in model.aggregator.global_blocks}
    assert norms == {nn.RMSNorm}
    assert {type(block.attn.k_norm) for block in model.aggregator.frame_blocks} == {nn.LayerNorm}
    assert set(model.state_dict()) == set(released(whole))
    built = models.build("vggt-tiny", qk_norm="rmsnorm")
    models.load_reference(built, released(whole))
    torch.testing.assert_close(model(images).features, built(images).features)
    assert not torch.allclose(with_layernorm, built(images).features, atol=1e-3)
    models.load_reference(model, whole)
    torch.testing.assert_close(model(images).features, with_layernorm)


def test_rmsnorm_is_its_formula_with_the_eps_of_float32() -> None:
    from models.layers.attention import head_norm

    norm = head_norm("rmsnorm", 8)
    x = torch.randn(3, 8) * 1e-4
    expected = x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


def test_on_meta_the_norm_follows_too(published: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        model = models.build("vggt-1b")
    report = models.load_reference(model, released(published), skip=("track_head.*",))
    assert report.complete
    assert all(parameter.is_meta for parameter in model.parameters())
