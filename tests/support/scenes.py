"""Scenes in the ScanNet layout that cost nothing to make, in which depth, class and room type can be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TYPES = ("kitchen", "office", "bedroom")
CLASSES = ("wall", "floor", "table")


def write_scenes(root: Path, *, train: int = 6, val: int = 3, test: int = 3, views: int = 4, seed: int = 0) -> Path:
    """A wall that darkens with its distance, a floor, a box; the room type gives the colour."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    table = "id\traw_category\tcategory\n" + "".join(f"{i + 1}\t{c}\t{c}\n" for i, c in enumerate(CLASSES))
    (root / "scannetv2-labels.combined.tsv").write_text(table)
    (root / "splits").mkdir(exist_ok=True)
    number = 0
    for split, count in (("train", train), ("val", val), ("test", test)):
        names = []
        for _ in range(count):
            name = f"scene{number:04d}_00"
            _write_scene(root / "scans" / name, name, TYPES[number % len(TYPES)], views, rng)
            names.append(name)
            number += 1
        (root / "splits" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def _write_scene(folder: Path, name: str, room: str, views: int, rng: np.random.Generator) -> None:
    for part in ("color", "depth", "pose", "intrinsic", "label-filt", "instance-filt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(f"sceneType = {room}\naxisAlignment = " + " ".join(map(str, np.eye(4).ravel())))
    K = np.eye(4)
    K[0, 0] = K[1, 1] = 50.0
    K[0, 2], K[1, 2] = 31.5, 23.5
    for kind in ("color", "depth"):
        np.savetxt(folder / "intrinsic" / f"intrinsic_{kind}.txt", K)
    base = {"kitchen": (220, 120, 60), "office": (60, 200, 120), "bedroom": (80, 100, 220)}[room]
    rows = np.arange(48)[:, None]
    for view in range(views):
        near, far = rng.uniform(1.0, 2.0), rng.uniform(3.0, 5.0)
        horizon = int(rng.integers(20, 30))
        labels = np.where(rows < horizon, 1, 2) * np.ones((1, 64), int)
        depth = np.where(rows < horizon, far, far + (near - far) * (rows - horizon) / (48 - horizon)) * np.ones((1, 64))
        x, y, size = int(rng.integers(0, 44)), int(rng.integers(10, 28)), int(rng.integers(10, 20))
        labels[y : y + size, x : x + size] = 3
        depth[y : y + size, x : x + size] = near
        shade = 1.6 / depth
        image = np.array(base)[None, None] * shade[..., None] + 30 * (labels == 2)[..., None]
        image[labels == 3] = [250, 250, 40]
        image += rng.normal(0, 4, image.shape)
        pose = np.eye(4)
        pose[0, 3] = 0.3 * view
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "color" / f"{view}.png")
        Image.fromarray((depth * 1000).astype(np.uint16)).save(folder / "depth" / f"{view}.png")
        Image.fromarray(labels.astype(np.uint8)).save(folder / "label-filt" / f"{view}.png")
        Image.fromarray((labels == 3).astype(np.uint8)).save(folder / "instance-filt" / f"{view}.png")
        np.savetxt(folder / "pose" / f"{view}.txt", pose)
