"""Poses both ways, the camera head against its formula, dense heads in pieces, and what stays float32."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import models
from models.encoders.vggt import CameraHead, DenseHead, Vggt, extrinsics_intrinsics, pose_encoding
from models.encoders.vggt.dense import add_uv
from models.errors import ModelError
from models.layers.dpt import ResidualUnit


def test_poses_go_there_and_back() -> None:
    torch.manual_seed(0)
    encoding = torch.randn(4, 3, 9, dtype=torch.float64)
    encoding[..., 7:] = encoding[..., 7:].sigmoid() * 2 + 0.2
    extrinsics, intrinsics = extrinsics_intrinsics(encoding, (120, 200))
    back = pose_encoding(extrinsics, intrinsics, (120, 200))
    quaternion = F.normalize(encoding[..., 3:7], dim=-1)
    quaternion = torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
    expected = torch.cat([encoding[..., :3], quaternion, encoding[..., 7:]], dim=-1)
    torch.testing.assert_close(back, expected)


def test_an_encoding_by_hand() -> None:
    """A quarter turn about y (scalar last), 90 degrees high and 60 wide, of a picture of 100 x 80 (H, W)."""
    half = math.sqrt(0.5)
    encoding = torch.tensor([1.0, 2.0, 3.0, 0.0, half, 0.0, half, math.pi / 2, math.pi / 3])
    extrinsics, intrinsics = extrinsics_intrinsics(encoding, (100, 80))
    turned = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3]])
    torch.testing.assert_close(extrinsics, turned, atol=1e-6, rtol=0)
    focal = 40 * math.sqrt(3)
    torch.testing.assert_close(intrinsics, torch.tensor([[focal, 0, 40], [0, 50.0, 50], [0, 0, 1]]))


def test_the_camera_head_is_its_formula() -> None:
    torch.manual_seed(0)
    head = CameraHead(16, depth=1, heads=2, iterations=3, layer_scale=1.0)
    with torch.no_grad():
        head.empty_pose_tokens.normal_()
    tokens = torch.randn(2, 4, 16)
    got = head(tokens)
    normed = head.token_norm(tokens)
    pose = head.empty_pose_tokens.expand(2, 4, 9)
    total = torch.zeros(2, 4, 9)
    for number in range(3):
        shift, scale, gate = head.poseLN_modulation[1](F.silu(head.embed_pose(pose))).split(16, dim=-1)
        x = gate * (F.layer_norm(normed, (16,), eps=1e-6) * (1 + scale) + shift) + normed
        total = total + head.pose_branch(head.trunk_norm(head.trunk[0](x)))
        pose = total
        expected = torch.cat([total[..., :7], total[..., 7:].clamp_min(0)], dim=-1)
        torch.testing.assert_close(got[number], expected, rtol=1e-4, atol=1e-5)


def test_an_iteration_is_given_no_gradient_through_the_one_before() -> None:
    torch.manual_seed(0)
    head = CameraHead(16, depth=1, heads=2, iterations=2)
    head(torch.randn(1, 3, 16))[-1].sum().backward()
    assert head.empty_pose_tokens.grad is None or not head.empty_pose_tokens.grad.any()
    assert head.embed_pose.weight.grad is not None


@pytest.mark.parametrize("kind", ["depth", "points"])
@pytest.mark.parametrize("chunk", [1, 3, 6, 50])
@torch.no_grad()
def test_a_dense_head_in_pieces_is_the_head_at_once(kind: str, chunk: int) -> None:
    torch.manual_seed(0)
    head = DenseHead(16, kind=kind, levels=(8, 8, 12, 16), features=16, patch=14)
    outputs = [torch.randn(2, 3, 6, 16) for _ in range(4)]
    values, confidence = head(outputs, (3, 2), chunk=0)
    assert values.shape == (2, 3, 42, 28, 1 if kind == "depth" else 3)
    pieces = head(outputs, (3, 2), chunk=chunk)
    torch.testing.assert_close(pieces[0], values)
    torch.testing.assert_close(pieces[1], confidence)
    assert (confidence > 1).all()
    assert kind == "points" or (values > 0).all()


def test_sinusoids_by_hand() -> None:
    """Channel by channel: x's sines, x's cosines, y's sines, y's cosines; coordinates at the centres of the cells."""
    height, width, channels = 2, 3, 16
    got = add_uv(torch.zeros(1, channels, height, width, dtype=torch.float64), (28, 56))[0]
    diagonal = math.hypot(28, 56)
    for row in range(height):
        for column in range(width):
            u = (2 * column + 1 - width) / width * 56 / diagonal
            v = (2 * row + 1 - height) / height * 28 / diagonal
            waves = []
            for coordinate in (u, v):
                angles = [coordinate / 100 ** (i / 4) for i in range(4)]
                waves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(got[:, row, column], 0.1 * torch.tensor(waves, dtype=torch.float64))


def test_a_rectified_skip_carries_what_the_first_relu_left() -> None:
    torch.manual_seed(0)
    unit = ResidualUnit(4, rectified_skip=True)
    x = torch.randn(1, 4, 3, 3)
    branch = unit.conv2(F.relu(unit.conv1(F.relu(x))))
    torch.testing.assert_close(unit(x), F.relu(x) + branch)
    unit.rectified_skip = False
    torch.testing.assert_close(unit(x), x + branch)


@torch.no_grad()
def test_heads_are_float32_behind_a_bfloat16_aggregator_and_under_autocast() -> None:
    torch.manual_seed(0)
    model = models.build("vggt-tiny").eval()
    assert isinstance(model, Vggt)
    images = torch.rand(1, 3, 3, 28, 42)
    exact = model(images, points=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = model(images, points=True)
    rounded = model.cast(torch.bfloat16)(images, points=True)
    assert rounded.features.dtype == torch.bfloat16
    assert model.camera_head.token_norm.weight.dtype == torch.float32
    for out in (under, rounded):
        for name in ("depth", "depth_conf", "points", "points_conf"):
            assert getattr(out, name).dtype == torch.float32
        assert {pose.dtype for pose in out.poses} == {torch.float32}
        torch.testing.assert_close(out.poses[-1], exact.poses[-1], atol=0.1, rtol=0.1)
        torch.testing.assert_close(out.features.float(), exact.features, atol=0.3, rtol=0.1)


@torch.no_grad()
def test_random_weights_give_cameras_with_a_field_of_view() -> None:
    torch.manual_seed(0)
    model = models.build("vggt-tiny")
    pose = model(torch.rand(2, 3, 3, 28, 28), depth=False).poses[-1]
    assert (pose[..., 7:] > 0.3).all()
    assert (pose[..., 3:7].norm(dim=-1) > 0.1).all()


def test_heads_that_cannot_be() -> None:
    with pytest.raises(ModelError, match="for depth or points, got 'colour'"):
        DenseHead(16, kind="colour", levels=(8, 8, 8, 8), features=16, patch=14)
    with pytest.raises(ModelError, match=r"multiples of 4.*got \[8, 8, 8\] and 16"):
        DenseHead(16, kind="depth", levels=(8, 8, 8), features=16, patch=14)
    with pytest.raises(ModelError, match=r"dpt_layers \[0, 1, 2, 4\] must be four layers from 0 to 3"):
        models.build("vggt-tiny", dpt_layers=(0, 1, 2, 4))
