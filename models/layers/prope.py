"""Projective position encoding of attention (Li et al. 2025, "Cameras as Relative Positional Encoding", PRoPE).

A token of a picture knows its camera and its place on the grid. The first half of a head's channels, in groups of
four, is multiplied by the camera's projection matrix P (4x4): queries by P^T, keys and values by P^-1, outputs by P, so
that token i meets token j through P_i P_j^-1. A quarter turns with the column of the token and a quarter with its row,
in queries, keys and values; the output turns back. Tokens without a camera (registers, latents) stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.geometry.poses import inverse
from models.layers.rope import Rope2d, turn

_GROUP = 4
"""Channels that a camera's matrix multiplies at a time."""


def projection_matrices(extrinsics: Tensor, K: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """P = lift(K') [R|t; 0 1] of cameras, and its inverse; float32 (..., 4, 4), outside of autocast too.

    Args:
        extrinsics: world-to-camera, (..., 4, 4) or (..., 3, 4).
        K: (..., 3, 3) in pixels of a picture of ``size``, the corner of its first pixel at 0.
        size: (height, width). K' is K in units of the picture with the origin in its middle.
    """
    with torch.autocast(extrinsics.device.type, enabled=False):
        pose = _square(extrinsics.float())
        height, width = size
        fx, fy = K[..., 0, 0].float() / width, K[..., 1, 1].float() / height
        cx, cy = K[..., 0, 2].float() / width - 0.5, K[..., 1, 2].float() / height - 0.5
        lifted, back = (torch.eye(4, device=pose.device).expand_as(pose).clone() for _ in range(2))
        lifted[..., 0, 0], lifted[..., 0, 2], lifted[..., 1, 1], lifted[..., 1, 2] = fx, cx, fy, cy
        back[..., 0, 0], back[..., 0, 2], back[..., 1, 1], back[..., 1, 2] = 1 / fx, -cx / fx, 1 / fy, -cy / fy
        return lifted @ pose, inverse(pose) @ back


class ProjectivePositions:
    """What PRoPE does to the queries, keys, values and outputs (B, heads, N, width) of one attention call.

    The last ``cameras * h * w`` tokens are those of the pictures: camera by camera, row by row. The others come first.
    """

    def __init__(self, matrices: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor], half: int) -> None:
        projection, back = matrices
        self.cameras = projection.shape[1]
        self.cosine, self.sine = (table.repeat(self.cameras, 1, 1) for table in tables)
        self.tokens = len(self.cosine)
        # Rows are multiplied from the left: q' = P^T q is q P, and so on. One block-diagonal product for all groups.
        self._queries, self._keys, self._outputs = (
            _block_diagonal(matrix, half) for matrix in (projection, back.mT, projection.mT)
        )

    def queries(self, x: Tensor) -> Tensor:
        """P^T and the turn."""
        return self._transform(x, self._queries, -self.sine)

    def keys(self, x: Tensor) -> Tensor:
        """P^-1 and the turn."""
        return self._transform(x, self._keys, -self.sine)

    def values(self, x: Tensor) -> Tensor:
        """P^-1 and the turn."""
        return self._transform(x, self._keys, -self.sine)

    def outputs(self, x: Tensor) -> Tensor:
        """P and the turn back."""
        return self._transform(x, self._outputs, self.sine)

    def _transform(self, x: Tensor, matrix: Tensor, sine: Tensor) -> Tensor:
        still, seen = x.split([x.shape[-2] - self.tokens, self.tokens], dim=-2)
        half = matrix.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            rows = seen[..., :half].float().unflatten(-2, (self.cameras, -1))
            projected = (rows @ matrix).flatten(-3, -2).to(x.dtype)
        turned = turn(seen[..., half:], self.cosine, sine)
        return torch.cat([still, torch.cat([projected, turned], dim=-1)], dim=-2)


class Prope(nn.Module):
    """Makes :class:`ProjectivePositions` for cameras and a grid; what depends on the grid alone is computed once.

    Args:
        width: channels of a head; a multiple of 8.
        base: the slowest pair of channels turns by about 1 / base a position.
    """

    def __init__(self, width: int, base: float = 100.0) -> None:
        super().__init__()
        if width % 8:
            raise ModelError(f"PRoPE: the width of a head must be a multiple of 8, got {width}")
        self.projected = width // 2
        self.rope = Rope2d(self.projected, base)

    def forward(self, projection: Tensor, back: Tensor, grid: tuple[int, int]) -> ProjectivePositions:
        """Matrices (B, cameras, 4, 4) of :func:`projection_matrices` and the grid (rows, columns) of every camera."""
        cosine, sine = self.rope.tables(grid, projection.device, torch.float32)
        # PRoPE turns by the column first.
        return ProjectivePositions((projection, back), (cosine.flip(1), sine.flip(1)), self.projected)


def prope_attention(q: Tensor, k: Tensor, v: Tensor, positions: ProjectivePositions, *, mask: Tensor) -> Tensor:
    """Attention (B, heads, N, width) with PRoPE where the picture tokens stand anywhere in the sequence.

    Args:
        q: queries of all tokens.
        k: their keys.
        v: their values.
        positions: of the picture tokens.
        mask: (N,) or (B, N), not 0 for the tokens of the pictures, which are in their order; the others have no camera.

    ModelError when the mask marks another number of tokens than the pictures have.
    """
    marked = (mask != 0).expand(len(q), -1) if mask.ndim == 1 else mask != 0
    counts = sorted(set(marked.sum(1).tolist()))
    if marked.shape != (len(q), q.shape[-2]) or counts != [positions.tokens]:
        raise ModelError(
            f"PRoPE: the mask {tuple(mask.shape)} marks {counts} of {q.shape[-2]} tokens; the pictures have "
            f"{positions.tokens}"
        )
    # Attention does not mind the order of tokens: pictures behind, and back again.
    order = marked.long().argsort(dim=1, stable=True)
    index = order[:, None, :, None].expand(q.shape)
    q, k, v = (x.gather(2, index) for x in (q, k, v))
    out = F.scaled_dot_product_attention(positions.queries(q), positions.keys(k), positions.values(v))
    return torch.empty_like(out).scatter(2, index, positions.outputs(out))


def _square(extrinsics: Tensor) -> Tensor:
    if extrinsics.shape[-2:] == (3, 4):
        row = extrinsics.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*extrinsics.shape[:-2], 1, 4)
        return torch.cat([extrinsics, row], dim=-2)
    if extrinsics.shape[-2:] != (4, 4):
        raise ModelError(f"extrinsics are (..., 3, 4) or (..., 4, 4), got {tuple(extrinsics.shape)}")
    return extrinsics


def _block_diagonal(matrix: Tensor, width: int) -> Tensor:
    """(B, C, 4, 4) -> (B, 1, C, width, width): the matrix for every group of four channels, the same for all heads."""
    groups = width // _GROUP
    blocks = torch.einsum("gh,bcij->bcgihj", torch.eye(groups, device=matrix.device), matrix)
    shape: Sequence[int] = (*matrix.shape[:2], width, width)
    return blocks.reshape(*shape)[:, None]
