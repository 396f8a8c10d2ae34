"""What the figures are compared with: short functions that call the named library, nothing of ours.

Each side of a benchmark gets the same threads, the same warm-up and the same buffers.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_plain(path: Path, arrays: Sequence[np.ndarray]) -> int:
    """The bytes of all arrays to one file, then fsync; returns how many."""
    total = 0
    with path.open("wb", buffering=0) as file:
        for array in arrays:
            total += file.write(array.data.cast("B"))
        os.fsync(file.fileno())
    return total


def memcpy(source: np.ndarray, target: np.ndarray) -> int:
    """Copy rows of ``source`` one after the other into ``target``, one core; returns the bytes."""
    for row in source:
        np.copyto(target, row)
    return source.nbytes


def read_safetensors(path: Path) -> Any:
    """The memory-mapped shard, opened once."""
    from safetensors import safe_open

    return safe_open(str(path), framework="pt")


def get_safetensors(shard: Any, names: Sequence[str], target: Any) -> int:
    """Tensors by name, each copied into the same torch buffer; returns how many."""
    for name in names:
        target.copy_(shard.get_tensor(name))
    return len(names)


def make_sqlite(path: Path, keys: np.ndarray) -> sqlite3.Connection:
    """A table with the 16-byte keys (N, 16) as primary key, as sqlite is used best: no row ids, WAL."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE place (key BLOB PRIMARY KEY, shard INTEGER, row INTEGER) WITHOUT ROWID")
    rows = ((key.tobytes(), i // 1000, i % 1000) for i, key in enumerate(keys))
    with connection:
        connection.executemany("INSERT INTO place VALUES (?, ?, ?)", rows)
    return connection


def lookup_sqlite(connection: sqlite3.Connection, keys: Sequence[bytes]) -> float:
    """Median microseconds of one look-up."""
    cursor = connection.cursor()
    took = []
    for key in keys:
        start = time.perf_counter_ns()
        cursor.execute("SELECT shard, row FROM place WHERE key = ?", (key,)).fetchone()
        took.append(time.perf_counter_ns() - start)
    return float(np.median(took)) / 1000


def load_dinov2(weights: str, arch: dict[str, Any]) -> Any:
    """DINOv2 of transformers in float32 and eval mode, from a folder, or random with ``arch`` ("random")."""
    import torch
    import transformers

    if weights == "random":
        return transformers.Dinov2Model(transformers.Dinov2Config(**arch)).eval()
    return transformers.Dinov2Model.from_pretrained(weights, dtype=torch.float32).eval()


def encode_files(model: Any, paths: Sequence[Path], batch: int, side: int) -> int:
    """Read, shrink, normalise and encode image files in batches, one after the other; returns how many."""
    import torch
    from PIL import Image

    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for start in range(0, len(paths), batch):
        pixels = []
        for path in paths[start : start + batch]:
            with Image.open(path) as image:
                cut = (image.width - image.height) / 2
                box = (cut, 0, image.width - cut, image.height)
                small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box)
            pixels.append((torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - mean) / std)
        with torch.inference_mode():
            model(torch.stack(pixels))
    return len(paths)
