"""What one view's decoder features are read out to: points, confidences, descriptors, and optionally colours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.mast3r import activations
from models.encoders.mast3r.activations import Activations
from models.layers.block import Mlp
from models.layers.dpt import DPTTail, DPTTrunk


class PairHead(nn.Module):
    """A DPT for points and confidence, an MLP for local features, and a tail for colours beside the DPT's own.

    Everything here is computed in float32, whatever autocast says: the exponentials at the end would leave bfloat16 no
    digits.

    Args:
        in_width: channels of the first features (what the decoder was given).
        width: channels of the others.
        depth: blocks of the decoder; the DPT reads features 0, depth / 2, 3 depth / 4 and the last.
        patch: pixels of a patch's side.
        descriptor: channels D of a descriptor.
        dpt_levels, dpt_width: see :class:`models.layers.dpt.DPTTrunk`.
        rgb_hidden: channels before the last layer of the colour tail; 0 for no colours.
        own_confidence: the descriptors have a confidence of their own; otherwise they take the points'.
        modes: activations of the outputs.
    """

    def __init__(
        self,
        *,
        in_width: int,
        width: int,
        depth: int,
        patch: int,
        descriptor: int,
        dpt_levels: Sequence[int],
        dpt_width: int,
        rgb_hidden: int = 0,
        own_confidence: bool = True,
        mlp_ratio: float = 4.0,
        modes: Activations | None = None,
    ) -> None:
        super().__init__()
        self.hooks = (0, depth // 2, depth * 3 // 4, depth)
        self.patch, self.descriptor = patch, descriptor
        self.own_confidence, self.modes = own_confidence, modes or Activations()
        channels = [width if hook else in_width for hook in self.hooks]
        self.dpt = DPTTrunk(in_channels=channels, level_channels=dpt_levels, width=dpt_width, crop=True)
        self.points = DPTTail(dpt_width, 4, dpt_width // 2)
        self.rgb = DPTTail(dpt_width, 3, rgb_hidden) if rgb_hidden else None
        joint = in_width + width
        self.local = Mlp(joint, int(mlp_ratio * joint), (descriptor + own_confidence) * patch**2)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
        """The decoder's features (B, N, C) of one view -> maps of height H = rows * patch, W = columns * patch.

        ``pts3d`` (B, H, W, 3), ``conf`` (B, H, W), ``desc`` (B, H, W, D) of unit length, ``desc_conf`` (B, H, W), and
        with colours ``rgb`` (B, H, W, 3) in [0, 1]; all float32.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            return self._read([features[hook].float() for hook in self.hooks], grid)

    def _read(self, features: Sequence[Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
        size = (grid[0] * self.patch, grid[1] * self.patch)
        path = self.dpt([feature.unflatten(1, grid) for feature in features])
        raw = self.points(path, size).permute(0, 2, 3, 1)
        conf = activations.confidence(raw[..., 3], self.modes.confidence)
        local = self._local(torch.cat([features[0], features[-1]], dim=-1), grid)
        view = {
            "pts3d": activations.points(raw[..., :3], self.modes.depth),
            "conf": conf,
            "desc": activations.descriptors(local[..., : self.descriptor]),
            "desc_conf": (
                activations.confidence(local[..., self.descriptor], self.modes.descriptor_confidence)
                if self.own_confidence
                else conf.clone()
            ),
        }
        if self.rgb is not None:
            view["rgb"] = torch.sigmoid(self.rgb(path, size)).permute(0, 2, 3, 1)
        return view

    def _local(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, H, W, channels): every token's features spread over the pixels of its patch."""
        maps = self.local(tokens).unflatten(1, grid).permute(0, 3, 1, 2)
        return F.pixel_shuffle(maps, self.patch).permute(0, 2, 3, 1)

    def published(self, ours: str, theirs: str) -> dict[str, str]:
        """Tensor name under prefix ``ours`` -> MASt3R's name under prefix ``theirs`` (``downstream_head1``)."""
        names = {}
        for name in self.state_dict():
            part, _, rest = name.partition(".")
            if part == "dpt":
                named = f"{theirs}.dpt.{_trunk_name(rest)}"
            elif part == "local":
                named = f"{theirs}.head_local_features.{rest}"
            else:
                head = {"points": "head", "rgb": "rgb_head"}[part]
                named = f"{theirs}.dpt.{head}.{_tail_name(rest)}"
            names[f"{ours}.{name}"] = named
        return names


def _trunk_name(name: str) -> str:
    """DPTTrunk's name -> published, e.g. ``fuse.0.residual1.conv1.weight``."""
    part, level, rest = name.split(".", 2)
    if part in ("project", "resample"):
        return f"act_postprocess.{level}.{('project', 'resample').index(part)}.{rest}"
    number = int(level) + 1
    if part == "reduce":
        return f"scratch.layer{number}_rn.{rest}"
    for own, theirs in (("residual1", "resConfUnit1"), ("residual2", "resConfUnit2"), ("out", "out_conv")):
        rest = rest.replace(f"{own}.", f"{theirs}.", 1)
    return f"scratch.refinenet{number}.{rest}"


def _tail_name(name: str) -> str:
    """DPTTail's name -> the published sequence, whose second entry is the upsampling and fourth the ReLU."""
    for own, theirs in (("neck.", "0."), ("head.0.", "2."), ("head.2.", "4.")):
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    raise AssertionError(f"no published name for {name}")
