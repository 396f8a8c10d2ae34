"""Micro-batches of UniUGG's second and third training, made of noise, with the columns that the streams give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]

CHANNELS = 96
"""Of a token of size tiny."""
IMAGE, RAY = 261, 264
"""Placeholders of size tiny."""


def _cameras(number: int, height: int, width: int, g: torch.Generator) -> Batch:
    angle = torch.randn(number, generator=g) * 0.3
    pose = torch.eye(4).repeat(number, 2, 1, 1)
    pose[:, 1, 0, 0] = pose[:, 1, 2, 2] = angle.cos()
    pose[:, 1, 0, 2], pose[:, 1, 2, 0] = angle.sin(), -angle.sin()
    pose[:, 1, :3, 3] = torch.randn(number, 3, generator=g) * 0.3
    K = torch.tensor([[0.9 * width, 0.0, (width - 1) / 2], [0.0, 0.9 * width, (height - 1) / 2], [0.0, 0.0, 1.0]])
    return {"K": K.repeat(number, 2, 1, 1), "pose": pose}


def _common(kind: str, number: int, seed: int) -> Batch:
    return {
        "kind": kind,
        "id": [f"{kind}{seed}/{i}" for i in range(number)],
        "weight": torch.ones(number),
        "draw": torch.arange(number) + 100 * seed,
    }


def pairs(number: int = 2, grid: tuple[int, int] = (2, 3), *, matches: int = 24, seed: int = 0) -> Batch:
    """Kind ``pair`` of the second training."""
    g = torch.Generator().manual_seed(seed)
    height, width = 16 * grid[0], 16 * grid[1]
    return {
        **_common("pair", number, seed),
        **_cameras(number, height, width, g),
        "tokens": torch.randn(number, 2, 1, *grid, CHANNELS, generator=g),
        "image": torch.randint(0, 256, (number, 2, height, width, 3), dtype=torch.uint8, generator=g),
        "depth": torch.rand(number, 2, height, width, generator=g) + 1,
        "matches": torch.randint(0, height * width, (number, 2, matches), dtype=torch.int32, generator=g),
        "match_valid": torch.rand(number, matches, generator=g) < 0.5,
    }


def generation(number: int = 2, grid: tuple[int, int] = (2, 3), *, seed: int = 0, channels: int = CHANNELS) -> Batch:
    """Kind ``generation``, with what LLM, diffusion and the direct variant read."""
    g = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    ids = [5, *[IMAGE] * patches, 6, *[RAY] * patches, 7]
    return {
        **_common("generation", number, seed),
        **_cameras(number, 16 * grid[0], 16 * grid[1], g),
        "tokens": torch.randn(number, 1, *grid, channels, generator=g),
        "target_tokens": torch.randn(number, 1, *grid, channels, generator=g),
        "mean": torch.randn(number, 4, 2 * grid[0], 2 * grid[1], generator=g),
        "logvar": torch.randn(number, 4, 2 * grid[0], 2 * grid[1], generator=g) - 2,
        "input_ids": torch.tensor(ids).repeat(number, 1),
        "supervised": torch.zeros(number, len(ids), dtype=torch.bool),
    }


def conversation(
    views: tuple[int, ...] = (1, 2), grid: tuple[int, int] = (2, 3), *, seed: int = 0, answer: int = 4
) -> Batch:
    """Kind ``conversation``: sample i shows ``views[i]`` views, asks three tokens and answers ``answer + i``."""
    g = torch.Generator().manual_seed(seed)
    patches, rows, taught = grid[0] * grid[1], [], []
    for index, shown in enumerate(views):
        question = [5, *([7, *[IMAGE] * patches] * shown), 9, 10, 11]
        reply = torch.randint(20, 250, (answer + index,), generator=g).tolist()
        rows.append([*question, *reply])
        taught.append([False] * len(question) + [True] * len(reply))
    longest = max(map(len, rows))
    return {
        **_common("conversation", len(views), seed),
        "tokens": torch.randn(len(views), max(views), 1, *grid, CHANNELS, generator=g),
        "tokens_lengths": torch.tensor(views)[:, None],
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "input_ids_lengths": torch.tensor([[len(row)] for row in rows]),
        "supervised": torch.tensor([row + [False] * (longest - len(row)) for row in taught]),
    }


def take(batch: Batch, *rows: int) -> Batch:
    """Some samples of a batch."""
    index = torch.tensor(rows)
    return {
        name: value[index] if isinstance(value, Tensor) else [value[i] for i in rows] if name == "id" else value
        for name, value in batch.items()
    }


def broken(batch: Batch, row: int) -> Batch:
    """The same batch with one sample that could not be read: all zeros, as the loader makes it."""
    copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
    for name, value in copied.items():
        if isinstance(value, Tensor) and name != "draw":
            value[row] = 0
    return copied


def filler(batch: Batch, row: int) -> Batch:
    """The same batch with one whole sample that does not count."""
    weight = batch["weight"].clone()
    weight[row] = 0
    return {**batch, "weight": weight}
