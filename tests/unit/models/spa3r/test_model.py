"""The network against formulas written out here, the published names, and inputs that cannot be."""

from __future__ import annotations

import ast
import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.errors import ModelError, WeightsError
from models.spa3r.cameras import cameras_of
from models.spa3r.model import Spa3R

KEYS = Path(__file__).parents[3] / "parity" / "keys" / "spa3r_keys.txt.gz"
GRID, PATCHES = (2, 3), 6
SMALL: dict[str, Any] = {
    "channels": 20, "width": 32, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "queries": 5, "registers": 2,
    "mlp_ratio": 2.0, "targets": {"geo": 20, "sem": 12},
}  # fmt: skip


def build(**changes: Any) -> Spa3R:
    """A small one whose every weight matters."""
    torch.manual_seed(0)
    module = models.build("spa3r-tiny", **{**SMALL, **changes})
    assert isinstance(module, Spa3R)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def features(views: int = 3, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, views, PATCHES, 20, generator=torch.Generator().manual_seed(seed))


def poses(views: int = 2, batch: int = 2, seed: int = 2) -> Tensor:
    pose = torch.randn(batch, views, 9, generator=torch.Generator().manual_seed(seed)) * 0.4
    pose[..., 6] += 1.0
    pose[..., 7:] = 0.8 + 0.4 * torch.rand(batch, views, 2, generator=torch.Generator().manual_seed(seed))
    return pose


def rotate_2d(x: Tensor, positions: list[tuple[int, int]]) -> Tensor:
    """Channels of a head (H, N, d) turned as complex numbers: the first half by the row, the second by the column."""
    halves = []
    for axis, half in enumerate(x.double().chunk(2, dim=-1)):
        pairs = half.shape[-1] // 2
        angle = torch.tensor([[p[axis] * 100 ** (-i / pairs) for i in range(pairs)] for p in positions])
        turned = torch.complex(half[..., :pairs], half[..., pairs:]) * torch.polar(
            torch.ones(()).double(), angle.double()
        )
        halves += [turned.real, turned.imag]
    return torch.cat(halves, dim=-1)


def written_out(module: Spa3R, state: dict[str, Tensor], tokens: Tensor, positions: list[tuple[int, int]]) -> Tensor:
    """The encoder's transformer on one sample (N, width), registers included, in float64."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].double().T + state[f"{name}.bias"].double()

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"].double() + state[f"{name}.bias"].double()

    x = tokens.double()
    heads = module.encoder.blocks[0].attn.heads
    for index in range(len(module.encoder.blocks)):
        at = f"encoder.blocks.{index}"
        q, k, v = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        q, k = (
            t / (t.square().mean(-1, keepdim=True) + 1.19e-7).sqrt() * state[f"{at}.attn.{n}_norm.weight"].double()
            for t, n in ((q, "q"), (k, "k"))
        )
        logits = rotate_2d(q, positions) @ rotate_2d(k, positions).mT / math.sqrt(q.shape[-1])
        x = x + linear((logits.softmax(-1) @ v).transpose(0, 1).flatten(1), f"{at}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    return norm(x, "encoder.norm")


@torch.no_grad()
def test_the_encoder_is_the_formula() -> None:
    module, given = build(), features()
    state = module.state_dict()
    got = module.encode(given, GRID)
    places = [(row + 1, column + 1) for row in range(GRID[0]) for column in range(GRID[1])]
    for sample in range(2):
        patches = given[sample].flatten(0, 1) @ state["projection.weight"].T + state["projection.bias"]
        tokens = torch.cat([state["encoder.register_tokens"][0], state["query_embed.weight"], patches])
        expected = written_out(module, state, tokens, [(0, 0)] * 7 + places * 3)[2:7]
        torch.testing.assert_close(got[sample].double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_latents_do_not_depend_on_the_order_of_views_and_views_do_not_see_each_other() -> None:
    module, given, pose = build(), features(), poses(views=3)
    latents = module.encode(given, GRID)
    torch.testing.assert_close(module.encode(given[:, [2, 0, 1]], GRID), latents, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(module.encode(given[:, :2], GRID), latents, atol=1e-2)
    tokens = module.decode(latents, pose, GRID)
    torch.testing.assert_close(module.decode(latents, pose[:, [1]], GRID), tokens[:, [1]], rtol=1e-4, atol=1e-4)
    one = module.decode(latents[:1], pose[:1], GRID)
    torch.testing.assert_close(one, tokens[:1], rtol=1e-4, atol=1e-4)


def test_rays_and_projections_of_a_pose_encoding() -> None:
    # 90 degrees wide, so the focal length is half of the width; the camera one to the right of the world's.
    pose = torch.tensor([[-1.0, 0, 0, 0, 0, 0, 1, 2 * math.atan(1 / 2), math.pi / 2]])
    seen = cameras_of(pose, (2, 4))
    u, v = (torch.arange(4) + 0.5 - 2) / 2, (torch.arange(2) + 0.5 - 1) / 2
    expected = torch.stack([u.expand(2, 4), v[:, None].expand(2, 4), torch.ones(2, 4)], -1)
    torch.testing.assert_close(seen.rays[0], F.normalize(expected, dim=-1).flatten(0, 1))
    lifted = torch.tensor([[0.5, 0, 0, -0.5], [0, 1.0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(seen.projection[0], lifted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.back[0] @ lifted, torch.eye(4), rtol=1e-5, atol=1e-6)
    lines = cameras_of(pose, (2, 4), plucker=True).rays[0]
    torch.testing.assert_close(lines[:, :3], seen.rays[0])
    origin = torch.tensor([1.0, 0, 0]).expand(8, 3)
    torch.testing.assert_close(lines[:, 3:], torch.linalg.cross(origin, seen.rays[0]))


def test_a_field_of_view_of_zero_stays_finite() -> None:
    pose = poses(1, 1)[0]
    pose[:, 7:] = 0
    assert all(torch.isfinite(tensor).all() for tensor in cameras_of(pose, GRID))


@pytest.mark.parametrize("camera", ["prope", "plucker"])
def test_where_the_pose_enters(camera: str) -> None:
    module, given, pose = build(camera=camera), features(), poses()
    moved = pose.clone()
    moved[..., :3] += 0.5
    with torch.no_grad():
        latents = module.encode(given, GRID)
        here, there = module.decode(latents, pose, GRID), module.decode(latents, moved, GRID)
    assert float((here - there).abs().max()) > 1e-2
    flat = pose.flatten(0, 1), moved.flatten(0, 1)
    same = [cameras_of(one, GRID, plucker=camera == "plucker").rays for one in flat]
    assert torch.equal(*same) == (camera == "prope")


def test_the_probe_teaches_nothing_but_itself() -> None:
    module = build()
    field = module(features(), poses(), GRID)
    assert field.depth is not None
    assert field.depth.shape == (2, 2, PATCHES)
    field.depth.sum().backward()
    reached = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert reached == {f"depth_prob.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}


def test_targets_and_probe_can_be_left_out() -> None:
    module = build(targets={"clip": 7}, depth_probe=False)
    field = module(features(), poses(), GRID)
    assert {name: tuple(tensor.shape) for name, tensor in field.predicted.items()} == {"clip": (2, 2, PATCHES, 7)}
    assert field.depth is None
    assert not any(name.startswith("depth_prob") for name in module.state_dict())


def published() -> dict[str, Tensor]:
    lines = gzip.decompress(KEYS.read_bytes()).decode().splitlines()
    shapes = {name: ast.literal_eval(shape) for name, shape in (line.split("\t") for line in lines)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_base_has_the_published_names_shapes_and_sizes() -> None:
    with torch.device("meta"):
        module = models.build("spa3r-base")
    state = published()
    assert len(state) == 191
    assert models.load_reference(module, state).complete
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
        n: tuple(t.shape) for n, t in state.items()
    }
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    rounded = {name: round(size / 1e6, 2) for name, size in sizes.items() if size > 1e5}
    assert rounded == {
        "projection": 1.57, "query_embed": 0.20, "encoder": 42.53, "decoder": 42.53, "heads": 14.16, "depth_prob": 2.37,
    }  # fmt: skip
    assert round(sum(sizes.values()) / 1e6, 2) == 103.37


def test_a_whole_published_checkpoint_loads_and_one_wrong_name_does_not() -> None:
    with torch.device("meta"):
        module = models.build("spa3r-base")
        beside = {"aggregator.camera_token": torch.empty(1, 2, 1, 1024), "dino.norm.weight": torch.empty(1024)}
    whole = {f"model.{name}": tensor for name, tensor in (published() | beside).items()}
    assert len(models.load_reference(module, whole).loaded) == 191
    wrong = published()
    wrong["heads.semantic.fc1.weight"] = wrong.pop("heads.sem.fc1.weight")
    with pytest.raises(WeightsError, match=r"missing \(1\): heads.sem.fc1.weight\n.*heads.semantic.fc1.weight"):
        models.load_reference(module, wrong)


def test_start_values() -> None:
    torch.manual_seed(0)
    module = models.build("spa3r-tiny")
    state = module.state_dict()
    assert float(state["encoder.register_tokens"].std()) < 2e-6
    for name in ("query_embed.weight", "decoder.blocks.1.mlp.fc1.weight", "heads.geo.fc2.weight"):
        assert 0.018 < float(state[name].std()) < 0.022
    assert not state["encoder.blocks.0.attn.qkv.bias"].any()


def test_bfloat16_features_are_taken() -> None:
    module = build()
    with torch.no_grad():
        expected = module.encode(features().bfloat16().float(), GRID)
        torch.testing.assert_close(module.encode(features().bfloat16(), GRID), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            field = module(features(), poses(), GRID)
    assert all(torch.isfinite(tensor).all() for tensor in field.predicted.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": {}}, r"targets=\{\}: at least one of geo, sem, clip"),
        ({"targets": {"dino": 3}}, "at least one of geo, sem, clip"),
        ({"camera": "rays"}, "camera='rays': allowed are prope, plucker"),
        ({"queries": 0}, "queries=0"),
        ({"heads": 3}, "width 32 is not divisible by 3 heads"),
        ({"width": 24}, "multiple of 8, got 12"),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.build("spa3r-tiny", **{**SMALL, **changes})


def test_inputs_that_cannot_be() -> None:
    module = build()
    with pytest.raises(ModelError, match=r"2\*3, 20\) of at least one context view, got \(2, 0, 6, 20\)"):
        module.encode(features()[:, :0], GRID)
    with pytest.raises(ModelError, match=r"got \(2, 3, 6, 20\)"):
        module.encode(features(), (3, 3))
    with pytest.raises(ModelError, match=r"(?s)got \(2, 3, 6, 10\).*twice VGGT's width"):
        module.encode(features()[..., :10], GRID)
    latents = module.encode(features(), GRID)
    with pytest.raises(ModelError, match=r"for 2 scenes, got \(1, 2, 9\)"):
        module.decode(latents, poses(batch=1), GRID)
    with pytest.raises(ModelError, match=r"encodings \(cameras, 9\), got \(4, 8\)"):
        module.decode(latents, poses()[..., :8], GRID)
