"""Lamps, plants, pictures, mirrors, rugs, screens, curtains, doors and windows."""

from __future__ import annotations

import numpy as np

from services.data.rooms.furniture.workshop import Piece, Workshop, colour
from services.data.rooms.shapes import Material, Shape, rotation_x


def _shade(shop: Workshop) -> Material:
    """A lamp shade that is lit from within."""
    warm = colour(float(shop.rng.uniform(0.08, 0.14)), float(shop.rng.uniform(0.15, 0.45)), 1.0)
    if shop.rng.uniform() < 0.25:
        warm = colour(float(shop.rng.uniform()), 0.5, 0.95)
    return shop.flat(warm, emission=float(shop.rng.uniform(0.7, 1.1)))


def floor_lamp(shop: Workshop) -> Piece:
    """A foot, a post and a shade at a person's height."""
    rng, shape = shop.rng, shop.shape()
    metal, h, r = shop.metal(), rng.uniform(1.4, 1.7), rng.uniform(0.17, 0.24)
    if rng.uniform() < 0.35:  # a tripod of wood
        wood = shop.wood()
        for k in range(3):
            a = 2 * np.pi * k / 3
            foot, top = np.array([0.22 * np.cos(a), 0.22 * np.sin(a), 0.0]), np.array([0, 0, h - 0.3])
            axis = top - foot
            length = float(np.linalg.norm(axis))
            z = axis / length
            x = np.cross([0.0, 1.0, 0.0], z)
            x /= np.linalg.norm(x)
            turn = np.stack([x, np.cross(z, x), z], axis=1)
            shape.box((foot + top) / 2 + [0, 0, 0.02], (0.028, 0.028, length), wood, turn)
    else:
        shape.cylinder((0, 0, 0), 0.15, 0.025, metal, sides=20)
        shape.cylinder((0, 0, 0.025), 0.013, h - 0.2, metal, sides=8)
    low, high = r, r * rng.uniform(0.55, 1.0)
    shape.turned((0, 0, h - 0.3), [(low, 0), (high, 0.3), (0.0, 0.3)], _shade(shop), sides=20)
    shape.turned((0, 0, h - 0.3), [(0.0, 0.01), (low * 0.98, 0.0)], _shade(shop), sides=20)
    return shop.piece("lamp", "floor_lamp", shape, glow=((0, 0, h - 0.34),))


def table_lamp(shop: Workshop) -> Piece:
    """A turned foot with a shade, or a desk lamp with an arm."""
    rng, shape = shop.rng, shop.shape()
    if rng.uniform() < 0.7:
        foot = shop.flat(shop.vivid(), gloss=0.4) if rng.uniform() < 0.5 else shop.wood()
        h, r = rng.uniform(0.36, 0.5), rng.uniform(0.11, 0.15)
        belly = rng.uniform(0.03, 0.08)
        shape.turned((0, 0, 0), [(0, 0), (0.07, 0), (0.06, 0.02), (belly, h * 0.25), (0.015, h * 0.5)], foot)
        shape.cylinder((0, 0, h * 0.5), 0.01, h * 0.2, shop.metal(), sides=8)
        shape.turned((0, 0, h * 0.55), [(r, 0), (r * 0.65, h * 0.45), (0, h * 0.45)], _shade(shop), sides=18)
        return shop.piece("lamp", "table_lamp", shape, glow=((0, 0, h * 0.5),))
    metal = shop.metal()
    shape.cylinder((0, 0, 0), 0.08, 0.02, metal, sides=16)
    shape.box((0, -0.06, 0.18), (0.016, 0.016, 0.34), metal, rotation_x(0.35))
    shape.box((0, -0.03, 0.42), (0.016, 0.26, 0.016), metal, rotation_x(0.35))
    shape.turned((0, 0.1, 0.4), [(0.075, 0.0), (0.03, 0.1), (0.0, 0.1)], metal, sides=14)
    shape.turned((0, 0.1, 0.4), [(0.0, 0.006), (0.07, 0.004)], _shade(shop), sides=14)
    return shop.piece("lamp", "desk_lamp", shape, glow=((0, 0.1, 0.38),))


def ceiling_lamp(shop: Workshop, drop: float) -> Piece:
    """A pendant (``drop`` > 0.25 m below the ceiling) or a flat dish; its origin is at its lowest point."""
    rng, shape = shop.rng, shop.shape()
    shade = _shade(shop)
    if drop > 0.25:
        r, h = rng.uniform(0.16, 0.26), rng.uniform(0.16, 0.26)
        outer = shade if rng.uniform() < 0.5 else shop.metal()
        if rng.uniform() < 0.5:
            shape.turned((0, 0, 0), [(r, 0), (r * 0.85, h * 0.5), (0.05, h)], outer, sides=22)
            shape.turned((0, 0, 0.012), [(0, 0), (r * 0.93, 0)], shade, sides=22)
        else:
            shape.cushion((0, 0, h / 2), (2 * r, 2 * r, h), shade, edge=1.0)
        shape.cylinder((0, 0, h - 0.01), 0.008, drop - h, shop.black(), sides=6)
        shape.cylinder((0, 0, drop - 0.03), 0.05, 0.03, shop.metal(), sides=14)
    else:
        r = rng.uniform(0.18, 0.28)
        shape.turned((0, 0, 0), [(0, 0), (r * 0.6, 0.01), (r, drop * 0.6), (r, drop)], shade, sides=22)
    return shop.piece("lamp", "ceiling_lamp", shape, glow=((0, 0, -0.03),))


def _leaves(shop: Workshop, count: int, length: float, width: float, base: float, lift: float) -> np.ndarray:
    """(S, 5, 2, 3) leaves that start at height ``base`` and bend over with their weight."""
    rng = shop.rng
    t = np.linspace(0, 1, 5)
    leaves = []
    for k in range(count):
        a = 2 * np.pi * (k * 0.618) + rng.normal(0, 0.2)
        own, up = length * rng.uniform(0.65, 1.0), lift + rng.normal(0, 0.15)
        out = own * t * np.cos(up)
        z = base * rng.uniform(0.8, 1.0) + own * (t * np.sin(up) - 0.55 * t**2 * (1.2 - np.sin(up)))
        middle = np.stack([out * np.cos(a), out * np.sin(a), z], 1)
        across = np.array([-np.sin(a), np.cos(a), 0.0])
        half = (width / 2) * np.sin(np.pi * np.clip(t * 0.92 + 0.08, 0, 1))[:, None]
        leaves.append(np.stack([middle - half * across, middle + half * across], axis=1))
    return np.array(leaves)


def _plant(shop: Workshop, kind: str, pot_r: float, pot_h: float, reach: float) -> Piece:
    rng, shape = shop.rng, shop.shape()
    pot = shop.flat(shop.vivid(), gloss=0.3) if rng.uniform() < 0.5 else shop.flat((0.42, 0.16, 0.08))
    if rng.uniform() < 0.3:
        pot = shop.flat((0.75, 0.74, 0.72), gloss=0.3)
    shape.turned(
        (0, 0, 0), [(0, 0), (pot_r * 0.75, 0), (pot_r, pot_h), (pot_r * 0.88, pot_h), (pot_r * 0.85, pot_h * 0.88)], pot
    )
    shape.turned((0, 0, pot_h * 0.88), [(pot_r * 0.87, 0), (0, 0.01)], shop.flat((0.05, 0.03, 0.02)))
    hue = rng.uniform(0.24, 0.38)
    dark, light = colour(hue, 0.75, rng.uniform(0.3, 0.45)), colour(hue, 0.6, rng.uniform(0.5, 0.75))
    green = shop.material("carpet", dark, light, tile=0.3, gloss=0.15)
    style = rng.integers(3)
    if style == 0:  # long upright blades
        shape.sheets(_leaves(shop, 18, reach * 1.05, reach * 0.12, pot_h, 1.25), green)
    elif style == 1:  # broad leaves that hang over
        shape.sheets(_leaves(shop, 16, reach * 0.62, reach * 0.3, pot_h + reach * 0.05, 0.75), green)
        shape.sheets(_leaves(shop, 8, reach * 0.6, reach * 0.26, pot_h + reach * 0.2, 1.05), green)
    else:  # a small tree: stem and a crown of tufts
        stem = reach * 0.45
        shape.cylinder((0, 0, pot_h * 0.85), 0.04 * reach, stem, shop.flat((0.13, 0.08, 0.04)), sides=7)
        for k in range(6):
            a, z = 2 * np.pi * k / 6, pot_h + stem + reach * rng.uniform(0.0, 0.3)
            r = reach * rng.uniform(0.05, 0.2)
            size = reach * rng.uniform(0.22, 0.34)
            shape.cushion((r * np.cos(a), r * np.sin(a), z), (size, size, size * 0.8), green, edge=1.0)
        shape.sheets(_leaves(shop, 16, reach * 0.42, reach * 0.16, pot_h + stem + reach * 0.1, 0.7), green)
    return shop.piece("plant", kind, shape)


def floor_plant(shop: Workshop) -> Piece:
    """A large plant in a pot on the floor."""
    r = float(shop.rng.uniform(0.13, 0.2))
    return _plant(shop, "floor_plant", r, r * float(shop.rng.uniform(1.5, 2.2)), float(shop.rng.uniform(0.6, 0.95)))


def pot_plant(shop: Workshop) -> Piece:
    """A small plant for a table."""
    r = float(shop.rng.uniform(0.06, 0.085))
    return _plant(shop, "pot_plant", r, r * float(shop.rng.uniform(1.4, 2.0)), float(shop.rng.uniform(0.2, 0.32)))


def picture(shop: Workshop) -> Piece:
    """A framed picture; it hangs with its back on the wall, its origin at its lower edge."""
    rng, shape = shop.rng, shop.shape()
    w, h = rng.uniform(0.4, 0.95), rng.uniform(0.4, 0.75)
    frame, edge = (shop.wood() if rng.uniform() < 0.6 else shop.black()), rng.uniform(0.02, 0.045)
    shape.box((0, 0.0125, h / 2), (w - 0.01, 0.02, h - 0.01), shop.image("painting"))
    for s in (-1, 1):
        shape.box((s * (w - edge) / 2, 0.0175, h / 2), (edge, 0.035, h), frame)
        shape.box((0, 0.0175, h / 2 + s * (h - edge) / 2), (w - 2 * edge, 0.035, edge), frame)
    return shop.piece("picture", "picture", shape)


def mirror(shop: Workshop) -> Piece:
    """A framed glass that reflects the room; its depth and its mask are those of the glass."""
    rng, shape = shop.rng, shop.shape()
    w, h, edge = rng.uniform(0.5, 0.85), rng.uniform(0.6, 0.85), 0.025
    frame = shop.metal() if rng.uniform() < 0.6 else shop.wood()
    glass = shop.flat((0.05, 0.06, 0.06), mirror=0.85)
    shape.box((0, 0.01, h / 2), (w - 0.01, 0.016, h - 0.01), glass)
    for s in (-1, 1):
        shape.box((s * (w - edge) / 2, 0.0125, h / 2), (edge, 0.025, h), frame)
        shape.box((0, 0.0125, h / 2 + s * (h - edge) / 2), (w - 2 * edge, 0.025, edge), frame)
    return shop.piece("mirror", "mirror", shape)


def rug(shop: Workshop, width: float, depth: float) -> Piece:
    """A rectangular or round rug, 12 mm thick."""
    rng, shape = shop.rng, shop.shape()
    first, second = shop.vivid(), (shop.vivid() if rng.uniform() < 0.5 else (0.72, 0.68, 0.6))
    if rng.uniform() < 0.2:
        r = min(width, depth) / 2
        cloth = shop.material("carpet", (first[0] * 0.6, first[1] * 0.6, first[2] * 0.6), first, tile=0.6)
        shape.cylinder((0, 0, 0), r, 0.012, cloth, sides=32)
    else:
        number = shop.material("rug", first, second)
        cloth = Material(number.texture, number.dark, number.light, fit=True)
        if rng.uniform() < 0.35:
            cloth = shop.material(str(rng.choice(["stripes", "chevron", "carpet", "plaid"])), first, second, tile=0.8)
        shape.box((0, 0, 0.006), (width, depth, 0.012), cloth)
    return shop.piece("rug", "rug", shape)


def television(shop: Workshop) -> Piece:
    """A wide screen on a foot."""
    rng, shape = shop.rng, shop.shape()
    w = rng.uniform(0.85, 1.2)
    return _screen(shop, shape, w, w * 0.57, "television", 0.06)


def monitor(shop: Workshop) -> Piece:
    """A computer's screen with keyboard and mouse before it."""
    rng, shape = shop.rng, shop.shape()
    w = rng.uniform(0.48, 0.66)
    shape.box((0, 0.24, 0.012), (0.4, 0.13, 0.02), shop.black())
    shape.cushion((0.28, 0.24, 0.015), (0.06, 0.1, 0.03), shop.black(), edge=0.7)
    return _screen(shop, shape, w, w * 0.6, "monitor", 0.12)


def _screen(shop: Workshop, shape: Shape, w: float, h: float, kind: str, stem: float) -> Piece:
    black = shop.black(gloss=0.3)
    shape.box((0, 0, 0.008), (w * 0.35, 0.2, 0.016), black)
    shape.box((0, -0.02, stem / 2 + 0.04), (0.06, 0.025, stem + 0.06), black)
    shape.box((0, 0, stem + h / 2), (w, 0.035, h), black)
    shape.box((0, 0.019, stem + h / 2), (w - 0.03, 0.004, h - 0.03), shop.image("screen", gloss=0.5, emission=0.6))
    return shop.piece("television", kind, shape)


def curtain(shop: Workshop, width: float, height: float, cloth: Material) -> Piece:
    """A length of folded cloth that hangs from a rod; its origin is at its lower edge, its back on the wall."""
    shape = shop.shape()
    folds = max(3, round(width / 0.11))
    x = np.linspace(-width / 2, width / 2, folds * 6 + 1)
    y = 0.06 + 0.03 * np.sin(2 * np.pi * folds * (x / width))
    lower, upper = np.stack([x, y, np.zeros_like(x)], 1), np.stack([x, 0.8 * y + 0.012, np.full_like(x, height)], 1)
    shape.sheets(np.stack([upper, lower], axis=1)[None], cloth)
    shape.box((0, 0.06, height + 0.01), (width + 0.06, 0.025, 0.025), shop.metal())
    return shop.piece("curtain", "curtain", shape)


def door(shop: Workshop, width: float, height: float) -> Piece:
    """Frame, leaf with panels, and a handle; its back lies on the wall."""
    rng, shape = shop.rng, shop.shape()
    frame = shop.flat((0.8, 0.79, 0.77), gloss=0.15) if rng.uniform() < 0.6 else shop.wood()
    leaf = frame if rng.uniform() < 0.5 else shop.body()
    edge = 0.08
    for s in (-1, 1):
        shape.box((s * (width + edge) / 2, 0.025, height / 2), (edge, 0.05, height), frame)
    shape.box((0, 0.025, height + edge / 2), (width + 2 * edge, 0.05, edge), frame)
    shape.box((0, 0.0125, height / 2), (width, 0.025, height), leaf)
    style = rng.integers(3)
    if style < 2:
        panels = [(0.12, 0.42), (0.5, 0.93)] if style == 0 else [(0.08, 0.3), (0.36, 0.62), (0.68, 0.94)]
        for z0, z1 in panels:
            for s in (-1, 1):
                center = (s * width * 0.22, 0.03, height * (z0 + z1) / 2)
                shape.box(center, (width * 0.32, 0.012, height * (z1 - z0)), leaf)
    elif rng.uniform() < 0.5:
        glass = shop.image("outside", gloss=0.4, emission=0.25, dim=0.7)
        shape.box((0, 0.028, height * 0.68), (width * 0.6, 0.006, height * 0.45), glass)
    metal, side = shop.metal(), float(rng.choice([-1, 1])) * (width / 2 - 0.07)
    shape.box((side, 0.03, 1.02), (0.04, 0.012, 0.2), metal)
    shape.box((side - np.sign(side) * 0.045, 0.065, 1.05), (0.13, 0.018, 0.022), metal)
    shape.cylinder((side, 0.03, 1.05), 0.01, 0.001, metal, sides=8)
    return shop.piece("door", "door", shape)


def window(shop: Workshop, width: float, height: float) -> Piece:
    """A frame with bars, the view outside, and a sill; its back lies on the wall, its origin at its lower edge."""
    rng, shape = shop.rng, shop.shape()
    frame = shop.flat((0.82, 0.82, 0.8), gloss=0.2) if rng.uniform() < 0.7 else shop.wood()
    edge = 0.06
    shape.box((0, 0.008, height / 2), (width - edge, 0.012, height - edge), shop.image("outside", emission=1.15))
    for s in (-1, 1):
        shape.box((s * (width - edge) / 2, 0.03, height / 2), (edge, 0.06, height), frame)
        shape.box((0, 0.03, height / 2 + s * (height - edge) / 2), (width - 2 * edge, 0.06, edge), frame)
    bars = max(1, round(width / 0.6))
    for k in range(1, bars):
        shape.box((-width / 2 + k * width / bars, 0.025, height / 2), (0.04, 0.045, height - 2 * edge), frame)
    if rng.uniform() < 0.4:
        shape.box((0, 0.022, height * 0.6), (width - 2 * edge, 0.04, 0.03), frame)
    shape.box((0, 0.08, -0.015), (width + 0.08, 0.16, 0.03), frame)
    return shop.piece("window", "window", shape)
