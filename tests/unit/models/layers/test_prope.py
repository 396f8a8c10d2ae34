"""PRoPE against a matrix per token, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.errors import ModelError
from models.layers.prope import ProjectivePositions, Prope, projection_matrices, prope_attention

GRID, WIDTH, STILL = (2, 3), 16, 4
RAYS = GRID[0] * GRID[1]


def cameras(batch: int, per_sequence: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """World-to-camera poses and intrinsics, off-centre, of pictures of 28 x 42 pixels."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(batch, per_sequence, 3, 3, generator=generator)).Q
    pose = torch.eye(4).repeat(batch, per_sequence, 1, 1)
    pose[..., :3, :3] = rotation * torch.linalg.det(rotation)[..., None, None]
    pose[..., :3, 3] = torch.randn(batch, per_sequence, 3, generator=generator)
    K = torch.tensor([[40.0, 0, 20], [0, 35, 15], [0, 0, 1]]).repeat(batch, per_sequence, 1, 1)
    return pose, K


def token_matrices(pose: Tensor, K: Tensor, still: int) -> Tensor:
    """(N, WIDTH, WIDTH) of the sequence of one sample: what maps a token's frame to the common one, inverted."""
    scale = torch.tensor([[1 / 42, 0, -0.5], [0, 1 / 28, -0.5], [0, 0, 1]])
    matrices = [torch.eye(WIDTH)] * still
    for camera in range(len(pose)):
        lifted = torch.eye(4)
        lifted[:3, :3] = scale @ K[camera]
        P = lifted @ pose[camera]
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                blocks = [P] * (WIDTH // 8)
                for position in (column, row):
                    count = WIDTH // 8
                    angle = torch.tensor([position * 100 ** (-i / count) for i in range(count)])
                    c, s = angle.cos().diag(), angle.sin().diag()
                    blocks.append(torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)]))
                matrices.append(torch.block_diag(*blocks))
    return torch.stack(matrices)


def written_out(q: Tensor, k: Tensor, v: Tensor, matrices: Tensor) -> Tensor:
    """Of one sample: logits q_i D_i D_j^-1 k_j, outputs D_i (sum a_ij D_j^-1 v_j)."""
    D, back = matrices.double(), torch.linalg.inv(matrices.double())
    relative = torch.einsum("nab,mbc->nmac", D, back)
    logits = torch.einsum("hna,nmac,hmc->hnm", q.double(), relative, k.double()) / math.sqrt(WIDTH)
    return torch.einsum("hnm,nmac,hmc->hna", logits.softmax(-1), relative, v.double()).float()


@pytest.mark.parametrize("per_sequence", [1, 2])
def test_attention_is_the_one_with_a_matrix_per_token(per_sequence: int) -> None:
    pose, K = cameras(2, per_sequence)
    tokens = STILL + per_sequence * RAYS
    q, k, v = torch.randn(3, 2, 3, tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    positions = Prope(WIDTH)(*projection_matrices(pose, K, (28, 42)), GRID)
    mask = torch.arange(tokens) >= STILL
    got = prope_attention(q, k, v, positions, mask=mask)
    for sample in range(2):
        expected = written_out(q[sample], k[sample], v[sample], token_matrices(pose[sample], K[sample], STILL))
        torch.testing.assert_close(got[sample], expected, rtol=1e-4, atol=1e-5)


def test_picture_tokens_may_stand_anywhere() -> None:
    pose, K = cameras(2)
    tokens = STILL + RAYS
    q, k, v = torch.randn(3, 2, 3, tokens, WIDTH, generator=torch.Generator().manual_seed(2))
    positions = Prope(WIDTH)(*projection_matrices(pose, K, (28, 42)), GRID)
    behind = prope_attention(q, k, v, positions, mask=(torch.arange(tokens) >= STILL).float())
    # Another place for them in each sample; what is at place i of ``moved`` was at order[i].
    order = torch.tensor([[4, 0, 5, 6, 1, 7, 2, 3, 8, 9], [0, 4, 5, 1, 6, 7, 8, 2, 9, 3]])
    index = order[:, None, :, None].expand_as(q)
    got = prope_attention(*(x.gather(2, index) for x in (q, k, v)), positions, mask=order >= STILL)
    torch.testing.assert_close(got, behind.gather(2, index))
    with pytest.raises(ModelError, match=r"marks \[5\] of 10 tokens; the pictures have 6"):
        prope_attention(q, k, v, positions, mask=torch.arange(tokens) >= 5)


def logits_of(seed: int) -> Tensor:
    pose, K = cameras(1, seed=seed)
    positions = Prope(WIDTH)(*projection_matrices(pose, K, (28, 42)), GRID)
    q, k = torch.randn(2, 1, 2, STILL + RAYS, WIDTH, generator=torch.Generator().manual_seed(3))
    return positions.queries(q) @ positions.keys(k).mT


def test_the_pose_cancels_between_rays_of_one_camera_and_not_towards_latents() -> None:
    here, there = logits_of(0), logits_of(7)
    scale = float(here.abs().max())
    torch.testing.assert_close(here[..., STILL:, STILL:], there[..., STILL:, STILL:], rtol=1e-4, atol=1e-5 * scale)
    assert torch.equal(here[..., :STILL, :STILL], there[..., :STILL, :STILL])
    assert float((here[..., STILL:, :STILL] - there[..., STILL:, :STILL]).abs().max()) > 1


def test_projection_matrices_in_float32_and_their_inverse() -> None:
    pose, K = cameras(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projection, back = projection_matrices(pose, K, (28, 42))
    assert projection.dtype == back.dtype == torch.float32
    torch.testing.assert_close(projection @ back, torch.eye(4).expand(5, 1, 4, 4), rtol=0, atol=1e-5)
    assert torch.equal(projection_matrices(pose[..., :3, :], K, (28, 42))[0], projection_matrices(pose, K, (28, 42))[0])
    with pytest.raises(ModelError, match=r"extrinsics are .* got \(5, 1, 3, 3\)"):
        projection_matrices(pose[..., :3, :3], K, (28, 42))


def test_half_precision_keeps_its_dtype_and_gradients_are_those_of_the_formula() -> None:
    pose, K = cameras(1)
    positions: ProjectivePositions = Prope(WIDTH)(*projection_matrices(pose, K, (28, 42)), GRID)
    x = torch.randn(1, 2, STILL + RAYS, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert positions.values(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(positions.values(x), positions.values(x.clone()))
    x.requires_grad_(True)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    (positions.outputs(x) * weight).sum().backward()
    expected = torch.einsum("nac,bhna->bhnc", token_matrices(pose[0], K[0], STILL), weight)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_heads_of_a_width_that_does_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match="multiple of 8, got 12"):
        Prope(12)
