"""A very small Spa3-VLM and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import models
from models.spa3r.vlm.packing import Packed, pack

VOCABULARY, PAD, START, END = 300, 290, 292, 293
WIDTH, LATENT = 32, 12
LANGUAGE: dict[str, Any] = {
    "text_config": {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1], "window_size": 56,
    },
    "tie_word_embeddings": True,
}  # fmt: skip


def small_vlm(seed: int = 0, *, awake: bool = False, **changes: Any) -> Any:
    """The model in eval mode; ``awake`` gives the adapter's last layer values, so that latents matter."""
    torch.manual_seed(seed)
    settings = {"language": LANGUAGE, "vocab_size": VOCABULARY, "image_token_id": PAD, "latent_channels": LATENT}
    model: Any = models.build("spa3-vlm-tiny", **{**settings, **changes})
    if awake:
        torch.nn.init.normal_(model.adapter.mlp.fc2.weight)
        torch.nn.init.normal_(model.adapter.mlp.fc2.bias)
    return model.eval()


def blocks(grids: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of images with these merged grids."""
    return [token for rows, columns in grids for token in (START, *[PAD] * (rows * columns), END)]


def sample(grids: Sequence[tuple[int, int]], questions: int = 1, seed: int = 0) -> Packed:
    """Questions of two to five tokens, of which the last two are supervised, behind a text and images."""
    draw = torch.Generator().manual_seed(seed)
    asked = []
    for number in range(questions):
        ids = torch.randint(0, 256, (2 + (seed + number) % 4,), generator=draw).tolist()
        asked.append((ids, [False] * (len(ids) - 2) + [True] * 2))
    return pack([7, 8, *blocks(grids)], asked)


def batch_of(samples: Sequence[Packed], grids: Sequence[Sequence[tuple[int, int]]], seed: int = 0) -> dict[str, Any]:
    """Columns of samples; those with the same grids show the same pictures and have the same latents."""

    def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        length = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

    def random(key: Any, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(17 * r + c for r, c in key)))

    visual = [random(frames, sum(r * c for r, c in frames), WIDTH) for frames in grids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "kind": "conversation",
        "id": [f"sample {number}" for number in range(len(samples))],
        "weight": torch.ones(len(samples)),
        "input_ids": padded([row.ids for row in samples], 0),
        "supervised": padded([row.supervised for row in samples], 0).bool(),
        "segments": padded([row.segments for row in samples], -1),
        "visual": pad(visual, batch_first=True),
        "visual_lengths": torch.tensor([len(tokens) for tokens in visual]),
        "grids": pad([torch.tensor(frames).reshape(-1, 2) for frames in grids], batch_first=True),
        "grids_lengths": torch.tensor([len(frames) for frames in grids]),
        "latents": torch.stack([random((*frames, (9, 9)), 5, LATENT) for frames in grids]),
    }
