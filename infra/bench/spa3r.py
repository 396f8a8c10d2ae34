"""``make bench NAME=spa3r``: VGGT, Spa3R's training on cached features, and Spa3-VLM; collected here."""

from __future__ import annotations

import sys
from importlib import import_module

from infra.bench.harness import Bench, main

#: Each has a ``TABLE`` of benchmarks.
GROUPS = ("spa3r_vggt", "spa3r_cached", "spa3r_vlm", "spa3r_lora")

_DENSE = "the same with the dense boolean mask, made once"
_EXPLICIT = "attention written out, all 24 outputs kept, RoPE tables in every call"
_ONE_WHOLE = "its half, the largest tensor, the updates, 12 MiB"
_PART = "its half, half of the largest tensor, the updates, 12 MiB"

#: Name -> what is measured, and what it is compared with, as the document says it.
ROWS = {
    "global_attention": (
        "attention of one global block, 12 views, half of them context, 256 patches, width 768",
        _DENSE,
    ),
    "aggregator": ("the whole aggregator behind the cached single-view stage, same size", _DENSE),
    "one_pass": ("one joint pass of the aggregator, same size", "two passes: the context alone, then all views"),
    "vggt_memory": ("peak of VGGT of width 384, 24 layers, 8 views of 224 px", _EXPLICIT),
    "vggt_time": ("time of the same", _EXPLICIT),
    "pretrain_cached": (
        "a step of pre-training with VGGT and the semantic encoder online / from the cache",
        "the ideal: (encoding + training) / training, each measured alone",
    ),
    "vlm_packed": (
        "tokens that the language model reads for 8 questions about 8 frames of 252 tokens, in one sample",
        "8 samples, each with all frames",
    ),
    "answer_prefix": ("20 answers about one scene, its frames read once", "one by one, each with all frames"),
    "lora_zero3": ("a step with low-rank updates and ZeRO-3, 2 ranks", "the same on FSDP2"),
    "load_zero3_small": ("host memory of a rank of 2 at the peak of loading 236 MiB, ZeRO-3", _ONE_WHOLE),
    "load_zero3": ("the same of 644 MiB", _ONE_WHOLE),
    "load_fsdp2_small": ("the same of 236 MiB, FSDP2", _PART),
    "load_fsdp2": ("the same of 644 MiB, FSDP2", _PART),
}


def table() -> list[Bench]:
    """All benchmarks of the groups, in order."""
    return [bench for group in GROUPS for bench in import_module(f"infra.bench.{group}").TABLE]


if __name__ == "__main__":
    sys.exit(main(table(), isolated="infra.bench.spa3r"))
