"""Pictures of a predicted field: features as colours in one basis for prediction and target, and the probe's depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from actors.recipes.pictures import Album, colour_depth, hstack

if TYPE_CHECKING:
    from actors.recipes.spa3r_judge import Seen
    from services.contracts import PlanSample

TITLES: Mapping[str, str] = {"geo": "VGGT", "sem": "semantic", "clip": "CLIP"}
_MODEL = "model"
_HEIGHT = 112
"""Height of a tile, pixels."""
_HEAD = 14
"""Height of the line of names above, pixels."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One view set: its target views and what was predicted there. n patches lie on ``grid``."""

    name: str
    contexts: int
    places: tuple[int, ...]
    """Views of the scene that are targets."""
    images: np.ndarray
    """uint8 (T, H, W, 3)."""
    truth: Mapping[str, Tensor]
    """Target -> (T, n, C)."""
    predicted: Mapping[str, Tensor]
    depth: tuple[Tensor, Tensor] | None
    """VGGT's and the probe's, (T, n) each."""
    grid: tuple[int, int]

    @classmethod
    def of(cls, batch: Mapping[str, Any], seen: Seen, samples: list[PlanSample]) -> list[Shown]:
        """Every sample of a batch that :func:`look` has seen, on the CPU."""
        grid = (batch["tokens"].shape[3], batch["tokens"].shape[4])
        made = []
        for i, sample in enumerate(samples):
            at = seen.targets[i].tolist()
            made.append(
                cls(
                    name=f"{sample.source}/{sample.item}",
                    contexts=seen.contexts,
                    places=tuple(sample.views[place].index for place in at),
                    images=batch["image"][i].cpu().numpy()[at],
                    truth={name: true[i].cpu() for name, true in seen.truth.items()},
                    predicted={name: guess[_MODEL][i].cpu() for name, guess in seen.guesses.items()},
                    depth=None if seen.depth is None else (seen.depth[i].cpu(), seen.depths[_MODEL][i].cpu()),
                    grid=grid,
                )
            )
        return made


def draw_field(album: Album, shown: Shown) -> None:
    """A row for each target view: the picture; of every target what is there and what was predicted; both depths."""
    colours = {name: shared_colours(true, shown.predicted[name], shown.grid) for name, true in shown.truth.items()}
    names = ["picture", *(f"{TITLES[name]}{what}" for name in colours for what in ("", ", predicted"))]
    names += ["depth by VGGT", "by the probe"] if shown.depth is not None else []
    rows = []
    for view in range(len(shown.places)):
        tiles = [shown.images[view]]
        for true, guess in colours.values():
            tiles += [true[view], guess[view]]
        if shown.depth is not None:
            true_depth, guessed = (depth[view].view(shown.grid).float().numpy() for depth in shown.depth)
            low, high = float(true_depth.min()), float(true_depth.max())
            tiles += [colour_depth(true_depth, low, high), colour_depth(guessed, low, high)]
        rows.append(hstack([_tile(tile) for tile in tiles]))
    rows.insert(0, _heads(names, [_tile(tile).shape[1] for tile in tiles]))
    what = [f"{TITLES[name]} features, there and predicted" for name in colours]
    if shown.depth is not None:
        what.append(
            "depth by VGGT and by the probe (near is bright; each row from the nearest to the farthest by VGGT)"
        )
    gap = np.full((2, rows[0].shape[1], 3), 255, np.uint8)
    album.add(
        np.concatenate([part for line in rows for part in (line, gap)][:-1]),
        f"{shown.name}, {shown.contexts} views seen",
        f"Unseen views {', '.join(map(str, shown.places))}, one a row. The picture; then in pairs: {'; '.join(what)}. "
        "Colours are the first three principal components of what is there.",
    )


def shared_colours(true: Tensor, guess: Tensor, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Features (T, n, C) each -> two uint8 (T, h, w, 3), in one basis and one scale.

    The basis is that of the targets, so that a prediction that says nothing is shown as nothing; the 1st and the 99th
    percentile of the targets become 0 and 255.
    """
    flat, guessed = true.flatten(0, 1).double(), guess.flatten(0, 1).double()
    mean = flat.mean(0)
    _, _, axes = torch.linalg.svd(flat - mean, full_matrices=False)
    axes = axes[:3]
    # The sign of a component is arbitrary; fixing it makes pictures of one model comparable.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    values = (flat - mean) @ axes.T
    low, high = values.quantile(0.01, dim=0), values.quantile(0.99, dim=0)

    def paint(features: Tensor) -> np.ndarray:
        scaled = (((features - mean) @ axes.T - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        padded = torch.nn.functional.pad(scaled, (0, 3 - scaled.shape[1]))
        return (padded * 255).round().to(torch.uint8).view(len(true), *grid, 3).numpy()

    return paint(flat), paint(guessed)


def _heads(names: Sequence[str], widths: Sequence[int]) -> np.ndarray:
    """A line with the name of each column above it."""
    heads = []
    for name, width in zip(names, widths, strict=True):
        head = Image.new("RGB", (width, _HEAD), "white")
        ImageDraw.Draw(head).text((2, 1), name, fill="black")
        heads.append(np.asarray(head))
    return hstack(heads)


def _tile(tile: np.ndarray) -> np.ndarray:
    """A tile of the common height; patches stay squares."""
    width = max(1, round(tile.shape[1] * _HEIGHT / tile.shape[0]))
    smooth = Image.Resampling.BICUBIC if tile.shape[0] >= _HEIGHT // 2 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(tile).resize((width, _HEIGHT), smooth))
