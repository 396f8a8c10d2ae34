"""What a recipe leaves for the report: pictures (``<run>/pictures``, pictures.json) and tables (tables.json)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER, LIST, TABLES = "pictures", "pictures.json", "tables.json"
_SMALLEST = 480
"""Pictures narrower than this are enlarged by whole pixels, so that a browser does not blur them."""


class Album:
    """Collects pictures and tables in order; :meth:`save` replaces what an earlier evaluation left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: list[tuple[np.ndarray, str, str]] = []
        self._tables: list[dict[str, Any]] = []

    def add(self, picture: np.ndarray, title: str, caption: str) -> None:
        """A picture, uint8 (H, W, 3)."""
        self._entries.append((picture, title, caption))

    def table(self, title: str, note: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; a number is shown with four digits."""
        self._tables.append({"title": title, "note": note, "columns": list(columns), "rows": [list(r) for r in rows]})

    def save(self) -> None:
        """Write the files and their list, the list last."""
        from PIL import Image

        below = self.folder / FOLDER
        shutil.rmtree(below, ignore_errors=True)
        below.mkdir(parents=True)
        listed = []
        for number, (picture, title, caption) in enumerate(self._entries):
            name = f"{number:03d}.png"
            factor = max(1, _SMALLEST // picture.shape[1])
            Image.fromarray(picture.repeat(factor, 0).repeat(factor, 1)).save(below / name)
            listed.append({"file": f"{FOLDER}/{name}", "title": title, "caption": caption})
        for name, content in ((LIST, listed), (TABLES, self._tables)):
            temporary = self.folder / f"{name}.tmp"
            temporary.write_text(json.dumps(content, indent=1))
            temporary.replace(self.folder / name)


def hstack(tiles: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Tiles uint8 (H, W, 3) of one height side by side, on white."""
    height = tiles[0].shape[0]
    parts: list[np.ndarray] = []
    for tile in tiles:
        parts += [tile, np.full((height, gap, 3), 255, np.uint8)]
    return np.concatenate(parts[:-1], axis=1)


def colour_depth(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depth (H, W) in metres -> uint8 (H, W, 3): near is bright, far is dark; unknown (0) is grey."""
    import matplotlib

    scaled = np.clip((depth - low) / max(high - low, 1e-6), 0, 1)
    colours = (matplotlib.colormaps["magma"](1 - scaled)[..., :3] * 255).astype(np.uint8)
    return np.where((np.isfinite(depth) & (depth != 0))[..., None], colours, np.uint8(160))
