"""The published layout of DUSt3R's and MASt3R's checkpoints: names of the decoder and the heads, and what varies."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from models.encoders.mast3r.decoder import DualDecoder
from models.encoders.mast3r.head import PairHead

UNUSED = ("mask_token", "*.scratch.refinenet4.resConfUnit1.*")
"""Globs of published tensors that no forward pass reads: the mask of CroCo's pretraining, and the residual unit for the
skip of a level that has none."""

ENCODER = ("patch_embed.*", "enc_blocks.*", "enc_norm.*")
"""Globs of the CroCo encoder's tensors."""


def decoder_names(decoder: DualDecoder, head1: PairHead, head2: PairHead) -> dict[str, str]:
    """Our name -> published name, of children ``decoder``, ``head1`` and ``head2`` of a model."""
    parts = {"embed": "decoder_embed", "blocks1": "dec_blocks", "blocks2": "dec_blocks2", "norm": "dec_norm"}
    names = {}
    for name in decoder.state_dict():
        part, _, rest = name.partition(".")
        names[f"decoder.{name}"] = f"{parts[part]}.{rest}"
    return names | head1.published("head1", "downstream_head1") | head2.published("head2", "downstream_head2")


def adapt(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring a published state dict to the one form that names are matched with.

    ``scratch.layer_rn.{i}`` is the same tensor as ``scratch.layer{i+1}_rn`` under a second name: it is dropped, or
    takes the first name where only it is there. DUSt3R's checkpoints without a second stack (no ``dec_blocks2``)
    get a copy of the first.
    """
    state = {}
    for name, tensor in state_dict.items():
        first = re.sub(r"\.scratch\.layer_rn\.(\d)\.", lambda m: f".scratch.layer{int(m[1]) + 1}_rn.", name)
        if first == name or first not in state_dict:
            state[first] = tensor
    if not any(name.startswith("dec_blocks2.") for name in state):
        stack = {name: tensor for name, tensor in state.items() if name.startswith("dec_blocks.")}
        state |= {name.replace("dec_blocks.", "dec_blocks2.", 1): tensor for name, tensor in stack.items()}
    return state
