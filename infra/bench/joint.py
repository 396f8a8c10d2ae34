"""``make bench NAME=joint``: joint training, the bridge between roles, and UniUGG's networks; collected here."""

from __future__ import annotations

import sys
from importlib import import_module

from infra.bench.harness import Bench, main

#: Each has a ``TABLE`` of benchmarks.
GROUPS = ("joint_step", "joint_bridge", "joint_cached", "joint_models")

_ONE_WAY = "gloo's send and receive of the same tensor"

#: Name -> what is measured, and what it is compared with, as the document says it.
ROWS = {
    "joint_overlap": (
        "joint step, LLM and diffusion in two processes with one core each",
        "the longer of the two, each alone on one core",
    ),
    "bridge_1mb": ("UniUGG's condition of 1 MiB, one way over the edge", _ONE_WAY),
    "bridge_16mb": ("the same, 16 MiB", _ONE_WAY),
    "bridge_64mb": ("the same, 64 MiB", _ONE_WAY),
    "p3_cached": (
        "joint stage, ViT-S and VAE encoding online / from the cache",
        "the ideal (encode + train) / train",
    ),
    "mast3r_decoder": (
        "dual decoder, 12 + 12 blocks, 24x32 tokens, forward and backward of a pair",
        "explicit softmax attention with RoPE computed in every call",
    ),
    "matching_memory": ("peak of the matching loss with 8192 points", "the dense formulation, equal value"),
}


def table() -> list[Bench]:
    """All benchmarks of the groups, in order."""
    return [bench for group in GROUPS for bench in import_module(f"infra.bench.{group}").TABLE]


if __name__ == "__main__":
    sys.exit(main(table(), isolated="infra.bench.joint"))
