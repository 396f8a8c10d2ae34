"""Pictures of a predicted field: one basis of colours for what is there and what was predicted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from actors.recipes.pictures import Album
from actors.recipes.spa3r_pictures import Shown, draw_field, shared_colours

GRID = (3, 4)
TILE, GAP, HEAD = 112, 2, 14


def test_prediction_and_target_share_basis_and_scale() -> None:
    true = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
    there, same = shared_colours(true, true.clone(), GRID)
    assert there.shape == (2, *GRID, 3)
    assert np.array_equal(there, same)
    _, mean = shared_colours(true, true.mean((0, 1)).expand_as(true).contiguous(), GRID)
    assert (mean == mean[0, 0, 0]).all(), "what says nothing is one colour"
    _, scaled = shared_colours(true, true + 0.5 * (true - true.mean((0, 1))), GRID)
    inside = (there > 60) & (there < 190)
    assert (np.abs(scaled.astype(int) - there)[inside] > 0).mean() > 0.5, "the prediction is not stretched to fit"


def test_rows_are_views_and_columns_are_named(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    features = {name: torch.randn(2, 12, 6, generator=draw) for name in ("geo", "sem")}
    depth = torch.rand(2, 12, generator=draw) + 1
    shown = Shown(
        name="rooms/a", contexts=2, places=(3, 5), images=np.full((2, 84, 112, 3), 200, np.uint8), truth=features,
        predicted={name: value.clone() for name, value in features.items()}, depth=(depth, depth.clone()), grid=GRID,
    )  # fmt: skip
    album = Album(tmp_path)
    draw_field(album, shown)
    album.save()
    (entry,) = json.loads((tmp_path / "pictures.json").read_text())
    assert "Unseen views 3, 5, one a row" in entry["caption"]
    assert "each row from the nearest to the farthest by VGGT" in entry["caption"]
    picture = np.asarray(Image.open(tmp_path / entry["file"]))
    width = round(112 * TILE / 84)
    assert picture.shape == (HEAD + 2 * (GAP + TILE), 7 * width + 6 * GAP, 3)
    columns = [picture[:, n * (width + GAP) : n * (width + GAP) + width] for n in range(7)]
    assert all((column[:HEAD] < 128).any() and (column[:HEAD] == 255).any() for column in columns), "each has a name"
    for first, second in ((1, 2), (3, 4), (5, 6)):
        assert np.array_equal(columns[first][HEAD:], columns[second][HEAD:]), "equal features look equal"
