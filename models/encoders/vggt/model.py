"""VGGT whole: the aggregator, the camera head and the dense heads, under the names of the published checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.encoders.vggt.aggregator import Aggregator
from models.encoders.vggt.blocks import Grid
from models.encoders.vggt.camera import CameraHead
from models.encoders.vggt.dense import DenseHead
from models.errors import ModelError
from models.layers.attention import head_norm
from models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class VggtOutput:
    """What a pass over view sets gave; views in the order given. Everything but features is float32."""

    features: Tensor
    """(B, V, h * w, 2 C): patches of the last layer, not normalised, in the aggregator's dtype."""
    poses: list[Tensor]
    """Pose encodings (B, V, 9) of every iteration; see :mod:`models.encoders.vggt.poses`."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Whole outputs (B, V, prefix + h * w, 2 C) of the layers that were asked for."""
    depth: Tensor | None = None
    """(B, V, H, W), in the unit of the poses."""
    depth_conf: Tensor | None = None
    points: Tensor | None = None
    """(B, V, H, W, 3) in the world's frame."""
    points_conf: Tensor | None = None


class Vggt(nn.Module):
    """Views to features, poses, depth and points. Its state dict is the published layout, without the track head.

    Args:
        width, heads, depth, vit_depth, patch, image_size, registers, qk_norm: see :class:`Aggregator`.
        camera_depth, camera_heads, iterations: see :class:`CameraHead`.
        dpt_levels, dpt_features: see :class:`DenseHead`.
        dpt_layers: the four layers of the aggregator that the dense heads read, from 0.
        layer_scale: start of the layer scale in the aggregator and the camera head.
    """

    reference_ignored = ("track_head.*",)
    """Tracks points through the views; nothing here asks for it."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        depth: int,
        vit_depth: int,
        patch: int = 14,
        image_size: int = 518,
        registers: int = 4,
        camera_depth: int = 4,
        camera_heads: int = 16,
        iterations: int = 4,
        dpt_layers: Sequence[int],
        dpt_levels: Sequence[int],
        dpt_features: int,
        mlp_ratio: float = 4.0,
        rope_base: float = 100.0,
        qk_norm: str = "layernorm",
        layer_scale: float = 0.01,
    ) -> None:
        super().__init__()
        if len(dpt_layers) != len(dpt_levels) or not all(0 <= layer < depth for layer in dpt_layers):
            raise ModelError(f"VGGT: dpt_layers {list(dpt_layers)} must be four layers from 0 to {depth - 1}")
        self.depth, self.dpt_layers = depth, tuple(dpt_layers)
        self.aggregator = Aggregator(
            width=width, heads=heads, depth=depth, vit_depth=vit_depth, patch=patch, image_size=image_size,
            registers=registers, mlp_ratio=mlp_ratio, rope_base=rope_base, qk_norm=qk_norm, layer_scale=layer_scale,
        )  # fmt: skip
        self.camera_head = CameraHead(
            2 * width, depth=camera_depth, heads=camera_heads, iterations=iterations, mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
        )  # fmt: skip
        self.point_head, self.depth_head = (
            DenseHead(2 * width, kind=kind, levels=dpt_levels, features=dpt_features, patch=patch)
            for kind in ("points", "depth")
        )

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        *,
        keep: Collection[int] = (),
        depth: bool = True,
        points: bool = False,
        chunk: int = 8,
    ) -> VggtOutput:
        """Pictures (B, V, 3, H, W) in [0, 1] -> :class:`VggtOutput`; for the arguments see :meth:`from_patches`.

        ModelError for sides that are no multiples of the patch, and as in :meth:`Aggregator.forward`.
        """
        grid = self.aggregator.patch_embed.grid(images.shape[-2], images.shape[-1])
        tokens = self.aggregator.patch_tokens(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return self.from_patches(tokens, grid, targets, keep=keep, depth=depth, points=points, chunk=chunk)

    def from_patches(
        self,
        patch_tokens: Tensor,
        grid: Grid,
        targets: Tensor | None = None,
        *,
        keep: Collection[int] = (),
        depth: bool = True,
        points: bool = False,
        chunk: int = 8,
    ) -> VggtOutput:
        """Patch tokens (B, V, h * w, C) of the single views -> :class:`VggtOutput`.

        Args:
            patch_tokens: of :meth:`Aggregator.patch_tokens`.
            grid: rows h and columns w.
            targets: bool (B, V), see :meth:`Aggregator.forward`.
            keep: layers whose whole outputs are wanted; of the others only what the heads need is held.
            depth: whether the depth head runs.
            points: whether the point head runs.
            chunk: views that go through a dense head at a time; 0 takes all at once.
        """
        last, prefix = self.depth - 1, self.aggregator.prefix
        tapped = self.dpt_layers if depth or points else ()
        found = self.aggregator(patch_tokens, grid, targets, {*keep, *tapped, last})
        dense: dict[str, Tensor] = {}
        for name, head in (
            ("depth", self.depth_head if depth else None),
            ("points", self.point_head if points else None),
        ):
            if head is not None:
                values, confidence = head([found[layer][:, :, prefix:] for layer in tapped], grid, chunk=chunk)
                dense |= {name: values[..., 0] if name == "depth" else values, f"{name}_conf": confidence}
        return VggtOutput(
            features=found[last][:, :, prefix:],
            poses=self.camera_head(found[last][:, :, 0]),
            kept={layer: found[layer] for layer in keep},
            **dense,
        )

    def cast(self, dtype: torch.dtype) -> Vggt:
        """Hold the aggregator in ``dtype`` and the heads in float32; returns self."""
        self.float()
        self.aggregator.to(dtype)
        return self

    def adapt_reference(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take the kind of q/k norm in the global blocks from the checkpoint: see :func:`qk_norm_of`."""
        found = qk_norm_of(state_dict)
        if found is not None:
            self.set_qk_norm(found)
        return state_dict

    def set_qk_norm(self, kind: str) -> None:
        """Make the norm of queries and keys in the global blocks ``layernorm`` or ``rmsnorm``; weights stay."""
        for block in self.aggregator.global_blocks:
            for name in ("q_norm", "k_norm"):
                old = getattr(block.attn, name)
                weight = old.weight
                if isinstance(old, nn.LayerNorm) == (kind == "layernorm"):
                    continue
                with torch.device(weight.device):
                    new = head_norm(kind, weight.shape[0])
                new.to(weight.dtype).weight = weight
                setattr(block.attn, name, new)


def qk_norm_of(names: Iterable[str]) -> str | None:
    """``layernorm`` or ``rmsnorm``, by the names of a checkpoint; None where it has no such norm at all.

    Spa3R's released weights were trained behind global blocks with RMSNorm, which has no bias.
    """
    norms = [
        name
        for name in names
        if "aggregator.global_blocks." in name and ".attn." in name and name.split(".")[-2] in ("q_norm", "k_norm")
    ]
    if not norms:
        return None
    return "layernorm" if any(name.endswith(".bias") for name in norms) else "rmsnorm"


def _size(name: str, **sizes: object) -> ModelSpec:
    return ModelSpec(
        name=name, build=Vggt, defaults={"qk_norm": "layernorm", **sizes},
        doc="VGGT: features, poses, depth and points of a set of views. Frozen; no recipe trains it.",
    )  # fmt: skip


# The small ones start with a whole layer scale: at random, views would hardly see each other through 0.01.
VGGT_TINY = _size(
    "vggt-tiny", width=64, heads=4, depth=4, vit_depth=2, patch=14, image_size=112, registers=4, camera_depth=2,
    camera_heads=4, iterations=4, dpt_layers=(0, 1, 2, 3), dpt_levels=(16, 24, 32, 32), dpt_features=32,
    layer_scale=1.0,
)  # fmt: skip
VGGT_SMALL = _size(
    "vggt-small", width=384, heads=6, depth=12, vit_depth=12, patch=14, image_size=518, registers=4, camera_depth=4,
    camera_heads=12, iterations=4, dpt_layers=(2, 5, 8, 11), dpt_levels=(48, 96, 192, 384), dpt_features=64,
    layer_scale=1.0,
)  # fmt: skip
VGGT_1B = _size(
    "vggt-1b", width=1024, heads=16, depth=24, vit_depth=24, patch=14, image_size=518, registers=4, camera_depth=4,
    camera_heads=16, iterations=4, dpt_layers=(4, 11, 17, 23), dpt_levels=(256, 512, 1024, 1024), dpt_features=256,
    layer_scale=0.01,
)  # fmt: skip
