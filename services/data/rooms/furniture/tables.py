"""Tables, desks, night stands, shelves and cupboards: what things stand on or in."""

from __future__ import annotations

import itertools

import numpy as np

from services.data.rooms.furniture.workshop import Piece, Top, Workshop, colour, legs
from services.data.rooms.shapes import Material, Shape


def _rectangle(z: float, w: float, d: float, margin: float = 0.06) -> Top:
    return Top(z, (-w / 2 + margin, w / 2 - margin), (-d / 2 + margin, d / 2 - margin))


def dining_table(shop: Workshop) -> Piece:
    """Rectangular on four legs, or round on a column."""
    return _table(shop, "dining_table", (1.2, 1.7), (0.78, 0.92), (0.72, 0.77), round_=0.3)


def kitchen_table(shop: Workshop) -> Piece:
    """A small table to eat at."""
    return _table(shop, "kitchen_table", (0.75, 1.0), (0.65, 0.8), (0.72, 0.77), round_=0.3)


def coffee_table(shop: Workshop) -> Piece:
    """A low table before a sofa."""
    return _table(shop, "coffee_table", (0.8, 1.15), (0.48, 0.62), (0.36, 0.46), round_=0.3)


def side_table(shop: Workshop) -> Piece:
    """A small table beside a chair."""
    return _table(shop, "side_table", (0.4, 0.52), (0.38, 0.48), (0.48, 0.6), round_=0.5)


def _table(
    shop: Workshop,
    kind: str,
    width: tuple[float, float],
    depth: tuple[float, float],
    height: tuple[float, float],
    *,
    round_: float,
) -> Piece:
    rng, shape = shop.rng, shop.shape()
    w, d, h = (float(rng.uniform(*r)) for r in (width, depth, height))
    frame = shop.wood()
    plate = frame if rng.uniform() < 0.6 else shop.body()
    if rng.uniform() < 0.15:
        plate = shop.material("marble", (0.3, 0.3, 0.32), (0.82, 0.81, 0.79), tile=0.8, gloss=0.4)
    if rng.uniform() < round_:
        w = d = float(np.sqrt(w * d))
        shape.cylinder((0, 0, h - 0.035), w / 2, 0.035, plate, sides=28)
        if rng.uniform() < 0.5:
            shape.turned((0, 0, 0), [(0, 0), (w * 0.3, 0), (w * 0.28, 0.03), (0.05, 0.08), (0.04, h - 0.04)], frame)
        else:
            legs(shape, frame, w * 0.68, w * 0.68, h - 0.03, 0.05, round_=True)
        side = w / np.sqrt(2)
        return shop.piece("table", kind, shape, (_rectangle(h, side, side, 0.03),))
    shape.box((0, 0, h - 0.018), (w, d, 0.036), plate)
    style = rng.integers(3)
    if style == 2:  # two trestles of metal
        metal = shop.metal()
        for sx in (-1, 1):
            x = sx * (w / 2 - 0.12)
            for sy in (-1, 1):
                shape.box((x, sy * (d / 2 - 0.06), (h - 0.036) / 2), (0.035, 0.035, h - 0.036), metal)
            shape.box((x, 0, 0.02), (0.035, d - 0.1, 0.03), metal)
    else:
        legs(shape, frame, w - 0.06, d - 0.06, h - 0.036, 0.065 if h > 0.6 else 0.05, round_=style == 1)
        shape.box((0, d / 2 - 0.06, h - 0.076), (w - 0.2, 0.02, 0.08), frame)
        shape.box((0, -d / 2 + 0.06, h - 0.076), (w - 0.2, 0.02, 0.08), frame)
        if h < 0.62 and rng.uniform() < 0.5:
            shape.box((0, 0, 0.14), (w - 0.1, d - 0.1, 0.02), frame)
    return shop.piece("table", kind, shape, (_rectangle(h, w, d),))


def _drawers(
    shape: Shape, front: Material, handle: Material, x: float, w: float, y: float, z0: float, z1: float, rows: int
) -> None:
    """Fronts of drawers, one over the other, with handles, on a face that looks along +y."""
    each = (z1 - z0) / rows
    for k in range(rows):
        z = z0 + (k + 0.5) * each
        shape.box((x, y + 0.008, z), (w - 0.012, 0.016, each - 0.012), front)
        shape.box((x, y + 0.028, z + each * 0.2), (min(0.14, w * 0.4), 0.016, 0.014), handle)


def _doors(shape: Shape, front: Material, handle: Material, w: float, y: float, z0: float, z1: float, n: int) -> None:
    """``n`` cupboard doors side by side with upright handles."""
    each = w / n
    for k in range(n):
        x = -w / 2 + (k + 0.5) * each
        shape.box((x, y + 0.009, (z0 + z1) / 2), (each - 0.012, 0.018, z1 - z0 - 0.012), front)
        grip = x + each * (0.38 if k % 2 == 0 else -0.38)
        shape.box((grip, y + 0.03, (z0 + z1) / 2), (0.014, 0.016, min(0.2, (z1 - z0) * 0.3)), handle)


def desk(shop: Workshop) -> Piece:
    """A plate on legs with a block of drawers to one side."""
    rng, shape = shop.rng, shop.shape()
    w, d, h = rng.uniform(1.15, 1.6), rng.uniform(0.62, 0.75), rng.uniform(0.72, 0.76)
    body, metal = shop.body(), shop.metal()
    shape.box((0, 0, h - 0.016), (w, d, 0.032), shop.wood() if rng.uniform() < 0.5 else body)
    side, block = float(rng.choice([-1, 1])), rng.uniform(0.36, 0.45)
    x = side * (w / 2 - block / 2 - 0.03)
    shape.box((x, -0.03, (h - 0.032) / 2 + 0.03), (block, d - 0.1, h - 0.092), body)
    _drawers(shape, body, metal, x, block, d / 2 - 0.08, 0.06, h - 0.05, int(rng.integers(3, 5)))
    shape.box((-side * (w / 2 - 0.03), 0, (h - 0.032) / 2), (0.03, d - 0.08, h - 0.032), body)
    shape.box((0, -d / 2 + 0.05, h * 0.68), (w - 0.1, 0.018, h * 0.35), body)
    return shop.piece("desk", "desk", shape, (_rectangle(h, w, d, 0.04),))


def nightstand(shop: Workshop) -> Piece:
    """A small chest beside a bed."""
    rng, shape = shop.rng, shop.shape()
    w, d, h, foot = rng.uniform(0.4, 0.52), rng.uniform(0.36, 0.42), rng.uniform(0.45, 0.58), 0.1
    body = shop.body()
    legs(shape, body, w - 0.04, d - 0.04, foot, 0.04, round_=True)
    shape.box((0, 0, (foot + h) / 2), (w, d, h - foot), body)
    _drawers(shape, shop.body() if rng.uniform() < 0.3 else body, shop.metal(), 0, w, d / 2, foot, h - 0.02, 2)
    return shop.piece("nightstand", "nightstand", shape, (_rectangle(h, w, d, 0.03),))


def dresser(shop: Workshop) -> Piece:
    """A chest of two columns of drawers."""
    rng, shape = shop.rng, shop.shape()
    w, d, h, foot = rng.uniform(0.9, 1.3), rng.uniform(0.42, 0.5), rng.uniform(0.75, 0.95), rng.uniform(0.06, 0.14)
    body, metal = shop.body(), shop.metal()
    legs(shape, body, w - 0.04, d - 0.04, foot, 0.05, round_=False)
    shape.box((0, 0, (foot + h) / 2), (w, d, h - foot), body)
    rows = int(rng.integers(3, 5))
    for sx in (-1, 1):
        _drawers(shape, body, metal, sx * w / 4, w / 2, d / 2, foot, h - 0.03, rows)
    return shop.piece("cabinet", "dresser", shape, (_rectangle(h, w, d, 0.05),))


def wardrobe(shop: Workshop) -> Piece:
    """A tall cupboard with two or three doors."""
    rng, shape = shop.rng, shop.shape()
    n = int(rng.integers(2, 4))
    w, d, h = n * rng.uniform(0.45, 0.52), rng.uniform(0.55, 0.62), rng.uniform(1.9, 2.15)
    body = shop.body()
    shape.box((0, 0, h / 2), (w, d, h), body)
    shape.box((0, 0, h - 0.02), (w + 0.03, d + 0.03, 0.04), body)
    _doors(shape, shop.body() if rng.uniform() < 0.4 else body, shop.metal(), w, d / 2, 0.08, h - 0.04, n)
    return shop.piece("cabinet", "wardrobe", shape)


def sideboard(shop: Workshop) -> Piece:
    """A long low cupboard, also what a television stands on."""
    rng, shape = shop.rng, shop.shape()
    n = int(rng.integers(3, 5))
    w, d, h, foot = n * rng.uniform(0.36, 0.46), rng.uniform(0.38, 0.45), rng.uniform(0.46, 0.6), 0.1
    body = shop.body()
    legs(shape, shop.wood(), w - 0.1, d - 0.06, foot, 0.045, round_=True)
    shape.box((0, 0, (foot + h) / 2), (w, d, h - foot), body)
    _doors(shape, body if rng.uniform() < 0.5 else shop.body(), shop.metal(), w, d / 2, foot, h - 0.03, n)
    return shop.piece("cabinet", "sideboard", shape, (_rectangle(h, w, d, 0.05),))


def bookshelf(shop: Workshop) -> Piece:
    """An open shelf with books upright, leaning and lying, and boxes."""
    rng, shape = shop.rng, shop.shape()
    w, d, h = rng.uniform(0.7, 1.1), rng.uniform(0.28, 0.34), rng.uniform(1.5, 2.05)
    body, board = shop.body(), 0.022
    for sx in (-1, 1):
        shape.box((sx * (w - board) / 2, 0, h / 2), (board, d, h), body)
    shape.box((0, -d / 2 + 0.006, h / 2), (w - 2 * board, 0.012, h), body)
    levels = np.linspace(0.06, h - board / 2, int(rng.integers(5, 7)))
    for z in levels:
        shape.box((0, 0.006, z), (w - 2 * board, d - 0.012, board), body)
    for z0, z1 in itertools.pairwise(levels):
        _books(shop, shape, w - 2 * board - 0.02, d, z0 + board / 2, z1 - z0 - board)
    return shop.piece("bookshelf", "bookshelf", shape)


def _books(shop: Workshop, shape: Shape, width: float, depth: float, z: float, room: float) -> None:
    """Fills one shelf from the left; some of it stays empty."""
    rng = shop.rng
    x, end = -width / 2, width / 2 - rng.choice([0.0, 0.0, 0.25]) * width
    while x < end - 0.06:
        roll = rng.uniform()
        if roll < 0.06 and end - x > 0.26:  # a box or basket
            tall = min(room * 0.75, 0.2)
            shape.box((x + 0.12, 0, z + tall / 2), (0.22, depth * 0.8, tall), shop.cloth(patterned=0.2))
            x += 0.25
        elif roll < 0.12:
            x += 0.08
        else:
            thick, tall = rng.uniform(0.02, 0.055), room * rng.uniform(0.62, 0.94)
            deep = depth * rng.uniform(0.6, 0.8)
            cover = shop.flat(colour(rng.uniform(), rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.9)), gloss=0.05)
            shape.box((x + thick / 2, -depth / 2 + 0.02 + deep / 2, z + tall / 2), (thick * 0.94, deep, tall), cover)
            x += thick
