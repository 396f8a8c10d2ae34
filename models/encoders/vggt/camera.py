"""VGGT's camera head: the camera tokens of all views to their poses, refined a few times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.vggt.blocks import ScaledBlock, exactly
from models.encoders.vggt.poses import ENCODING
from models.layers.block import Mlp
from models.layers.linear import Linear


class CameraHead(nn.Module):
    """Attention over the camera tokens (B, V, width), modulated by the pose so far (adaptive norm, Peebles and Xie).

    Everything is float32, whatever autocast and the aggregator's dtype are. Target views are no secret here: this
    attention reads the tokens of all views.

    Args:
        width: channels of a token, twice those of the aggregator.
        depth, heads: of the trunk, whose weights serve every iteration.
        iterations: how often the pose is refined.
    """

    def __init__(
        self,
        width: int,
        *,
        depth: int = 4,
        heads: int = 16,
        iterations: int = 4,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.01,
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.trunk = nn.ModuleList(
            ScaledBlock(width, heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale) for _ in range(depth)
        )
        self.token_norm = nn.LayerNorm(width)
        self.trunk_norm = nn.LayerNorm(width)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, ENCODING))
        self.embed_pose = Linear(ENCODING, width)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))
        self.pose_branch = Mlp(width, width // 2, ENCODING)
        self._start_with_a_camera()

    @torch.no_grad()
    def _start_with_a_camera(self) -> None:
        """Random weights give cameras too: no rotation without translation, and a field of view that is about 1 rad."""
        last = self.pose_branch.fc2
        last.bias.zero_()
        last.bias[6:] = 1.0 / self.iterations
        last.weight[7:] *= 0.02

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Camera tokens (B, V, width) -> float32 pose encodings (B, V, 9) of every iteration, the last one is best."""
        with exactly(tokens):
            return self._refine(self.token_norm(tokens.float()))

    def _refine(self, tokens: Tensor) -> list[Tensor]:
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        state: Tensor | None = None
        poses = []
        for _ in range(self.iterations):
            # Each iteration learns to correct what it is given, hence no gradient through the one before.
            before = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if state is None else state.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(before)).chunk(3, dim=-1)
            x = tokens + gate * (normed * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            change = self.pose_branch(self.trunk_norm(x))
            state = change if state is None else before + change
            poses.append(torch.cat([state[..., :7], F.relu(state[..., 7:])], dim=-1))
        return poses
