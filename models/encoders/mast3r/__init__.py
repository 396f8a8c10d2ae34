"""MASt3R (Leroy et al. 2024, arXiv 2406.09756): two views to pointmaps in the first view's frame, and descriptors."""

from __future__ import annotations

from models.encoders.mast3r.activations import Activations
from models.encoders.mast3r.decoder import DecoderBlock, DualDecoder
from models.encoders.mast3r.head import PairHead
from models.encoders.mast3r.model import Mast3r

__all__ = ["Activations", "DecoderBlock", "DualDecoder", "Mast3r", "PairHead"]
