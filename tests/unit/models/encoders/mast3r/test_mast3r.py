from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import models
from infra.bench.baselines_pair import decode_explicitly
from models.encoders.mast3r import Activations, DualDecoder, PairHead, activations
from models.errors import ModelError, WeightsError

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, width: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def conv(name: str, out: int, width: int, side: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, width, side, side)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention(name: str, width: int) -> Shapes:
    return linear(f"{name}.qkv", 3 * width, width) | linear(f"{name}.proj", width, width)


def mlp(name: str, width: int, hidden: int, out: int) -> Shapes:
    return linear(f"{name}.fc1", hidden, width) | linear(f"{name}.fc2", out, hidden)


def published_layout(*, enc: int, enc_depth: int, dec: int, depth: int) -> Shapes:
    """MASt3R_*_catmlpdpt_metric by rule: every entry of its state dict, second names included."""
    found: Shapes = {"mask_token": (1, 1, dec)} | conv("patch_embed.proj", enc, 3, 16) | norm("enc_norm", enc)
    for i in range(enc_depth):
        at = f"enc_blocks.{i}"
        found |= norm(f"{at}.norm1", enc) | attention(f"{at}.attn", enc) | norm(f"{at}.norm2", enc)
        found |= mlp(f"{at}.mlp", enc, 4 * enc, enc)
    found |= linear("decoder_embed", dec, enc) | norm("dec_norm", dec)
    for at in [f"dec_blocks{stack}.{i}" for stack in ("", "2") for i in range(depth)]:
        for name in ("norm1", "norm2", "norm3", "norm_y"):
            found |= norm(f"{at}.{name}", dec)
        found |= attention(f"{at}.attn", dec) | mlp(f"{at}.mlp", dec, 4 * dec, dec)
        for name in ("projq", "projk", "projv", "proj"):
            found |= linear(f"{at}.cross_attn.{name}", dec, dec)
    levels, hooked = (96, 192, 384, 768), (enc, dec, dec, dec)
    for head in ("downstream_head1", "downstream_head2"):
        dpt, scratch = f"{head}.dpt", f"{head}.dpt.scratch"
        for i, (level, width) in enumerate(zip(levels, hooked, strict=True)):
            found |= conv(f"{dpt}.act_postprocess.{i}.0", level, width, 1)
            if i != 2:
                found |= conv(f"{dpt}.act_postprocess.{i}.1", level, level, (4, 2, 0, 3)[i])
            for name in (f"layer{i + 1}_rn", f"layer_rn.{i}"):
                found |= conv(f"{scratch}.{name}", 256, level, 3, bias=False)
            found |= conv(f"{scratch}.refinenet{i + 1}.out_conv", 256, 256, 1)
            for unit in (f"resConfUnit{u}.conv{c}" for u in (1, 2) for c in (1, 2)):
                found |= conv(f"{scratch}.refinenet{i + 1}.{unit}", 256, 256, 3)
        for i, (out, width, side) in {0: (128, 256, 3), 2: (128, 128, 3), 4: (4, 128, 1)}.items():
            found |= conv(f"{dpt}.head.{i}", out, width, side)
        found |= mlp(f"{head}.head_local_features", enc + dec, 4 * (enc + dec), 25 * 256)
    return found


def state(shapes: Shapes, device: str = "meta") -> dict[str, Tensor]:
    return {name: torch.empty(shape, device=device) for name, shape in shapes.items()}


def test_the_large_model_takes_the_published_checkpoint() -> None:
    layout = published_layout(enc=1024, enc_depth=24, dec=768, depth=12)
    assert len(layout) == 1017
    with torch.device("meta"):
        model = models.build("mast3r-large")
    report = models.load_reference(model, state(layout))
    assert len(report.skipped) == 1 + 2 * 4  # the mask token, and two convolutions that no forward pass reads
    assert len(report.loaded) == 1017 - 8 - 9  # less the second names
    assert models.load_reference(
        model, {name: tensor for name, tensor in state(layout).items() if ".layer_rn." not in name}
    ).complete
    only_second = {name: tensor for name, tensor in state(layout).items() if "_rn.weight" not in name}
    assert models.load_reference(model, only_second).complete
    stored = sum(math.prod(shape) for name, shape in layout.items() if name in report.loaded)
    assert stored == sum(parameter.numel() for parameter in model.parameters()) == 686_277_768
    assert sum(p.numel() for p in model.decoder.blocks1.parameters()) == 113_439_744


def test_what_does_not_fit_is_listed() -> None:
    layout = published_layout(enc=1024, enc_depth=24, dec=768, depth=12)
    with torch.device("meta"):
        model = models.build("mast3r-large")
    wrong = state({k: v for k, v in layout.items() if k != "dec_norm.bias"} | {"decoder_embed.bias": (5,)})
    with pytest.raises(WeightsError) as failure:
        models.load_reference(model, wrong | {"head.bias": torch.empty(1)})
    for part in ("missing (1): dec_norm.bias", "unexpected (1): head.bias", "decoder_embed.bias: expected (768,)"):
        assert part in str(failure.value)


def test_a_checkpoint_of_one_stack_fills_both() -> None:
    settings = {"encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2, "width": 24, "depth": 2, "heads": 2}
    model = models.build(
        "mast3r-large", **settings, dpt_levels=(96, 192, 384, 768), dpt_width=256, patch=16, descriptor=24
    )
    layout = published_layout(enc=32, enc_depth=1, dec=24, depth=2)
    one = {k: torch.randn(v) * 0.02 for k, v in layout.items() if not k.startswith("dec_blocks2.")}
    models.load_reference(model, one)
    for first, second in zip(model.decoder.blocks1.parameters(), model.decoder.blocks2.parameters(), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(model.decoder.blocks2[1].mlp.fc1.weight, one["dec_blocks.1.mlp.fc1.weight"])


@pytest.fixture
def decoder() -> DualDecoder:
    torch.manual_seed(0)
    return DualDecoder(in_width=20, width=24, depth=3, heads=3)


def test_decoder_equals_the_written_out_one(decoder: DualDecoder) -> None:
    tokens = torch.randn(2, 12, 20), torch.randn(2, 12, 20)
    expected = decode_explicitly(decoder.state_dict(), tokens, (3, 4), 3)
    got = decoder(*tokens, (3, 4), (3, 4))
    for features, last in zip(got, expected, strict=True):
        assert [f.shape[-1] for f in features] == [20, 24, 24, 24]
        torch.testing.assert_close(features[-1], last, rtol=1e-4, atol=1e-5)


def test_neither_view_comes_first(decoder: DualDecoder) -> None:
    """With one set of weights for both stacks, swapping the views swaps the results."""
    decoder.blocks2.load_state_dict(decoder.blocks1.state_dict())
    a, b = torch.randn(1, 6, 20), torch.randn(1, 8, 20)
    one, two = decoder(a, b, (2, 3), (2, 4))
    other_two, other_one = decoder(b, a, (2, 4), (2, 3))
    for got, expected in ((other_one, one), (other_two, two)):
        torch.testing.assert_close(got[-1], expected[-1])
    assert not torch.allclose(decoder(a, 2 * b, (2, 3), (2, 4))[0][-1], one[-1])


def test_decoder_depends_on_positions(decoder: DualDecoder) -> None:
    a, b = torch.randn(1, 6, 20), torch.randn(1, 6, 20)
    straight = decoder(a, b, (2, 3), (2, 3))[0][-1]
    assert not torch.allclose(decoder(a, b, (3, 2), (2, 3))[0][-1], straight, atol=1e-4)
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    assert not torch.allclose(decoder(a[:, order], b, (2, 3), (2, 3))[0][-1][:, order], straight, atol=1e-4)


def head(**changes: object) -> PairHead:
    torch.manual_seed(0)
    settings = {"in_width": 6, "width": 8, "depth": 4, "patch": 4, "descriptor": 5, "dpt_levels": (4, 6, 8, 8)}
    return PairHead(**{**settings, "dpt_width": 8, "rgb_hidden": 4, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [(3, 4), (2, 2), (1, 5), (5, 3)])
def test_head_gives_maps_of_the_image(grid: tuple[int, int]) -> None:
    module = head()
    features = [torch.randn(2, grid[0] * grid[1], c) for c in (6, 8, 8, 8, 8)]
    view = module(features, grid)
    size = (4 * grid[0], 4 * grid[1])
    assert {k: tuple(v.shape) for k, v in view.items()} == {
        "pts3d": (2, *size, 3), "conf": (2, *size), "desc": (2, *size, 5), "desc_conf": (2, *size), "rgb": (2, *size, 3)
    }  # fmt: skip
    assert (view["conf"] >= 1).all()
    assert (view["desc_conf"] > 0).all()
    assert ((view["rgb"] >= 0) & (view["rgb"] <= 1)).all()
    torch.testing.assert_close(view["desc"].norm(dim=-1), torch.ones(2, *size))
    sum(v.sum() for v in view.values()).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_head_is_float32_inside_autocast() -> None:
    module, features = head(), [torch.randn(1, 4, c) for c in (6, 8, 8, 8, 8)]
    plain = module(features, (2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = module(features, (2, 2))
    for name, maps in view.items():
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps, plain[name], rtol=0, atol=0)


def test_local_features_stay_in_their_patch() -> None:
    module = head()
    features = [torch.randn(1, 6, c) for c in (6, 8, 8, 8, 8)]
    before = module(features, (2, 3))["desc"]
    features[-1] = features[-1].clone()
    features[-1][0, 4] += 1  # row 1, column 1
    changed = (module(features, (2, 3))["desc"] != before).any(-1)[0]
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[4:8, 4:8] = True
    assert torch.equal(changed, inside)


def test_head_without_colours_or_confidence_of_its_own() -> None:
    view = head(rgb_hidden=0, own_confidence=False)([torch.randn(1, 4, c) for c in (6, 8, 8, 8, 8)], (2, 2))
    assert "rgb" not in view
    assert torch.equal(view["conf"], view["desc_conf"])


def test_activations_by_hand() -> None:
    raw = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]], requires_grad=True)
    out = activations.points(raw, ("exp", -math.inf, math.inf))
    torch.testing.assert_close(out[0].detach(), torch.tensor([0.6, 0.0, 0.8]) * math.expm1(5.0))
    out.sum().backward()
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()
    torch.testing.assert_close(activations.points(raw, ("square", 0, 0))[0].detach(), torch.tensor([15.0, 0.0, 20.0]))
    assert activations.points(raw, ("linear", 0.0, 3.5))[0].tolist() == [3.0, 0.0, 3.5]
    number = torch.tensor([0.0, 100.0])
    assert activations.confidence(number, ("exp", 1.0, 11.0)).tolist() == [2.0, 11.0]
    assert activations.confidence(number, ("sigmoid", 1.0, 3.0)).tolist() == [2.0, 3.0]
    with pytest.raises(ModelError, match="mode of depth is 'cube'; allowed are exp, linear, square"):
        Activations(depth=("cube", 0, 1))


def test_whole_model_with_two_sizes_and_bad_sizes() -> None:
    torch.manual_seed(0)
    model: nn.Module = models.build("mast3r-tiny")
    one, two = model(torch.randn(1, 3, 16, 24), torch.randn(1, 3, 24, 16))
    assert one["pts3d"].shape == (1, 16, 24, 3)
    assert two["pts3d"].shape == (1, 24, 16, 3)
    with pytest.raises(ModelError, match="image of 16x20 pixels: both sides must be multiples of the patch, 8"):
        model(torch.randn(1, 3, 16, 20), torch.randn(1, 3, 16, 20))
    with pytest.raises(ModelError, match="depth must be at least 1, got 0"):
        DualDecoder(in_width=4, width=8, depth=0, heads=2)
