"""The transformer block that all of VGGT is built of, under its published names, and the ViT of the single views."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.layers.attention import Attention, Rotate
from models.layers.block import LayerScale, Mlp

Grid = tuple[int, int]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def exactly(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast on the tensor's device: what is computed inside keeps the dtypes that it is given."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


class ScaledBlock(nn.Module):
    """The pre-norm block of DINOv2 with layer scale, over tokens (B, N, width).

    :class:`models.layers.block.Block` computes the same; the names here are those of the published checkpoint.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        qk_norm: bool | str = False,
        layer_scale: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qk_norm=qk_norm)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x: Tensor, *, rotate: Rotate | None = None, context: int = 0) -> Tensor:
        """(B, N, width) -> (B, N, width); ``context`` as in :meth:`Attention.forward`."""
        x = x + self.ls1(self.attn(self.norm1(x), rotate=rotate, context=context))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoViT(nn.Module):
    """DINOv2's ViT with registers (Darcet et al. 2024): pictures to normalised patch tokens.

    Class token and registers serve the attention and are thrown away.

    Args:
        width, depth, heads: of the blocks.
        patch: pixels of a patch's side.
        image_size: pixels of the square that the position embedding was learned on.
        registers: register tokens.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        image_size: int,
        registers: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ModelError(f"VGGT: image_size {image_size} is no multiple of the patch, {patch}")
        self.patch, self.side = patch, image_size // patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.side**2, width))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width))
        # Of DINOv2's pretraining: in the checkpoint, read by no forward pass.
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.blocks = nn.ModuleList(ScaledBlock(width, heads, mlp_ratio=mlp_ratio, eps=1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for token in (self.cls_token, self.pos_embed, self.register_tokens):
            nn.init.trunc_normal_(token, std=0.02)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the patches of a picture. ModelError for sides that are no multiples of the patch."""
        if height < 1 or width < 1 or height % self.patch or width % self.patch:
            raise ModelError(
                f"VGGT: pictures of {height}x{width} pixels: both sides must be positive multiples of the patch, "
                f"{self.patch}"
            )
        return height // self.patch, width // self.patch

    def positions(self, grid: Grid) -> Tensor:
        """Position embedding (1, 1 + N, width) of the class token and a grid, resampled where the grid is another."""
        if grid == (self.side, self.side):
            return self.pos_embed
        learned = self.pos_embed[:, 1:].float().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        resampled = F.interpolate(learned, size=grid, mode="bicubic", antialias=True)
        patches = resampled.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] -> patch tokens (N, h * w, width), row by row."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.tokens((images - mean) / std)

    def tokens(self, pixels: Tensor) -> Tensor:
        """The same of pictures that were normalised before."""
        grid = self.grid(pixels.shape[-2], pixels.shape[-1])
        x = self.patch_embed["proj"](pixels.to(self.pos_embed.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(grid)
        x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1 + self.register_tokens.shape[1] :])
