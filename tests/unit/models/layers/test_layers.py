from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.errors import ModelError
from models.layers import Attention, Block, DPTHead


def test_block_equals_torchs_pre_norm_layer() -> None:
    torch.manual_seed(0)
    reference = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", norm_first=True, batch_first=True, layer_norm_eps=1e-6
    )
    block = Block(16, 4)
    pairs = {
        "norm1": reference.norm1, "norm2": reference.norm2, "attn.proj": reference.self_attn.out_proj,
        "mlp.fc1": reference.linear1, "mlp.fc2": reference.linear2,
    }  # fmt: skip
    for name, source in pairs.items():
        block.get_submodule(name).load_state_dict(source.state_dict())
    with torch.no_grad():
        block.attn.qkv.weight.copy_(reference.self_attn.in_proj_weight)
        block.attn.qkv.bias.copy_(reference.self_attn.in_proj_bias)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(block(x), reference(x), rtol=1e-5, atol=1e-5)


def test_mask_rotation_and_key_norm() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, qk_norm=True)
    x = torch.randn(1, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    masked = attention(x, mask=causal)
    torch.testing.assert_close(masked[:, :3], attention(x[:, :3], mask=causal[:3, :3]))
    assert not torch.allclose(masked, attention(x))
    seen: list[torch.Size] = []

    def rotate(t: torch.Tensor) -> torch.Tensor:
        seen.append(t.shape)
        return t.flip(-1)  # the same orthogonal map on both sides leaves every product as it was

    torch.testing.assert_close(attention(x, rotate=rotate), attention(x))
    assert seen == [torch.Size([1, 2, 5, 4])] * 2


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ModelError, match="width 10 is not divisible by 4 heads"):
        Attention(10, 4)


def test_layer_scale_of_zero_is_the_identity() -> None:
    block = Block(8, 2, layer_scale=0.0)
    x = torch.randn(1, 3, 8)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("grid", "size"), [((4, 6), (32, 48)), ((5, 7), (33, 50)), ((1, 1), (14, 14))])
def test_dpt_gives_any_size(grid: tuple[int, int], size: tuple[int, int]) -> None:
    head = DPTHead(in_channels=[6, 8, 8, 8], level_channels=[4, 8, 8, 16], width=8, out_channels=3, hidden=4)
    maps = [torch.randn(2, *grid, c) for c in (6, 8, 8, 8)]
    out = head(maps, size)
    assert out.shape == (2, 3, *size)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


def test_dpt_levels_have_the_strides_of_the_paper() -> None:
    head = DPTHead(in_channels=[4] * 4, level_channels=[4] * 4, width=8, out_channels=1, hidden=4)
    x = torch.randn(1, 4, 6, 8)
    sizes = [tuple(head.resample[level](head.project[level](x)).shape[-2:]) for level in range(4)]
    assert sizes == [(24, 32), (12, 16), (6, 8), (3, 4)]


def test_the_order_of_projection_and_upsampling_does_not_matter() -> None:
    """The fusion projects before it upsamples; the paper does it after."""
    conv = nn.Conv2d(3, 5, 1)
    x = torch.randn(2, 3, 4, 5)

    def up(t: torch.Tensor) -> torch.Tensor:
        return F.interpolate(t, size=(8, 10), mode="bilinear", align_corners=True)

    torch.testing.assert_close(up(conv(x)), conv(up(x)), rtol=1e-5, atol=1e-6)


def test_dpt_refuses_another_number_of_maps() -> None:
    with pytest.raises(ModelError, match="needs 4 numbers"):
        DPTHead(in_channels=[4] * 3, level_channels=[4] * 4, width=8, out_channels=1, hidden=4)
    head = DPTHead(in_channels=[4] * 4, level_channels=[4] * 4, width=8, out_channels=1, hidden=4)
    with pytest.raises(ModelError, match="needs 4 feature maps, got 2"):
        head([torch.randn(1, 2, 2, 4)] * 2, (8, 8))
