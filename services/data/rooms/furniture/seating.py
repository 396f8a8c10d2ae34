"""Chairs, armchairs, stools, sofas and beds."""

from __future__ import annotations

import numpy as np

from services.data.rooms.furniture.workshop import Piece, Top, Workshop, legs
from services.data.rooms.shapes import rotation_x, rotation_z


def dining_chair(shop: Workshop) -> Piece:
    """Four legs, a seat, and a back of slats, of one board, or upholstered."""
    rng, shape = shop.rng, shop.shape()
    frame = shop.wood() if rng.uniform() < 0.75 else shop.flat(shop.paint_colour, gloss=0.2)
    w, d, seat, top = rng.uniform(0.42, 0.47), rng.uniform(0.42, 0.48), 0.45, rng.uniform(0.82, 1.0)
    post = 0.035
    legs(shape, frame, w, d, seat - 0.03, post + 0.008, round_=bool(rng.uniform() < 0.4))
    soft = rng.uniform() < 0.45
    cloth = shop.cloth() if soft else frame
    shape.box((0, 0, seat - 0.02), (w, d, 0.03), frame)
    if soft:
        shape.cushion((0, 0, seat + 0.015), (w * 0.98, d * 0.98, 0.06), cloth)
    back = -d / 2 + post / 2
    for sx in (-1, 1):
        shape.box((sx * (w / 2 - post / 2), back, (seat + top) / 2), (post, post, top - seat), frame)
    style = rng.integers(3)
    inner = w - 2 * post
    if style == 0:
        for x in np.linspace(-inner / 2 + 0.04, inner / 2 - 0.04, int(rng.integers(3, 6))):
            shape.box((x, back, (seat + top) / 2), (0.025, 0.018, top - seat - 0.04), frame)
        shape.box((0, back, top - 0.03), (inner, 0.03, 0.06), frame)
    elif style == 1:
        for z in np.linspace(seat + 0.14, top - 0.04, int(rng.integers(2, 5))):
            shape.box((0, back, z), (inner, 0.022, 0.055), frame)
    else:
        panel = (inner, 0.035, top - seat - 0.14)
        center = (0, back, seat + 0.12 + panel[2] / 2)
        if soft:
            shape.cushion(center, (inner, 0.06, panel[2]), cloth, edge=0.25)
        else:
            shape.box(center, panel, cloth)
    return shop.piece("chair", "dining_chair", shape)


def office_chair(shop: Workshop) -> Piece:
    """A swivel chair: a star of five feet with castors, a gas spring, seat, back, and often arms."""
    rng, shape = shop.rng, shop.shape()
    dark = shop.black() if rng.uniform() < 0.6 else shop.metal()
    cloth = shop.cloth(patterned=0.05) if rng.uniform() < 0.6 else shop.flat((0.03, 0.03, 0.035), gloss=0.1)
    seat = rng.uniform(0.44, 0.52)
    for k in range(5):
        turn = rotation_z(2 * np.pi * k / 5 + np.pi / 2)
        shape.box(turn @ np.array([0, 0.14, 0.075]), (0.045, 0.26, 0.03), dark, turn)
        shape.cushion(turn @ np.array([0, 0.25, 0.03]), (0.05, 0.06, 0.06), dark, edge=0.8)
    shape.cylinder((0, 0, 0.07), 0.028, seat - 0.1, dark, sides=10)
    shape.cushion((0, 0, seat), (0.5, 0.48, 0.09), cloth, edge=0.4)
    height = rng.uniform(0.45, 0.68)
    lean = rotation_x(rng.uniform(0.05, 0.15))
    shape.box((0, -0.24, seat + 0.08), (0.07, 0.03, 0.26), dark, lean)
    shape.cushion((0, -0.25, seat + 0.14 + height / 2), (0.45, 0.08, height), cloth, edge=0.35, rotation=lean)
    if rng.uniform() < 0.7:
        for sx in (-1, 1):
            shape.box((sx * 0.265, -0.02, seat + 0.1), (0.03, 0.05, 0.2), dark)
            shape.box((sx * 0.265, 0.0, seat + 0.21), (0.06, 0.26, 0.03), dark)
    return shop.piece("chair", "office_chair", shape)


def stool(shop: Workshop) -> Piece:
    """Three or four legs and a round seat."""
    rng, shape = shop.rng, shop.shape()
    frame, height = shop.wood() if rng.uniform() < 0.6 else shop.metal(), rng.uniform(0.42, 0.5)
    count = int(rng.integers(3, 5))
    for k in range(count):
        a = 2 * np.pi * k / count + 0.4
        shape.cylinder((0.14 * np.cos(a), 0.14 * np.sin(a), 0), 0.016, height, frame, sides=8)
    shape.cylinder((0, 0, height), 0.19, 0.035, frame, sides=18)
    shape.cushion((0, 0, height + 0.05), (0.37, 0.37, 0.07), shop.cloth(), edge=0.9)
    return shop.piece("chair", "stool", shape)


def armchair(shop: Workshop) -> Piece:
    """An upholstered seat for one."""
    return _couch(shop, 1, float(shop.rng.uniform(0.78, 0.92)), "chair", "armchair")


def sofa(shop: Workshop) -> Piece:
    """A couch for two or three."""
    seats = int(shop.rng.choice([2, 2, 3]))
    return _couch(shop, seats, float(0.42 + seats * shop.rng.uniform(0.56, 0.64)), "sofa", "sofa")


def _couch(shop: Workshop, seats: int, width: float, label: str, kind: str) -> Piece:
    """Base, back, two arms, a cushion a seat, and loose pillows."""
    rng, shape = shop.rng, shop.shape()
    cloth, depth = shop.cloth(patterned=0.2), rng.uniform(0.8, 0.92)
    arm, seat, top, foot = rng.uniform(0.12, 0.2), rng.uniform(0.4, 0.46), rng.uniform(0.74, 0.9), 0.1
    edge = float(rng.choice([0.12, 0.25]))
    legs(shape, shop.wood() if rng.uniform() < 0.6 else shop.metal(), width - 0.1, depth - 0.1, foot, 0.05, round_=True)
    shape.box((0, 0, foot + 0.08), (width - 0.02, depth - 0.04, 0.16), cloth)
    back = 0.2
    shape.cushion((0, -depth / 2 + back / 2, (foot + top) / 2), (width, back, top - foot), cloth, edge=edge)
    side = rng.uniform(0.56, 0.66)
    for sx in (-1, 1):
        shape.cushion((sx * (width - arm) / 2, 0, (foot + side) / 2), (arm, depth, side - foot), cloth, edge=edge)
    inner = (width - 2 * arm) / seats
    other = shop.cloth(patterned=0.3) if rng.uniform() < 0.2 else cloth
    for k in range(seats):
        x = (k - (seats - 1) / 2) * inner
        shape.cushion((x, back / 2, seat - 0.07), (inner, depth - back, 0.18), other, edge=0.25)
        shape.cushion(
            (x, -depth / 2 + back + 0.07, seat + 0.17), (inner * 0.96, 0.2, 0.38), other, rotation=rotation_x(0.15)
        )
    for x in rng.uniform(-0.4, 0.4, int(rng.integers(0, seats + 1))):
        tilt = rotation_z(rng.normal(0, 0.25)) @ rotation_x(0.35)
        at = (x * (width - 2 * arm - 0.3), -depth / 2 + back + 0.24, seat + 0.2)
        shape.cushion(at, (0.38, 0.13, 0.36), shop.cloth(patterned=0.7), edge=0.5, rotation=tilt)
    return shop.piece(label, kind, shape)


def bed(shop: Workshop) -> Piece:
    """Frame with head board, mattress, blanket and pillows; the head is at the back."""
    rng, shape = shop.rng, shop.shape()
    double = rng.uniform() < 0.65
    width, length = (rng.uniform(1.4, 1.7) if double else rng.uniform(0.92, 1.1)), rng.uniform(1.98, 2.1)
    frame = shop.body() if rng.uniform() < 0.7 else shop.cloth(patterned=0.0)
    base = rng.uniform(0.25, 0.34)
    legs(shape, frame, width - 0.06, length - 0.1, 0.14, 0.07, round_=False)
    shape.box((0, 0, (0.12 + base) / 2), (width, length, base - 0.12), frame)
    head = rng.uniform(0.85, 1.15)
    shape.box((0, -length / 2 + 0.03, head / 2), (width + 0.06, 0.06, head), frame)
    sheet = shop.flat((0.78, 0.77, 0.74))
    shape.cushion((0, 0.03, base + 0.1), (width - 0.04, length - 0.08, 0.22), sheet, edge=0.15)
    blanket = shop.cloth(patterned=0.55)
    cover = rng.uniform(0.62, 0.78) * length
    at = (0.0, length / 2 - cover / 2 - 0.005, base + 0.13)
    shape.cushion(at, (width + 0.05, cover, 0.25), blanket, edge=0.18)
    if rng.uniform() < 0.5:  # a folded throw across the foot of the bed
        shape.cushion((0, length / 2 - 0.35, base + 0.16), (width + 0.08, 0.5, 0.24), shop.cloth(), edge=0.18)
    pillow = shop.cloth(patterned=0.5) if rng.uniform() < 0.5 else sheet
    for x in (-width / 4, width / 4) if double else (0.0,):
        turn = rotation_z(rng.normal(0, 0.06)) @ rotation_x(0.35)
        at = (x, -length / 2 + 0.28, base + 0.27)
        shape.cushion(at, (min(0.66, width * 0.46), 0.4, 0.16), pillow, edge=0.55, rotation=turn)
    return shop.piece("bed", "bed", shape)


def bench(shop: Workshop) -> Piece:
    """A long low seat without a back: a table's height for small things in a hall, or a seat at a table."""
    rng, shape = shop.rng, shop.shape()
    w, d, h = rng.uniform(0.9, 1.3), rng.uniform(0.34, 0.42), 0.44
    frame = shop.wood()
    legs(shape, frame, w - 0.06, d - 0.04, h - 0.04, 0.055, round_=False)
    shape.box((0, 0, h - 0.02), (w, d, 0.04), frame)
    shape.cushion((0, 0, h + 0.025), (w * 0.96, d * 0.94, 0.06), shop.cloth(), edge=0.3)
    top = Top(h + 0.055, (-w / 2, w / 2), (-d / 2, d / 2))
    return shop.piece("chair", "bench", shape, (top,))
