"""Kitchen and bathroom: counters, sinks, stoves, refrigerators, wall cabinets, toilets, bathtubs."""

from __future__ import annotations

import numpy as np

from services.data.rooms.furniture.tables import _doors, _drawers
from services.data.rooms.furniture.workshop import Piece, Top, Workshop
from services.data.rooms.shapes import Material, Shape


def counter(
    shop: Workshop, width: float, body: Material, plate: Material, *, doors: bool, label: str = "counter"
) -> Piece:
    """A base unit with a work top: 0.6 m deep, 0.9 m high (kitchens make all units of the same materials)."""
    shape = shop.shape()
    metal = shop.metal()
    shape.box((0, -0.03, 0.05), (width, 0.52, 0.1), shop.black())
    shape.box((0, -0.01, 0.48), (width, 0.56, 0.76), body)
    if doors:
        _doors(shape, body, metal, width, 0.27, 0.11, 0.85, max(1, round(width / 0.45)))
    else:
        for k in range(n := max(1, round(width / 0.6))):
            _drawers(shape, body, metal, (k - (n - 1) / 2) * width / n, width / n, 0.27, 0.11, 0.85, 3)
    shape.box((0, 0, 0.88), (width, 0.61, 0.04), plate)
    top = Top(0.9, (-width / 2 + 0.05, width / 2 - 0.05), (-0.25, 0.25))
    return shop.piece(label, "counter" if label == "counter" else "vanity", shape, (top,))


def vanity(shop: Workshop) -> Piece:
    """A bathroom cabinet that carries a basin."""
    plate = shop.material("marble", (0.45, 0.44, 0.43), (0.85, 0.84, 0.82), tile=0.7, gloss=0.4)
    width = float(shop.rng.uniform(0.7, 1.1))
    return counter(shop, width, shop.body(), plate, doors=True, label="cabinet")


def wall_cabinet(shop: Workshop, width: float, body: Material) -> Piece:
    """A cupboard that hangs on the wall; its origin is at its lower edge."""
    shape = shop.shape()
    high = float(shop.rng.uniform(0.6, 0.75))
    shape.box((0, 0, high / 2), (width, 0.33, high), body)
    _doors(shape, body, shop.metal(), width, 0.165, 0.0, high, max(1, round(width / 0.45)))
    return shop.piece("cabinet", "wall_cabinet", shape)


def _tap(shape: Shape, metal: Material, y: float, z: float) -> None:
    shape.cylinder((0, y, z), 0.018, 0.24, metal, sides=10)
    shape.box((0, y + 0.07, z + 0.235), (0.024, 0.16, 0.022), metal)
    shape.box((0, y + 0.14, z + 0.215), (0.022, 0.022, 0.04), metal)
    shape.box((0.05, y, z + 0.05), (0.06, 0.016, 0.016), metal)


def _basin(shape: Shape, w: float, d: float, h: float, material: Material) -> None:
    """Four walls, a bottom and a drain: an open box whose inside can be seen."""
    wall = 0.025
    shape.box((0, 0, 0.006), (w, d, 0.012), material)
    for s in (-1, 1):
        shape.box((s * (w - wall) / 2, 0, h / 2), (wall, d, h), material)
        shape.box((0, s * (d - wall) / 2, h / 2), (w - 2 * wall, wall, h), material)


def kitchen_sink(shop: Workshop) -> Piece:
    """A steel basin with its tap, set onto the work top; its origin is on the top."""
    rng, shape = shop.rng, shop.shape()
    steel = shop.steel() if rng.uniform() < 0.75 else shop.ceramic()
    w, d, h = rng.uniform(0.5, 0.62), 0.42, 0.07
    _basin(shape, w, d, h, steel)
    shape.cylinder((0, 0, 0.012), 0.035, 0.004, shop.black(), sides=12)
    _tap(shape, shop.steel(), -d / 2 + 0.0125, h)
    return shop.piece("sink", "kitchen_sink", shape)


def vessel_sink(shop: Workshop) -> Piece:
    """A round bowl or a square basin on a bathroom cabinet; its origin is on the top."""
    rng, shape = shop.rng, shop.shape()
    white = shop.ceramic()
    if rng.uniform() < 0.6:
        r = rng.uniform(0.18, 0.22)
        profile = [(0.0, 0.0), (r * 0.6, 0.0), (r, 0.12), (r * 0.92, 0.12), (r * 0.5, 0.03), (0.0, 0.025)]
        shape.turned((0, 0.02, 0), profile, white, sides=22)
    else:
        _basin(shape, rng.uniform(0.42, 0.52), 0.36, 0.12, white)
    _tap(shape, shop.metal(), -0.23, 0.0)
    return shop.piece("sink", "vessel_sink", shape)


def pedestal_sink(shop: Workshop) -> Piece:
    """A wash basin on a column."""
    rng, shape = shop.rng, shop.shape()
    white, w = shop.ceramic(), rng.uniform(0.5, 0.62)
    shape.turned((0, -0.05, 0), [(0, 0), (0.13, 0), (0.09, 0.1), (0.08, 0.55), (0.12, 0.7)], white)
    profile = [(0.05, 0.66), (0.8, 0.76), (1.0, 0.84), (0.9, 0.84), (0.45, 0.76), (0.0, 0.75)]
    shape.turned((0, 0.02, 0), [(r * w / 2, z) for r, z in profile], white, sides=22, squash=0.8)
    shape.box((0, -0.2, 0.8), (w, 0.08, 0.1), white)
    _tap(shape, shop.metal(), -0.2, 0.85)
    return shop.piece("sink", "pedestal_sink", shape)


def toilet(shop: Workshop) -> Piece:
    """Foot, oval bowl, lid (shut, or open against the cistern), cistern."""
    rng, shape = shop.rng, shop.shape()
    white = shop.ceramic()
    lid = white if rng.uniform() < 0.75 else shop.flat(shop.woods[0][1], gloss=0.3)
    bowl = [(0.0, 0.0), (0.6, 0.0), (0.5, 0.12), (0.95, 0.36), (1.0, 0.4), (0.82, 0.4), (0.6, 0.28), (0.0, 0.22)]
    shape.turned((0, 0.12, 0), [(r * 0.19, z) for r, z in bowl], white, sides=20, squash=1.3)
    shape.box((0, -0.2, 0.2), (0.24, 0.28, 0.4), white)
    shape.cushion((0, -0.27, 0.58), (0.4, 0.18, 0.38), white, edge=0.15)
    shape.box((0, -0.27, 0.785), (0.42, 0.2, 0.03), white)
    shape.cylinder((0, -0.27, 0.8), 0.025, 0.012, shop.metal(), sides=10)
    if rng.uniform() < 0.6:
        shape.turned((0, 0.12, 0.4), [(0, 0), (0.2, 0), (0.195, 0.025), (0, 0.03)], lid, sides=20, squash=1.28)
    else:
        shape.turned((0, 0.12, 0.4), [(0.12, 0), (0.2, 0), (0.195, 0.02), (0.12, 0.02)], lid, sides=20, squash=1.28)
        shape.cushion((0, -0.15, 0.62), (0.38, 0.035, 0.44), lid, edge=0.4)
    return shop.piece("toilet", "toilet", shape)


def bathtub(shop: Workshop) -> Piece:
    """A built-in tub with a rim and a hollow, a tap at one end."""
    rng, shape = shop.rng, shop.shape()
    w, d, h, rim = rng.uniform(1.5, 1.75), rng.uniform(0.7, 0.8), rng.uniform(0.52, 0.6), 0.08
    white = shop.ceramic()
    panel = shop.body() if rng.uniform() < 0.3 else white
    for s in (-1, 1):
        shape.box((0, s * (d - rim) / 2, h / 2), (w, rim, h), panel if s > 0 else white)
        shape.box((s * (w - rim) / 2, 0, h / 2), (rim, d - 2 * rim, h), white)
    shape.box((0, 0, 0.08), (w - 2 * rim, d - 2 * rim, 0.16), white)
    shape.box((0, 0, h + 0.008), (w, 0.001, 0.001), white)
    for s in (-1, 1):  # a thin lip all round
        shape.box((0, s * (d - rim) / 2, h + 0.01), (w, rim, 0.02), white)
        shape.box((s * (w - rim) / 2, 0, h + 0.01), (rim, d - 2 * rim, 0.02), white)
    metal = shop.metal()
    end = float(rng.choice([-1, 1])) * (w / 2 - 0.04)
    shape.cylinder((end, 0, h + 0.02), 0.02, 0.14, metal, sides=10)
    shape.box((end - np.sign(end) * 0.06, 0, h + 0.15), (0.14, 0.025, 0.025), metal)
    return shop.piece("bathtub", "bathtub", shape)


def stove(shop: Workshop) -> Piece:
    """A free-standing cooker: four plates, knobs, an oven door with its window, sometimes pots."""
    rng, shape = shop.rng, shop.shape()
    body = shop.steel() if rng.uniform() < 0.5 else shop.flat((0.8, 0.8, 0.79), gloss=0.4)
    black, w = shop.black(gloss=0.6), 0.6
    shape.box((0, -0.01, 0.44), (w, 0.58, 0.88), body)
    shape.box((0, 0, 0.89), (w, 0.6, 0.02), black)
    plate = shop.flat((0.09, 0.085, 0.085), gloss=0.2)
    for x in (-0.15, 0.15):
        for y in (-0.13, 0.15):
            shape.cylinder((x, y, 0.9), rng.uniform(0.075, 0.1), 0.012, plate, sides=16)
    shape.box((0, 0.285, 0.82), (w - 0.02, 0.02, 0.1), black if rng.uniform() < 0.5 else body)
    for x in np.linspace(-0.22, 0.22, 5):
        shape.box((x, 0.3, 0.82), (0.035, 0.025, 0.035), shop.metal())
    shape.box((0, 0.29, 0.43), (w - 0.04, 0.03, 0.56), body)
    shape.box((0, 0.307, 0.42), (w - 0.16, 0.006, 0.32), black)
    shape.box((0, 0.325, 0.66), (w - 0.1, 0.02, 0.02), shop.metal())
    if rng.uniform() < 0.6:
        pot = shop.steel() if rng.uniform() < 0.5 else shop.flat(shop.vivid(0.6), gloss=0.4)
        height = rng.uniform(0.1, 0.18)
        shape.cylinder((-0.15, -0.13, 0.912), 0.1, height, pot, sides=16)
        shape.cylinder((-0.15, -0.13, 0.912 + height), 0.02, 0.03, black, sides=8)
    return shop.piece("stove", "stove", shape)


def refrigerator(shop: Workshop) -> Piece:
    """A tall cold cupboard with two doors, one over the other."""
    rng, shape = shop.rng, shop.shape()
    roll = rng.uniform()
    body = shop.steel() if roll < 0.4 else shop.flat((0.82, 0.82, 0.82), gloss=0.35)
    if roll > 0.85:
        body = shop.flat(shop.vivid(0.6), gloss=0.35)
    w, d, h = rng.uniform(0.58, 0.68), rng.uniform(0.6, 0.66), rng.uniform(1.6, 1.85)
    split = h * (rng.uniform(0.62, 0.7) if rng.uniform() < 0.5 else rng.uniform(0.34, 0.42))
    shape.box((0, -0.03, h / 2), (w, d - 0.06, h), body)
    side = float(rng.choice([-1, 1])) * (w / 2 - 0.06)
    for z0, z1 in ((0.05, split), (split, h)):
        shape.box((0, d / 2 - 0.03, (z0 + z1) / 2), (w, 0.05, z1 - z0 - 0.014), body)
        grip = min(0.4, (z1 - z0) * 0.5)
        z = z1 - 0.1 - grip / 2 if z1 < h else z0 + 0.1 + grip / 2
        shape.box((side, d / 2 + 0.02, z), (0.022, 0.03, grip), shop.metal())
    shape.box((0, d / 2 - 0.028, 0.03), (w - 0.04, 0.02, 0.04), shop.black())
    return shop.piece("refrigerator", "refrigerator", shape)
