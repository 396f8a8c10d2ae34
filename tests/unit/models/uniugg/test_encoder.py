from __future__ import annotations

import math

import pytest
import torch

import models
from models import draws
from models.errors import ModelError, WeightsError
from models.uniugg.encoder import MEAN, STD, StudentViT, normalise, random_viewports, viewport_numbers


def radio_layout(width: int, depth: int, positions: int, patch: int = 16) -> dict[str, tuple[int, ...]]:
    """RADIOv2.5's state dict by rule."""
    found: dict[str, tuple[int, ...]] = {
        "summary_idxs": (3,),
        "model.patch_generator.pos_embed": (1, positions, width),
        "model.patch_generator.embedder.weight": (width, 3 * patch**2),
        "model.patch_generator.cls_token.token": (8, width),
        "input_conditioner.norm_mean": (3, 1, 1),
        "input_conditioner.norm_std": (3, 1, 1),
    }
    for i in range(depth):
        at = f"model.blocks.{i}"
        for name, out, of in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width),
        ):  # fmt: skip
            found |= {f"{at}.{name}.weight": (out, of), f"{at}.{name}.bias": (out,)}
        found |= {f"{at}.{name}.{kind}": (width,) for name in ("norm1", "norm2") for kind in ("weight", "bias")}
    return found


@pytest.fixture
def vit() -> StudentViT:
    torch.manual_seed(0)
    module = models.build("radio-tiny", width=24, depth=2, heads=2, patch=4, max_image=32)
    assert isinstance(module, StudentViT)
    return module


def test_radio_l_takes_the_published_checkpoint() -> None:
    layout = radio_layout(1024, 24, 128**2)
    with torch.device("meta"):
        module = models.build("radio-large")
        state = {name: torch.empty(shape) for name, shape in layout.items()}
    report = models.load_reference(module, state)
    assert len(layout) == 294
    assert len(report.loaded) == 291
    assert report.skipped == ("input_conditioner.norm_mean", "input_conditioner.norm_std", "summary_idxs")
    assert sum(p.numel() for p in module.parameters()) == 319_881_216
    for wrapped in ("radio_model.", "base_model."):
        bare = {n.removeprefix("model.") if wrapped == "base_model." else n: t for n, t in state.items()}
        assert models.load_reference(module, {wrapped + n: t for n, t in bare.items()}).complete
    with pytest.raises(WeightsError, match=r"attn\.qkv\.bias: expected \(3072,\), got \(7,\)"):
        models.load_reference(module, state | {"model.blocks.3.attn.qkv.bias": torch.empty(7)})


def test_published_weights_give_transformers_features(vit: StudentViT) -> None:
    """Split projections and names: the same numbers as RadioModel with LayerScale 1 and its own input conditioner."""
    from transformers import RadioConfig, RadioModel

    torch.manual_seed(1)
    reference = RadioModel(
        RadioConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=4, max_img_size=32,
            num_cls_tokens=4, num_registers=4, summary_idxs=[0, 1, 2],
        )
    ).eval()  # fmt: skip
    published = {}
    for name, tensor in reference.state_dict().items():
        name = name.replace("encoder.layer.", "model.blocks.").replace("attention.o_proj", "attn.proj")
        name = name.replace("embeddings.patch_projection", "model.patch_generator.embedder")
        name = name.replace("embeddings.position_embedding", "model.patch_generator.pos_embed")
        published[name.replace("embeddings.cls_register_token", "model.patch_generator.cls_token.token")] = tensor
    for at in [f"model.blocks.{i}" for i in range(2)]:
        for kind in ("weight", "bias"):
            parts = [published.pop(f"{at}.attention.{part}_proj.{kind}") for part in "qkv"]
            published[f"{at}.attn.qkv.{kind}"] = torch.cat(parts)
    models.load_reference(vit, published)
    image = torch.randint(0, 256, (2, 12, 20, 3), dtype=torch.uint8)
    with torch.no_grad():
        got = vit(normalise(image))
        expected = reference(image.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(got.tokens.flatten(1, 2), expected.features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.summary.flatten(1), expected.summary, rtol=1e-5, atol=1e-5)
    again = models.build("uniugg-vit-tiny", **vit.settings)
    models.load_reference(again, reference.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(again.parameters(), vit.parameters(), strict=True))
    scaled = reference.state_dict() | {"encoder.layer.0.layer_scale1.lambda1": torch.full((24,), 0.5)}
    with pytest.raises(WeightsError, match=r"layer_scale1\.lambda1 is not 1"):
        models.load_reference(again, scaled)
    partial = {
        name: tensor for name, tensor in reference.state_dict().items() if not name.endswith("1.attention.v_proj.bias")
    }
    with pytest.raises(WeightsError, match=r"missing \(1\): model\.blocks\.1\.attn\.qkv\.bias"):
        models.load_reference(again, partial)
    assert got.tokens.shape == (2, 3, 5, 24)
    assert got.prefix.shape == (2, 8, 24)


def test_gradients_of_split_projections_are_published_whole(vit: StudentViT) -> None:
    from models.checkpoints import published_gradient

    vit(torch.randn(1, 3, 8, 8)).tokens.square().sum().backward()
    whole = published_gradient(vit, "model.blocks.1.attn.qkv.weight")
    assert whole.shape == (72, 24)
    assert torch.equal(whole[24:48], vit.layers[1].attention.k_proj.weight.grad)


def test_normalise() -> None:
    out = normalise(torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8))
    expected = [(value - mean) / std for value, mean, std in zip((0, 1, 0.2), MEAN, STD, strict=True)]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected))
    assert out.shape == (1, 3, 1, 1)


def test_viewport_of_the_whole_table_at_its_own_size(vit: StudentViT) -> None:
    """Scale 1, aspect 1, no offset, on a grid as large as the table, is the table itself: what evaluation sees."""
    images = torch.randn(1, 3, 32, 32)
    whole = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.5]])
    with torch.no_grad():
        torch.testing.assert_close(vit(images, whole).tokens, vit(images).tokens, rtol=1e-4, atol=1e-5)
        dropped = vit(images, whole * torch.tensor([1, 1, 1, 1, 0])).tokens
    assert not torch.allclose(dropped, vit(images).tokens, atol=1e-3)
    with torch.no_grad():
        vit.embeddings.position_embedding.zero_()
        torch.testing.assert_close(dropped, vit(images).tokens, rtol=1e-4, atol=1e-5)


def test_viewports_lie_in_the_table_and_follow_the_key() -> None:
    draw = torch.arange(300)
    numbers = viewport_numbers(draw, 2)
    assert torch.equal(numbers[4:6], viewport_numbers(draw[2:3], 2))
    places, kept = random_viewports(numbers, (3, 4))
    assert places.shape == (600, 3, 4, 2)
    assert float(places.abs().max()) <= 1 + 1e-6
    assert 0.04 < 1 - float(kept.mean()) < 0.18
    size = (places[:, -1, -1] - places[:, 0, 0]) / 2
    area = size.prod(-1)
    assert math.sqrt(0.1) ** 2 * 0.99 < float(area.min()) < 0.3
    assert 0.55 < float((size[:, 0] / size[:, 1]).min()) < 0.7
    assert float(draws.uniform(draw, (2, 5), "viewport").min()) >= 0


def test_what_cannot_be_built_or_read(vit: StudentViT) -> None:
    with pytest.raises(ModelError, match="image of 10x8 pixels: both sides must be multiples of the patch, 4"):
        vit(torch.randn(1, 3, 10, 8))
    for change, message in (
        ({"heads": 5}, "width 96 is not divisible by 5 heads"),
        ({"summaries": 5}, "summaries=5 must be from 1 to class_tokens=4"),
        ({"max_image": 100}, "max_image=100 must be a multiple of patch=16"),
    ):
        with pytest.raises(ModelError, match=message):
            models.build("uniugg-vit-tiny", **change)
