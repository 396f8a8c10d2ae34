"""The aggregator against a dense mask, a pass without targets, and an explicit rotation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.encoders.vggt import Aggregator, Vggt
from models.errors import ModelError
from models.layers import Attention, Rope2d

GRID = (2, 3)
PATCHES = GRID[0] * GRID[1]
# Two samples whose targets are other views, two in each.
TARGETS = torch.tensor([[False, True, False, True, False], [False, False, True, True, False]])


@pytest.fixture(scope="module")
def aggregator() -> Aggregator:
    torch.manual_seed(0)
    made = Aggregator(width=32, heads=2, depth=3, vit_depth=1, patch=14, image_size=28, registers=2, layer_scale=1.0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


@pytest.fixture(scope="module")
def patches() -> Tensor:
    return torch.randn(2, 5, PATCHES, 32, generator=torch.Generator().manual_seed(1))


def explicit_attention(attention: Attention, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention with a dense mask (B, L, L), queries and keys normalised and turned channel by channel."""
    heads, head = attention.heads, x.shape[-1] // attention.heads
    q, k, v = attention.qkv(x).view(*x.shape[:2], 3, heads, head).permute(2, 0, 3, 1, 4)
    q, k = (explicit_rotation(norm(t), positions) for norm, t in ((attention.q_norm, q), (attention.k_norm, k)))
    logits = (q @ k.mT / math.sqrt(head)).masked_fill(~mask[:, None], -math.inf)
    return attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def explicit_rotation(x: Tensor, positions: Tensor, base: float = 100.0) -> Tensor:
    """(B, heads, L, d): each half of the channels is turned pair by pair, x_i with x_(i + d/4), by row, then column."""
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    for axis in range(2):
        for pair in range(half // 2):
            angle = positions[:, axis] * base ** (-2 * pair / half)
            a, b = x[..., axis * half + pair], x[..., axis * half + half // 2 + pair]
            out[..., axis * half + pair] = a * angle.cos() - b * angle.sin()
            out[..., axis * half + half // 2 + pair] = a * angle.sin() + b * angle.cos()
    return out


def explicit_forward(model: Aggregator, patches: Tensor, targets: Tensor) -> list[Tensor]:
    """The aggregator in the order of the views, with the mask of every token to every token."""
    batch, views = patches.shape[:2]
    special = torch.cat([model.camera_token, model.register_token], dim=2)[0]
    x = torch.cat(
        [torch.stack([special[min(view, 1)] for view in range(views)]).expand(batch, -1, -1, -1), patches], dim=2
    )
    length = x.shape[2]
    position = torch.tensor([(0, 0)] * model.prefix + [(y + 1, x + 1) for y in range(GRID[0]) for x in range(GRID[1])])
    sees = (targets[:, :, None] | ~targets[:, None, :]).repeat_interleave(length, 1).repeat_interleave(length, 2)
    outputs = []
    for frame, over in zip(model.frame_blocks, model.global_blocks, strict=True):
        flat = x.reshape(batch * views, length, -1)
        framed = explicit_block(frame, flat, position, torch.ones(1, length, length, dtype=torch.bool))
        x = explicit_block(over, framed.reshape(batch, views * length, -1), position.repeat(views, 1), sees)
        x = x.view(batch, views, length, -1)
        outputs.append(torch.cat([framed.view_as(x), x], dim=-1))
    return outputs


def explicit_block(block: Any, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    x = x + block.ls1.gamma * explicit_attention(block.attn, block.norm1(x), positions, mask)
    return x + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


@pytest.mark.parametrize("qk_norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("hidden", [False, True])
def test_two_attentions_equal_one_with_a_dense_mask(qk_norm: str, hidden: bool, patches: Tensor) -> None:
    torch.manual_seed(3)
    model = Aggregator(
        width=32, heads=2, depth=2, vit_depth=1, patch=14, image_size=28, registers=2, layer_scale=1.0, qk_norm=qk_norm
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        targets = TARGETS if hidden else torch.zeros_like(TARGETS)
        got = model(patches, GRID, TARGETS if hidden else None, keep=[0, 1])
        for layer, expected in enumerate(explicit_forward(model, patches, targets)):
            torch.testing.assert_close(got[layer], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_context_is_what_it_is_without_the_targets(aggregator: Aggregator, patches: Tensor) -> None:
    joint = aggregator(patches, GRID, TARGETS, keep=[2])[2]
    alone = aggregator(patches[~TARGETS].view(2, 3, PATCHES, -1), GRID, keep=[2])[2]
    torch.testing.assert_close(joint[~TARGETS].view_as(alone), alone, rtol=1e-5, atol=1e-5)
    plain = aggregator(patches, GRID, keep=[2])[2]
    assert not torch.allclose(plain[~TARGETS], joint[~TARGETS], atol=1e-2), "there the context sees the targets"
    assert not torch.allclose(plain[TARGETS], joint[TARGETS], atol=1e-3), "whose keys have not seen each other"


@torch.no_grad()
def test_a_changed_target_changes_no_context_and_no_other_sample(aggregator: Aggregator, patches: Tensor) -> None:
    before = aggregator(patches, GRID, TARGETS, keep=[2])[2]
    changed = patches.clone()
    changed[0, 1] = changed[0, 1].flip(-1)
    after = aggregator(changed, GRID, TARGETS, keep=[2])[2]
    assert torch.equal(after[~TARGETS], before[~TARGETS])
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0, 3], before[0, 3], atol=1e-3), "targets see each other"


@torch.no_grad()
def test_only_the_layers_that_are_asked_for_are_kept_and_none_after_them_is_run(
    aggregator: Aggregator, patches: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = aggregator(patches, GRID, keep=range(3))
    assert list(everything) == [0, 1, 2]
    ran: list[int] = []
    for index, block in enumerate(aggregator.global_blocks):
        monkeypatch.setattr(block, "forward", _noting(block.forward, ran, index))
    some = aggregator(patches, GRID, keep=[1])
    assert list(some) == [1]
    assert ran == [0, 1]
    torch.testing.assert_close(some[1], everything[1])
    assert aggregator(patches, GRID) == {}


def _noting(forward: Any, ran: list[int], index: int) -> Any:
    def noted(*arguments: Any, **options: Any) -> Any:
        ran.append(index)
        return forward(*arguments, **options)

    return noted


@torch.no_grad()
def test_one_view_and_pictures_of_any_shape() -> None:
    torch.manual_seed(0)
    model = models.build("vggt-tiny")
    assert isinstance(model, Vggt)
    for height, width in ((14, 42), (112, 112), (84, 56)):
        out = model(torch.rand(1, 1, 3, height, width), points=True)
        assert out.features.shape == (1, 1, height * width // 14**2, 128)
        assert out.depth is not None
        assert out.points is not None
        assert out.depth.shape == (1, 1, height, width)
        assert out.points.shape == (1, 1, height, width, 3)
        assert all(torch.isfinite(value).all() for value in (out.features, out.depth, out.points, *out.poses))


@torch.no_grad()
def test_learned_positions_are_resampled_for_another_grid_only(aggregator: Aggregator) -> None:
    vit = aggregator.patch_embed
    assert vit.positions((2, 2)) is vit.pos_embed
    wide = vit.positions((2, 5))
    assert wide.shape == (1, 11, 32)
    assert torch.equal(wide[:, 0], vit.pos_embed[:, 0]), "the class token has no place"
    constant = Aggregator(width=8, heads=2, depth=1, vit_depth=1, patch=14, image_size=42).patch_embed
    constant.pos_embed.fill_(0.5)
    torch.testing.assert_close(constant.positions((7, 2)), torch.full((1, 15, 8), 0.5))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([[True, False, False, False, False]] * 2), "view 0 is a target"),
        (torch.tensor([[False, True, True, False, False], [False, True, False, False, False]]), r"got \[2, 1\]"),
        (torch.zeros(2, 4, dtype=torch.bool), r"must be bool \(2, 5\), got torch.bool \(2, 4\)"),
        (torch.zeros(2, 5), "got torch.float32"),
    ],
)
def test_partitions_that_are_none(aggregator: Aggregator, patches: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        aggregator(patches, GRID, targets, keep=[0])


def test_other_bad_input(aggregator: Aggregator, patches: Tensor) -> None:
    with pytest.raises(ModelError, match=r"no layers \[3, 7\].*from 0 to 2"):
        aggregator(patches, GRID, keep=[7, 3, 1])
    with pytest.raises(ModelError, match="6 patch tokens a view are no grid of 4x2"):
        aggregator(patches, (4, 2), keep=[0])
    with pytest.raises(ModelError, match=r"30x28 pixels: both sides must be .* multiples of the patch, 14"):
        aggregator.patch_tokens(torch.rand(1, 3, 30, 28))
    with pytest.raises(ModelError, match="qk_norm='batchnorm'; allowed are layernorm and rmsnorm"):
        Aggregator(width=32, heads=2, depth=1, vit_depth=1, patch=14, image_size=28, qk_norm="batchnorm")
    with pytest.raises(ModelError, match="attention: qk_norm='l2'"):
        Attention(8, 2, qk_norm="l2")


def test_rotation_with_a_prefix_and_several_views() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 2 * (3 + PATCHES), 16)
    position = torch.tensor([(0, 0)] * 3 + [(y + 1, x + 1) for y in range(GRID[0]) for x in range(GRID[1])])
    got = Rope2d(16)(GRID, prefix=3, first=1, views=2)(x)
    torch.testing.assert_close(got, explicit_rotation(x, position.repeat(2, 1)))
    assert torch.equal(got[..., :3, :], x[..., :3, :])


def test_gradients_reach_every_weight_through_both_attentions(patches: Tensor) -> None:
    torch.manual_seed(0)
    model = Aggregator(width=32, heads=2, depth=2, vit_depth=1, patch=14, image_size=28, layer_scale=1.0)
    tokens = model.patch_tokens(torch.rand(10, 3, 28, 42)).unflatten(0, (2, 5))
    model(tokens, GRID, TARGETS, keep=[1])[1].square().mean().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == ["patch_embed.mask_token"]
