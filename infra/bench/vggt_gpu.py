"""``make bench NAME=vggt_gpu``: VGGT's forward pass in bfloat16 on a GPU, one JSON object a number of frames.

Milliseconds of a pass from pictures to features, poses and depth, the most memory it held, weights included, and its
rate (TFLOP/s). Weights are random: they change no figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

FRAMES = (8, 24, 90)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the lines; 1 where there is no GPU and none other was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vggt-1b")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--size", type=int, nargs=2, default=(378, 518), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cpu runs too, for a look: it has no peak of memory")
    arguments = parser.parse_args(argv)
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("vggt_gpu: there is no GPU here; nothing was measured", file=sys.stderr)
        return 1
    import models

    with torch.device(arguments.device), torch.no_grad():
        model: Any = models.build(arguments.model)
        model.eval().requires_grad_(False).cast(torch.bfloat16)
        for frames in arguments.frames:
            print(json.dumps(_measure(model, frames, arguments)), flush=True)
    return 0


def _measure(model: Any, frames: int, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    on_gpu = arguments.device == "cuda"
    images = torch.rand(1, frames, 3, *arguments.size)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    samples = []
    for _ in range(arguments.rounds + 1):
        start = time.perf_counter()
        model(images)
        if on_gpu:
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    seconds, work = statistics.median(samples[1:]), _flops(arguments, frames)
    return {
        "name": f"{arguments.model}-{frames}",
        "value": round(seconds * 1e3, 2),
        "unit": "ms",
        "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "tflops": round(work / seconds / 1e12, 2),
        "extra": {
            "frames": frames,
            "flop": work,
            "pixels": list(arguments.size),
            "rounds": arguments.rounds,
            "device": torch.cuda.get_device_name() if on_gpu else arguments.device,
            "torch": torch.__version__,
        },
    }


def _flops(arguments: argparse.Namespace, frames: int) -> int:
    """Floating-point operations of a pass, counted on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import models

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        models.build(arguments.model).requires_grad_(False)(torch.empty(1, frames, 3, *arguments.size))
    return int(counter.get_total_flops())


if __name__ == "__main__":
    sys.exit(main())
