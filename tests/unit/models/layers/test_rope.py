from __future__ import annotations

import pytest
import torch

from models.errors import ModelError
from models.layers import CrossAttention, Linear, Rope2d, linear
from models.layers.rope import rope_tables


def rotated_by_complex_numbers(x: torch.Tensor, grid: tuple[int, int], base: float) -> torch.Tensor:
    """The definition, pair by pair: z_i exp(i position base^(-2i/d)) with z = x_i + i x_(i + d/2) in each half."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for token in range(grid[0] * grid[1]):
        for axis, position in enumerate(divmod(token, grid[1])):
            part = x[..., token, axis * half : (axis + 1) * half].double()
            rate = base ** (-2 * torch.arange(half // 2, dtype=torch.float64) / half)
            turned = torch.complex(part[..., : half // 2], part[..., half // 2 :]) * torch.exp(1j * position * rate)
            out[..., token, axis * half : (axis + 1) * half] = torch.cat([turned.real, turned.imag], dim=-1).float()
    return out


@pytest.mark.parametrize(("grid", "width", "base"), [((2, 3), 8, 100.0), ((4, 1), 16, 50.0)])
def test_rotation_is_the_published_one(grid: tuple[int, int], width: int, base: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, grid[0] * grid[1], width)
    torch.testing.assert_close(Rope2d(width, base)(grid)(x), rotated_by_complex_numbers(x, grid, base))


def test_products_depend_on_the_offset_alone() -> None:
    torch.manual_seed(0)
    rope = Rope2d(16)
    q, k = torch.randn(16), torch.randn(16)
    rotate = rope((4, 5))
    turned_q, turned_k = rotate(q.expand(20, 16)), rotate(k.expand(20, 16))
    torch.testing.assert_close(turned_q[0] @ turned_k[6], turned_q[7] @ turned_k[13])  # offset (1, 1)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(20))


def test_gradient_and_strided_input() -> None:
    torch.manual_seed(0)
    rotate = Rope2d(8)((2, 2))
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, (x,))
    strided = torch.randn(1, 4, 3, 2, 8)[:, :, 1].transpose(1, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(rotate(strided), rotate(strided.contiguous()))


def test_tables_are_made_once_for_a_grid_and_serve_training_after_inference() -> None:
    rope = Rope2d(8)
    x = torch.randn(4, 8)
    with torch.inference_mode():
        rope((2, 2))(x)
    first = rope.tables((2, 2), x.device, x.dtype)
    assert rope.tables((2, 2), x.device, x.dtype)[0] is first[0]
    assert rope.tables((1, 4), x.device, x.dtype)[0] is not first[0]
    assert rope.tables((2, 2), x.device, torch.bfloat16)[0].dtype == torch.bfloat16
    y = x.requires_grad_()
    rope((2, 2))(y).square().sum().backward()
    torch.testing.assert_close(y.grad, 2 * y.detach())
    assert not rope.state_dict()


def test_width_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ModelError, match="multiple of 4, got 6"):
        Rope2d(6)
    assert rope_tables((3, 2), 8, 100.0)[0].shape == (6, 2, 2)


def test_cross_attention_equals_torchs() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(16, 4)
    reference = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        projections = (attention.projq, attention.projk, attention.projv)
        reference.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        reference.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        reference.out_proj.load_state_dict(attention.proj.state_dict())
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    torch.testing.assert_close(attention(x, y), reference(x, y, y)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="width 10 is not divisible by 4 heads"):
        CrossAttention(10, 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,)])
def test_linear_through_either_library_is_the_same(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(0)
    layer = Linear(3, 6, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    results = []
    for through in (False, True):
        monkeypatch.setattr(linear, "_by_onednn", lambda x, w, through=through: through)
        layer.zero_grad()
        x.grad = None
        out = layer(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)


def test_linear_leaves_fakes_small_products_and_other_types_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)
    weight = torch.empty(2048, 2048)
    assert linear._by_onednn(torch.empty(2, 2048), weight)
    assert not linear._by_onednn(torch.empty(1, 2), torch.empty(3, 2))
    assert not linear._by_onednn(torch.empty(2, 2048, device="meta"), weight)
    assert not linear._by_onednn(torch.empty(2, 2048).bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not linear._by_onednn(torch.empty(2, 2048), weight)
