"""Procedural textures: periodic patterns and small paintings, each a function of a random generator.

A pattern is (256, 256) in [0, 1], the weight of a material's light colour against its dark one; a painting is
(256, 256, 3) linear RGB. All wrap around at their edges, except the paintings, which are shown once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SIZE = 256
"""Pixels of a texture's edge."""

Pattern = Callable[[np.random.Generator], np.ndarray]


def noise(rng: np.random.Generator, slope: float, stretch: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Periodic noise with amplitude 1/f**slope, mean 0.5, about within [0, 1]; ``stretch`` (x, y) draws it out."""
    fy = np.fft.fftfreq(SIZE)[:, None] * SIZE * stretch[1]
    fx = np.fft.rfftfreq(SIZE)[None, :] * SIZE * stretch[0]
    radius = np.hypot(fx, fy)
    amplitude = np.where(radius > 0, np.maximum(radius, 1.0) ** -slope, 0.0)
    phase = rng.uniform(0, 2 * np.pi, amplitude.shape)
    field = np.fft.irfft2(amplitude * np.exp(1j * phase), s=(SIZE, SIZE))
    return np.clip(0.5 + field / (5.0 * field.std() + 1e-12), 0.0, 1.0)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as x, y in [0, 1)."""
    axis = (np.arange(SIZE) + 0.5) / SIZE
    x, y = np.meshgrid(axis, axis)
    return x, y


def _cells(x: np.ndarray, count: float) -> tuple[np.ndarray, np.ndarray]:
    """The number of the cell that each coordinate lies in, and the place within the cell in [0, 1)."""
    scaled = x * count
    index = np.floor(scaled)
    return index.astype(int), scaled - index


def plain(rng: np.random.Generator) -> np.ndarray:
    """Paint or lacquer: hardly any texture."""
    return 0.5 + 0.15 * (noise(rng, 1.2) - 0.5)


def plaster(rng: np.random.Generator) -> np.ndarray:
    """A wall's plaster: cloudy, with a fine grain."""
    return np.clip(0.7 * noise(rng, 1.6) + 0.3 * noise(rng, 0.2), 0, 1)


def wood(rng: np.random.Generator) -> np.ndarray:
    """Grain that runs along x."""
    rings = noise(rng, 1.5, (8.0, 1.0))
    lines = 0.5 + 0.5 * np.sin(2 * np.pi * (6 * rings + 4 * _grid()[1]))
    return np.clip(0.55 * lines + 0.45 * noise(rng, 0.7, (14.0, 1.0)), 0, 1)


def planks(rng: np.random.Generator) -> np.ndarray:
    """Floor boards along x with seams, each board of its own tone."""
    x, y = _grid()
    rows = int(rng.choice([6, 8, 10]))
    row, v = _cells(y, rows)
    shift = rng.uniform(0, 1, rows)[row]
    board, u = _cells((x + shift) % 1.0, 2)
    tone = rng.uniform(0, 1, (rows, 2))[row, board]
    seam = (v < 0.035 * rows / 8) | (u < 0.006)
    grain = np.roll(wood(rng), 40, axis=0)
    return np.where(seam, 0.0, 0.15 + 0.45 * tone + 0.4 * grain)


def parquet(rng: np.random.Generator) -> np.ndarray:
    """Squares of short boards, turned by 90 degrees in turn."""
    x, y = _grid()
    (cx, u), (cy, v) = _cells(x, 4), _cells(y, 4)
    across = (cx + cy) % 2 == 0
    along, over = np.where(across, u, v), np.where(across, v, u)
    strip, w = _cells(over, 4)
    tone = rng.uniform(0, 1, (4, 4, 4))[cx, cy, strip]
    grain = noise(rng, 0.9)
    seam = (w < 0.06) | (along < 0.02)
    return np.where(seam, 0.05, 0.2 + 0.5 * tone + 0.3 * grain)


def tiles(rng: np.random.Generator) -> np.ndarray:
    """Square tiles with light joints."""
    x, y = _grid()
    count = int(rng.choice([3, 4, 5]))
    (cx, u), (cy, v) = _cells(x, count), _cells(y, count)
    tone = rng.uniform(0.0, 0.35, (count, count))[cx, cy]
    joint = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v)) < 0.025
    return np.where(joint, 1.0, 0.1 + tone + 0.25 * noise(rng, 1.4))


def bricks(rng: np.random.Generator) -> np.ndarray:
    """Metro tiles or bricks in running bond."""
    x, y = _grid()
    row, v = _cells(y, 10)
    column, u = _cells((x + 0.1 * (row % 2)) % 1.0, 5)
    tone = rng.uniform(0.1, 0.6, (10, 5))[row, column]
    joint = (np.minimum(v, 1 - v) < 0.05) | (np.minimum(u, 1 - u) < 0.025)
    return np.where(joint, 1.0, tone + 0.3 * noise(rng, 0.8))


def checker(rng: np.random.Generator) -> np.ndarray:
    """A chess board."""
    x, y = _grid()
    count = int(rng.choice([4, 6]))
    (cx, _), (cy, _) = _cells(x, count), _cells(y, count)
    return np.clip(((cx + cy) % 2) * 0.9 + 0.2 * (noise(rng, 1.0) - 0.5) + 0.05, 0, 1)


def stripes(rng: np.random.Generator) -> np.ndarray:
    """Upright stripes of three widths."""
    x, _ = _grid()
    count = int(rng.choice([4, 6, 8]))
    _, u = _cells(x, count)
    value = np.where(u < 0.45, 0.1, np.where(u < 0.7, 0.9, np.where(u < 0.8, 0.4, 0.9)))
    return np.clip(value + 0.15 * (noise(rng, 0.5) - 0.5), 0, 1)


def plaid(rng: np.random.Generator) -> np.ndarray:
    """Crossing bands, as on blankets."""
    x, y = _grid()
    bands = rng.uniform(0, 1, 12)
    bands = np.repeat(bands, SIZE // 12 + 1)[:SIZE]
    value = 0.5 * bands[(x * SIZE).astype(int)] + 0.5 * bands[(y * SIZE).astype(int)]
    return np.clip(value + 0.15 * (noise(rng, 0.3) - 0.5), 0, 1)


def fabric(rng: np.random.Generator) -> np.ndarray:
    """A woven cloth."""
    x, y = _grid()
    weave = 0.5 + 0.25 * (np.sin(2 * np.pi * 48 * x) + np.sin(2 * np.pi * 48 * y))
    return np.clip(0.35 * weave + 0.4 * noise(rng, 0.4) + 0.25 * noise(rng, 1.5), 0, 1)


def carpet(rng: np.random.Generator) -> np.ndarray:
    """A short pile."""
    return np.clip(0.6 * noise(rng, 0.1) + 0.4 * noise(rng, 1.3), 0, 1)


def leather(rng: np.random.Generator) -> np.ndarray:
    """A fine net of creases."""
    return np.clip(1.4 * np.abs(noise(rng, 0.9) - 0.5) ** 0.6, 0, 1)


def marble(rng: np.random.Generator) -> np.ndarray:
    """Veins in a light ground."""
    turbulence = noise(rng, 1.5)
    veins = np.abs(np.sin(np.pi * (6 * turbulence + 2 * _grid()[0])))
    return np.clip(0.25 + 0.75 * veins**0.5, 0, 1)


def terrazzo(rng: np.random.Generator) -> np.ndarray:
    """Chips of stone in cement."""
    field = noise(rng, 0.8)
    return np.where(field > 0.62, 0.95, np.where(field < 0.36, 0.15, 0.6))


def dots(rng: np.random.Generator) -> np.ndarray:
    """Round dots, every other row shifted."""
    x, y = _grid()
    count = int(rng.choice([6, 8]))
    row, v = _cells(y, count)
    _, u = _cells(x + 0.5 / count * (row % 2), count)
    radius = np.hypot(u - 0.5, v - 0.5)
    return np.clip(np.where(radius < 0.25, 0.95, 0.1) + 0.1 * (noise(rng, 0.4) - 0.5), 0, 1)


def chevron(rng: np.random.Generator) -> np.ndarray:
    """Zigzag bands."""
    x, y = _grid()
    fold = np.abs((x * 4) % 1.0 - 0.5)
    return np.where((y * 8 + fold * 2) % 1.0 < 0.5, 0.1, 0.9) + 0.1 * (noise(rng, 0.4) - 0.5)


def damask(rng: np.random.Generator) -> np.ndarray:
    """A wallpaper of repeated ornaments."""
    x, y = _grid()
    count = 4
    row, v = _cells(y, count)
    _, u = _cells(x + 0.5 / count * (row % 2), count)
    angle, radius = np.arctan2(v - 0.5, u - 0.5), np.hypot(u - 0.5, v - 0.5)
    petals = 0.22 + 0.12 * np.cos(int(rng.integers(4, 8)) * angle)
    value = np.where(radius < petals, 0.85, np.where(radius < petals + 0.05, 0.4, 0.15))
    return value + 0.1 * (noise(rng, 0.6) - 0.5)


def rug(rng: np.random.Generator) -> np.ndarray:
    """A woven rug with borders and a medallion, shown once."""
    x, y = _grid()
    edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    medallion = np.abs(x - 0.5) + np.abs(y - 0.5)
    rings = np.floor(medallion * rng.integers(6, 12)) % 2
    value = 0.2 + 0.6 * rings
    value = np.where(edge < 0.14, 0.15, value)
    value = np.where((edge > 0.04) & (edge < 0.08), 0.9, value)
    return np.clip(value + 0.25 * (noise(rng, 0.3) - 0.5), 0, 1)


def _mix(weight: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Colours between ``low`` and ``high``."""
    return low + (high - low) * weight[..., None]


def painting(rng: np.random.Generator) -> np.ndarray:
    """A landscape, an abstract of rectangles, a still life of discs, or a line of hills: RGB."""
    x, y = _grid()
    style = int(rng.integers(4))
    colours = rng.uniform(0.03, 0.9, (8, 3))
    if style == 0:  # sky, hills one behind the other; y grows upwards
        picture = _mix(y, colours[0] * 0.5 + 0.4, np.array([0.2, 0.4, 0.8]))
        for k in range(3):
            height = 0.55 - 0.17 * k + 0.1 * np.sin(2 * np.pi * (x * (1 + k) + rng.uniform()))
            picture = np.where((y < height)[..., None], colours[k + 1] * [0.5, 0.9, 0.4], picture)
    elif style == 1:
        picture = np.broadcast_to(colours[0], (SIZE, SIZE, 3)).copy()
        for k in range(7):
            x0, y0, w, h = rng.uniform(-0.1, 0.8), rng.uniform(-0.1, 0.8), *rng.uniform(0.15, 0.5, 2)
            inside = (x > x0) & (x < x0 + w) & (y > y0) & (y < y0 + h)
            picture[inside] = colours[k + 1]
    elif style == 2:
        picture = _mix(noise(rng, 1.5), colours[0], colours[1] * 0.5)
        for k in range(6):
            disc = np.hypot(x - rng.uniform(0.1, 0.9), y - rng.uniform(0.1, 0.9)) < rng.uniform(0.06, 0.25)
            picture[disc] = colours[2 + k]
    else:
        picture = _mix(noise(rng, 2.0, (1.0, 4.0)), colours[0], colours[1])
        picture = np.where((noise(rng, 1.8) > 0.6)[..., None], colours[2], picture)
    margin = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) < 0.06
    return np.where(margin[..., None], 0.85, picture)


def outside(rng: np.random.Generator) -> np.ndarray:
    """What is seen through a window: sky, far hills or houses, a lawn, trees. RGB, y upwards."""
    x, y = _grid()
    sky = _mix(np.clip((y - 0.35) / 0.65, 0, 1), np.array([0.75, 0.85, 0.95]), np.array([0.3, 0.52, 0.9]))
    clouds = np.clip(noise(rng, 1.7, (1.0, 2.0)) * 2.2 - 1.0, 0, 1)
    picture = _mix(clouds, sky, np.ones_like(sky))
    if rng.uniform() < 0.5:
        for _ in range(6):
            x0, w, h = rng.uniform(-0.1, 0.95), rng.uniform(0.1, 0.22), rng.uniform(0.42, 0.75)
            house = (x > x0) & (x < x0 + w) & (y < h)
            panes = (np.sin(x * 180) > 0.3) & (np.sin(y * 150) > 0.2)
            tone = rng.uniform(0.25, 0.6) * np.array([1.0, 0.92, 0.85])
            picture = np.where(house[..., None], np.where(panes[..., None], tone * 0.4, tone), picture)
    hills = 0.38 + 0.06 * np.sin(2 * np.pi * (x + rng.uniform()))
    picture = np.where((y < hills)[..., None], np.array([0.12, 0.3, 0.1]), picture)
    picture = np.where(
        (y < 0.25)[..., None], _mix(noise(rng, 0.8), np.array([0.1, 0.3, 0.05]), np.array([0.35, 0.55, 0.15])), picture
    )
    for _ in range(3):
        cx, cy, r = rng.uniform(0.1, 0.9), rng.uniform(0.4, 0.6), rng.uniform(0.1, 0.18)
        crown = np.hypot(x - cx, y - cy) < r * (0.7 + 0.6 * noise(rng, 0.8))
        trunk = (np.abs(x - cx) < 0.015) & (y < cy) & (y > 0.2)
        picture = np.where(trunk[..., None], np.array([0.15, 0.08, 0.04]), picture)
        leaves = _mix(noise(rng, 0.6), np.array([0.04, 0.15, 0.03]), np.array([0.25, 0.45, 0.1]))
        picture = np.where(crown[..., None], leaves, picture)
    return picture


def screen(rng: np.random.Generator) -> np.ndarray:
    """Dark glass with a slanting reflection, or a desktop with windows: RGB."""
    x, y = _grid()
    if rng.uniform() < 0.6:
        shine = np.clip(1.0 - np.abs(x + 0.6 * y - 1.0) * 2.5, 0, 1) * 0.10
        return np.full((SIZE, SIZE, 3), 0.012) + shine[..., None] * np.array([0.8, 0.9, 1.0])
    picture = _mix(y, np.array([0.02, 0.05, 0.2]), np.array([0.05, 0.25, 0.5]))
    for _ in range(2):
        x0, y0 = rng.uniform(0.05, 0.4, 2)
        window = (x > x0) & (x < x0 + 0.45) & (y > y0) & (y < y0 + 0.5)
        text = (np.sin(y * 160) > 0.2) & (x < x0 + 0.1 + 0.3 * noise(rng, 0.3))
        picture = np.where(window[..., None], np.where(text[..., None], 0.15, 0.8), picture)
    return picture


PATTERNS: dict[str, Pattern] = {
    f.__name__: f
    for f in (plain, plaster, wood, planks, parquet, tiles, bricks, checker, stripes, plaid, fabric, carpet, leather)
}
PATTERNS |= {f.__name__: f for f in (marble, terrazzo, dots, chevron, damask, rug, painting, outside, screen)}
