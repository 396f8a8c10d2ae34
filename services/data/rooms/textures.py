"""The textures of one scene: a pyramid of each, sampled by texture coordinate and footprint.

Textures come from :mod:`patterns` or from a folder of the user's images, which then stand in for every pattern
but flat paint, the view out of a window and screens.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from services.data.rooms.patterns import PATTERNS, SIZE
from services.errors import DataError

LEVELS = 7
"""Pyramid levels: 256, 128, ... 4 pixels."""

VARIANTS = {"painting": 24, "outside": 6, "screen": 6, "rug": 6, "wood": 4, "planks": 4}
"""How many random variants of a pattern exist; 3 of those not named."""

KEEP_PROCEDURAL = frozenset({"plain", "outside", "screen"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

_SIZES = [SIZE >> k for k in range(LEVELS)]
_OFFSETS = np.concatenate([[0], np.cumsum([s * s for s in _SIZES])]).astype(np.int64)


def _pyramid(image: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE, 3) linear RGB -> all levels, flattened, (sum of sizes squared, 3) float32."""
    levels = [image.astype(np.float32)]
    for size in _SIZES[1:]:
        levels.append(levels[-1].reshape(size, 2, size, 2, 3).mean(axis=(1, 3)))
    return np.concatenate([level.reshape(-1, 3) for level in levels])


@lru_cache(maxsize=128)
def _procedural(name: str, variant: int) -> np.ndarray:
    """The pyramid of one variant of a pattern. Seeded by its name, so that it is the same in every scene."""
    rng = np.random.default_rng([int.from_bytes(name.encode()[:8], "big"), variant])
    image = np.asarray(PATTERNS[name](rng))
    if image.ndim == 2:
        image = np.repeat(np.clip(image, 0, 1)[..., None], 3, axis=2)
    return _pyramid(image)


@lru_cache(maxsize=128)
def _user_image(path: str, mtime_ns: int) -> np.ndarray:  # noqa: ARG001 -- a changed file is another entry
    """The pyramid of a user's image. DataError when it cannot be decoded."""
    try:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"texture {path} cannot be read as an image ({error}); remove it or repair it") from error
    # Rows of an image run downwards, texture coordinates upwards; colours are sRGB.
    return _pyramid((pixels[::-1] / 255.0) ** 2.2)


def texture_files(folder: str) -> list[Path]:
    """The images in a user's texture folder, sorted by name; [] for "". DataError when there are none."""
    if not folder:
        return []
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f'data.rooms.textures: {root} is not a folder; give a folder of images, or "" for none')
    files = sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        allowed = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f'data.rooms.textures: no image ({allowed}) in {root}; add some, or give "" for none')
    return files


def textures_digest(folder: str) -> str:
    """Names what the texture folder holds: hex sha256 over names and bytes; "" when there is no folder."""
    files = texture_files(folder)
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Atlas:
    """The textures that one scene uses, by number."""

    def __init__(self, folder: str = "") -> None:
        self._files = texture_files(folder)
        self._numbers: dict[tuple[str, int], int] = {}
        self._pyramids: list[np.ndarray] = []
        self._stacked: np.ndarray | None = None

    def use(self, name: str, rng: np.random.Generator) -> int:
        """The number of a random variant of pattern ``name``."""
        variant = int(rng.integers(VARIANTS.get(name, 3)))
        if (name, variant) not in self._numbers:
            self._numbers[name, variant] = len(self._pyramids)
            self._pyramids.append(self._load(name, variant))
            self._stacked = None
        return self._numbers[name, variant]

    def _load(self, name: str, variant: int) -> np.ndarray:
        if not self._files or name in KEEP_PROCEDURAL:
            return _procedural(name, variant)
        pick = int.from_bytes(hashlib.sha256(f"{name}/{variant}".encode()).digest()[:4], "big")
        path = self._files[pick % len(self._files)]
        return _user_image(str(path), path.stat().st_mtime_ns)

    @property
    def of_user(self) -> bool:
        """Whether textures come from a user's folder, whose colours are then shown as they are."""
        return bool(self._files)

    def sample(self, texture: np.ndarray, uv: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """Bilinear look-up, (N, 3) float32.

        Args:
            texture: (N,) numbers from :meth:`use`.
            uv: (N, 2) coordinates, 1 is one repetition.
            footprint: (N,) extent of a sample in the same unit; decides the pyramid level.
        """
        if self._stacked is None:
            self._stacked = np.concatenate(self._pyramids) if self._pyramids else np.full((1, 3), 0.5, np.float32)
        texels = np.maximum(footprint * SIZE, 1e-6)
        level = np.clip(np.rint(np.log2(texels)), 0, LEVELS - 1).astype(np.int64)
        size = (SIZE >> level).astype(np.int64)
        base = texture.astype(np.int64) * _OFFSETS[-1] + _OFFSETS[level]
        position = (uv - np.floor(uv)) * size[:, None] - 0.5
        corner = np.floor(position)
        weight = (position - corner).astype(np.float32)
        x0, y0 = (corner[:, 0].astype(np.int64)) % size, (corner[:, 1].astype(np.int64)) % size
        x1, y1 = (x0 + 1) % size, (y0 + 1) % size
        wx, wy = weight[:, :1], weight[:, 1:]
        table = self._stacked
        low = table.take(base + y0 * size + x0, axis=0) * (1 - wx) + table.take(base + y0 * size + x1, axis=0) * wx
        high = table.take(base + y1 * size + x0, axis=0) * (1 - wx) + table.take(base + y1 * size + x1, axis=0) * wx
        return low * (1 - wy) + high * wy
