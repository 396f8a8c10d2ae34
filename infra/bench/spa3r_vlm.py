"""Benchmarks of Spa3-VLM: several questions behind one visual prefix, in training and when they are answered.

``vlm_packed`` counts the tokens that the language model reads for eight questions about one video, packed and
separate, and times both steps; ``answer_prefix`` times twenty answers about one scene. A language model of random
weights reads eight frames of 4:3 as the published one does: 252 merged tokens each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from infra.bench.harness import Bench, Context, Measured, Target

THREADS = 2
QUESTIONS, ASKED = 8, 20
FRAMES, GRID = 8, (14, 18)
WORDS = 60
"""Tokens of a question with its answer."""
ANSWER = 4
"""Of them, those that are supervised; and new tokens of an answer."""
PLACEHOLDER, START, END = 266, 265, 267
_TOLERANCE = 1e-5


def _model(context: Context) -> Any:
    """Spa3-VLM of width 512 (quick: 128) with random weights, its adapter awake."""
    import torch

    import models

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model: Any = models.build("spa3-vlm-tiny" if context.quick else "spa3-vlm-small", image_token_id=PLACEHOLDER)
    torch.nn.init.normal_(model.adapter.mlp.fc2.weight, std=0.02)
    return model


def _ids(frames: int, grid: tuple[int, int]) -> list[int]:
    """A prefix: some words and a block for each frame."""
    block = [START, *[PLACEHOLDER] * (grid[0] * grid[1]), END]
    return [*range(32, 56), *(token for _ in range(frames) for token in block)]


def _question(number: int) -> list[int]:
    """Tokens of a question with its answer, different from the first one on."""
    return [97 + number, *((7 * place + 13 * number) % 200 for place in range(WORDS - 1))]


def _scene(model: Any, frames: int, grid: tuple[int, int]) -> dict[str, Any]:
    """Columns of the pictures of one sample."""
    import torch

    draw = torch.Generator().manual_seed(1)
    return {
        "visual": torch.randn(1, frames * grid[0] * grid[1], model.width, generator=draw),
        "grids": torch.tensor([[list(grid)] * frames]),
        "latents": torch.randn(1, 256, model.latent_channels, generator=draw),
    }


def _batch(packed: Any, scene: dict[str, Any], name: str) -> dict[str, Any]:
    import torch

    return {
        **scene, "kind": "conversation", "id": [name], "weight": torch.ones(1),
        "input_ids": torch.tensor([packed.ids]), "supervised": torch.tensor([packed.supervised]),
        "segments": torch.tensor([packed.segments]),
    }  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prepare_packed(context: Context) -> Measured:
    """Tokens of one step's forward pass; the extra has the time of a step, forward and backward, on both sides."""
    import torch

    from models.spa3r.vlm.packing import pack, unpack
    from models.spa3r.vlm.spec import counts, step

    model = _model(context)
    frames, grid = context.size(FRAMES, 2), (context.size(GRID[0], 6), context.size(GRID[1], 8))
    marks = [False] * (WORDS - ANSWER) + [True] * ANSWER
    whole = pack(_ids(frames, grid), [(_question(number), marks) for number in range(QUESTIONS)])
    scene = _scene(model, frames, grid)
    sides = {
        "packed": [_batch(whole, scene, "all")],
        "separate": [_batch(one, scene, str(number)) for number, one in enumerate(unpack(whole))],
    }
    times: dict[str, list[float]] = {"packed": [], "separate": []}
    sums: dict[str, tuple[float, float]] = {}

    def train(side: str) -> float:
        """A step's sums and gradients; returns the tokens that were read."""
        model.zero_grad()
        start, total, count = time.perf_counter(), 0.0, 0.0
        for batch in sides[side]:
            loss = step(model, batch, {}).sums["ce"]
            loss.backward()
            total, count = total + float(loss.detach()), count + counts(batch)["ce"]
        times[side].append(time.perf_counter() - start)
        sums[side] = (total, count)
        return float(sum(batch["input_ids"].numel() for batch in sides[side]))

    def extra() -> dict[str, Any]:
        (total, count), (other, number) = sums["packed"], sums["separate"]
        error = abs(total - other) / abs(other)
        if count != number or error > _TOLERANCE:
            raise AssertionError(
                f"vlm_packed: the sums are {total} of {count} tokens packed and {other} of {number} separate; they "
                f"differ by {error:.2e}, allowed {_TOLERANCE:g}"
            )
        best = {side: min(found) for side, found in times.items()}
        return {
            "error": error, "step_s": best["packed"], "step_baseline_s": best["separate"],
            "step_ratio": best["packed"] / best["separate"], "questions": QUESTIONS, "torch": torch.__version__,
        }  # fmt: skip

    return Measured(value=lambda: train("packed"), baseline=lambda: train("separate"), extra=extra)


def prepare_answers(context: Context) -> Measured:
    """Seconds of twenty answers about one scene: behind one prefix, and each question with all frames by itself."""
    from models.spa3r.vlm.answers import generate_text

    model = _model(context).eval()
    frames, grid = context.size(FRAMES, 2), (context.size(GRID[0], 2), context.size(GRID[1], 3))
    asked, front = context.size(ASKED, 3), _ids(frames, grid)
    prompts = [[*front, *_question(number)] for number in range(asked)]
    scene = _scene(model, frames, grid)
    found: dict[str, list[list[int]]] = {}

    def together() -> None:
        found["together"] = generate_text(model, prompts, scene, max_new_tokens=ANSWER, stop=())

    def alone() -> None:
        found["alone"] = [
            generate_text(model, [prompt], scene, max_new_tokens=ANSWER, stop=())[0] for prompt in prompts
        ]

    def extra() -> dict[str, Any]:
        if found["together"] != found["alone"]:
            raise AssertionError(f"answer_prefix: {found['together']} behind one prefix, {found['alone']} one by one")
        return {"questions": asked, "new_tokens": ANSWER, "prefix_tokens": len(front)}

    return Measured(value=lambda: _seconds(together), baseline=lambda: _seconds(alone), extra=extra)


TABLE = [
    Bench(name="vlm_packed", unit="tokens", target=Target(on="ratio", op="<=", limit=0.33), prepare=prepare_packed,
          rounds=3),
    Bench(name="answer_prefix", unit="s", target=Target(on="ratio", op="<=", limit=0.2), prepare=prepare_answers,
          rounds=3),
]  # fmt: skip
