"""Building blocks that several models share."""

from __future__ import annotations

from models.layers.attention import Attention, CrossAttention
from models.layers.block import Block, Mlp
from models.layers.dpt import DPTHead, DPTTail, DPTTrunk
from models.layers.linear import Linear
from models.layers.rope import Rope2d

__all__ = ["Attention", "Block", "CrossAttention", "DPTHead", "DPTTail", "DPTTrunk", "Linear", "Mlp", "Rope2d"]
