"""Building blocks that several models share."""

from __future__ import annotations

from models.layers.attention import Attention
from models.layers.block import Block, Mlp
from models.layers.dpt import DPTHead

__all__ = ["Attention", "Block", "DPTHead", "Mlp"]
