"""What every piece of furniture is made with: the scene's palette, its materials and its random generator."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, field

import numpy as np

from services.data.rooms.shapes import Material, Shape, Triangles
from services.data.rooms.textures import KEEP_PROCEDURAL, Atlas

Colour = tuple[float, float, float]

WOODS: tuple[tuple[Colour, Colour], ...] = (
    ((0.42, 0.26, 0.13), (0.66, 0.46, 0.27)),  # oak
    ((0.10, 0.05, 0.025), (0.24, 0.13, 0.07)),  # walnut
    ((0.55, 0.42, 0.27), (0.78, 0.64, 0.46)),  # birch
    ((0.20, 0.07, 0.03), (0.40, 0.17, 0.08)),  # cherry
    ((0.05, 0.035, 0.03), (0.11, 0.08, 0.065)),  # wenge
    ((0.62, 0.60, 0.56), (0.80, 0.78, 0.74)),  # whitewashed
)
METALS: tuple[Colour, ...] = ((0.45, 0.45, 0.47), (0.06, 0.06, 0.065), (0.5, 0.36, 0.14), (0.75, 0.75, 0.75))


def colour(hue: float, saturation: float, value: float) -> Colour:
    """Linear RGB of a hue, saturation and value in [0, 1]."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return r**2.2, g**2.2, b**2.2


@dataclass(frozen=True, slots=True)
class Top:
    """A surface on which smaller things may stand: a rectangle in the object's frame at height ``z``."""

    z: float
    x: tuple[float, float]
    y: tuple[float, float]


@dataclass(slots=True)
class Piece:
    """A finished object in its own frame, before it is placed."""

    label: str
    kind: str
    """The builder's name: finer than the label (an armchair and an office chair are both chairs)."""
    triangles: Triangles
    low: np.ndarray
    """(3,) lower corner of the tight box around the triangles."""
    high: np.ndarray
    tops: tuple[Top, ...] = ()
    glow: tuple[tuple[float, float, float], ...] = ()
    """Places in the object's frame from which it gives light."""

    @property
    def size(self) -> np.ndarray:
        """(3,) width, depth, height in metres."""
        return self.high - self.low


@dataclass(slots=True)
class Workshop:
    """Makes materials in the scene's style. One style a scene keeps its furniture in one family of looks."""

    rng: np.random.Generator
    atlas: Atlas
    materials: list[Material] = field(default_factory=list)
    woods: list[tuple[Colour, Colour]] = field(init=False)
    hues: list[float] = field(init=False)
    metal_colour: Colour = field(init=False)
    paint_colour: Colour = field(init=False)

    def __post_init__(self) -> None:
        rng = self.rng
        order = rng.permutation(len(WOODS))
        self.woods = [WOODS[order[0]], WOODS[order[1]]]
        first = rng.uniform()
        self.hues = [first, first + rng.choice([0.08, 0.33, 0.5]), rng.uniform()]
        self.metal_colour = METALS[rng.integers(len(METALS))]
        self.paint_colour = colour(rng.uniform(), rng.uniform(0, 0.12), rng.uniform(0.8, 0.97))

    def shape(self) -> Shape:
        """An empty object whose materials join the scene's."""
        return Shape(self.materials)

    def material(self, texture: str, dark: Colour, light: Colour, *, tile: float = 1.0, **look: float) -> Material:
        """A material of texture ``texture``. A user's image is shown in its own colours."""
        own = self.atlas.of_user and texture not in KEEP_PROCEDURAL
        number = self.atlas.use(texture, self.rng)
        if own:
            dark, light = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return Material(number, dark, light, tile, **look)  # type: ignore[arg-type]

    def image(self, texture: str, *, gloss: float = 0.0, emission: float = 0.0, dim: float = 1.0) -> Material:
        """A picture stretched once over a face, in its own colours."""
        number = self.atlas.use(texture, self.rng)
        return Material(number, (0.0, 0.0, 0.0), (dim, dim, dim), 1.0, gloss, emission, True)

    def flat(self, c: Colour, **look: float) -> Material:
        """An even colour; ``look`` sets gloss, emission or mirror."""
        dark = (c[0] * 0.85, c[1] * 0.85, c[2] * 0.85)
        light = (min(c[0] * 1.15, 1.0), min(c[1] * 1.15, 1.0), min(c[2] * 1.15, 1.0))
        return self.material("plain", dark, light, **look)

    def wood(self, *, other: bool = False) -> Material:
        """The scene's wood, now and then painted."""
        dark, light = self.woods[1 if other else 0]
        return self.material("wood", dark, light, tile=0.8, gloss=0.12)

    def body(self) -> Material:
        """What the carcass of a cupboard or a shelf is made of: wood or paint."""
        roll = self.rng.uniform()
        if roll < 0.55:
            return self.wood(other=roll < 0.15)
        if roll < 0.85:
            return self.flat(self.paint_colour, gloss=0.15)
        return self.flat(self.vivid(0.55), gloss=0.15)

    def vivid(self, value: float | None = None) -> Colour:
        """One of the scene's accent colours."""
        hue = self.hues[self.rng.integers(3)] + self.rng.normal(0, 0.03)
        return colour(hue, self.rng.uniform(0.35, 0.85), value or self.rng.uniform(0.35, 0.9))

    def cloth(self, *, patterned: float = 0.35) -> Material:
        """Upholstery, bedding, curtains: woven, striped, checked, dotted, or leather."""
        rng = self.rng
        c = self.vivid() if rng.uniform() < 0.65 else colour(rng.uniform(0.05, 0.15), 0.15, rng.uniform(0.3, 0.9))
        dark = (c[0] * 0.6, c[1] * 0.6, c[2] * 0.6)
        if rng.uniform() >= patterned:
            name = str(rng.choice(["fabric", "fabric", "carpet", "leather"]))
            return self.material(name, dark, c, tile=0.5, gloss=0.1 if name == "leather" else 0.0)
        name = str(rng.choice(["stripes", "plaid", "dots", "chevron", "damask"]))
        other = self.vivid() if rng.uniform() < 0.5 else (0.75, 0.72, 0.66)
        return self.material(name, c, other, tile=float(rng.uniform(0.45, 0.9)))

    def metal(self) -> Material:
        """Handles, taps, lamp posts."""
        return self.flat(self.metal_colour, gloss=0.6)

    def steel(self) -> Material:
        """Brushed stainless steel, whatever the scene's metal."""
        return self.flat((0.42, 0.43, 0.45), gloss=0.7)

    def ceramic(self) -> Material:
        """White sanitary ware."""
        return self.flat((0.82, 0.82, 0.8), gloss=0.5)

    def black(self, *, gloss: float = 0.2) -> Material:
        """Dark plastic or glass."""
        return self.flat((0.018, 0.018, 0.02), gloss=gloss)

    def piece(
        self,
        label: str,
        kind: str,
        shape: Shape,
        tops: tuple[Top, ...] = (),
        glow: tuple[tuple[float, float, float], ...] = (),
    ) -> Piece:
        """Finishes an object: measures the tight box around it."""
        triangles = shape.triangles()
        points = triangles.corners.reshape(-1, 3)
        return Piece(label, kind, triangles, points.min(axis=0), points.max(axis=0), tops, glow)


def legs(
    shape: Shape, material: Material, width: float, depth: float, height: float, thick: float, *, round_: bool
) -> None:
    """Four legs at the corners of a ``width`` x ``depth`` rectangle."""
    for sx in (-1, 1):
        for sy in (-1, 1):
            x, y = sx * (width / 2 - thick / 2), sy * (depth / 2 - thick / 2)
            if round_:
                shape.cylinder((x, y, 0), thick * 0.32, height, material, top=thick / 2, sides=10)
            else:
                shape.box((x, y, height / 2), (thick, thick, height), material)
