"""Placement: where a piece may stand, lie or hang in a rectangular room so that nothing collides.

The room's own frame has its origin in one corner of the floor: x in [0, width], y in [0, depth], z up. Walls
are numbered 0 (y = 0), 1 (x = width), 2 (y = depth), 3 (x = 0); a piece that stands with its back on wall k is
turned by k * 90 degrees, since pieces face along +y.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.data.rooms.furniture.workshop import Piece
from services.data.rooms.shapes import rotation_z

GAP = 0.015
"""Metres between a piece and the wall, so that a skirting board fits behind it."""


@dataclass(frozen=True, slots=True)
class Zone:
    """An upright box: an oriented rectangle on the floor between two heights. Metres, radians."""

    center: tuple[float, float]
    half: tuple[float, float]
    yaw: float
    low: float
    high: float

    def corners(self) -> np.ndarray:
        """(4, 2) corners of the rectangle."""
        turn = rotation_z(self.yaw)[:2, :2]
        signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.asarray(self.half)
        return signs @ turn.T + np.asarray(self.center)

    def grown(self, margin: float) -> Zone:
        """The zone with ``margin`` metres more on every side of the rectangle (less, when negative)."""
        half = (self.half[0] + margin, self.half[1] + margin)
        return Zone(self.center, half, self.yaw, self.low, self.high)


def overlaps(zone: Zone, others: Sequence[Zone]) -> np.ndarray:
    """Which of ``others`` share volume with ``zone``: (N,) bool, by separating axes."""
    if not others:
        return np.zeros(0, bool)
    own = zone.corners()
    theirs = np.stack([z.corners() for z in others])  # (N, 4, 2)
    apart = np.array([z.low >= zone.high - 1e-9 or z.high <= zone.low + 1e-9 for z in others])
    for k in (0, 1):
        axis = own[k + 1] - own[k]
        a, b = own @ axis, theirs @ axis
        apart |= (b.min(1) >= a.max() - 1e-9) | (b.max(1) <= a.min() + 1e-9)
        axes = theirs[:, k + 1] - theirs[:, k]
        a, b = axes @ own.T, np.einsum("nij,nj->ni", theirs, axes)
        apart |= (b.min(1) >= a.max(1) - 1e-9) | (b.max(1) <= a.min(1) + 1e-9)
    return ~apart


@dataclass(slots=True)
class Placed:
    """A piece at its place in the room."""

    piece: Piece
    position: np.ndarray
    """(3,) where the origin of the piece's frame lies."""
    yaw: float
    zone: Zone
    """The tight oriented box around it."""
    parent: int | None = None
    """Number of the piece that it stands on; None for the floor, a wall or the ceiling."""

    def point(self, local: Sequence[float]) -> np.ndarray:
        """A point of the piece's frame in the room's frame."""
        return rotation_z(self.yaw) @ np.asarray(local, float) + self.position


def zone_of(piece: Piece, position: np.ndarray, yaw: float) -> Zone:
    """The tight oriented box around a piece at a place."""
    middle = (piece.low + piece.high) / 2
    center = rotation_z(yaw)[:2, :2] @ middle[:2] + position[:2]
    half = piece.size[:2] / 2
    low, high = position[2] + piece.low[2], position[2] + piece.high[2]
    return Zone((float(center[0]), float(center[1])), (float(half[0]), float(half[1])), yaw, float(low), float(high))


@dataclass(frozen=True, slots=True)
class Reserved:
    """Room that must stay free: of a door or window (owner None), or before the placed piece ``owner``."""

    zone: Zone
    owner: int | None = None


@dataclass(slots=True)
class Layout:
    """The room that is being furnished."""

    rng: np.random.Generator
    width: float
    depth: float
    height: float
    placed: list[Placed] = field(default_factory=list)
    reserved: list[Reserved] = field(default_factory=list)
    """Must stay free of furniture: before doors and windows, before what people use."""

    def wall_length(self, wall: int) -> float:
        """Length in metres of one of the four walls."""
        return self.width if wall % 2 == 0 else self.depth

    def wall_point(self, wall: int, along: float, out: float) -> np.ndarray:
        """(2,) ``along`` metres from the middle of the wall, ``out`` metres into the room."""
        middle = np.array(
            [(self.width / 2, 0.0), (self.width, self.depth / 2), (self.width / 2, self.depth), (0.0, self.depth / 2)]
        )[wall]
        turn = rotation_z(wall * np.pi / 2)[:2, :2]
        return middle + turn @ np.array([along, out])

    def of_kind(self, *kinds: str) -> list[int]:
        """Numbers of the placed pieces of these kinds, in order of placement."""
        return [i for i, p in enumerate(self.placed) if p.piece.kind in kinds]

    def try_place(
        self,
        piece: Piece,
        xy: Sequence[float] | np.ndarray,
        yaw: float,
        *,
        z: float = 0.0,
        clear: float = 0.0,
        margin: float = 0.01,
        parent: int | None = None,
        near: Iterable[int] = (),
    ) -> int | None:
        """Places the piece if it fits, and gives its number.

        Args:
            piece: what to place.
            xy: where the origin of its frame goes, metres.
            yaw: which way it is turned, radians.
            z: height of its origin, metres.
            clear: metres before its front that must be free now and stay free.
            margin: metres to other pieces.
            parent: what it stands on; may be touched.
            near: pieces whose free front it may stand in (a table before its sofa).
        """
        position = np.array([xy[0], xy[1], z], float)
        zone = zone_of(piece, position, yaw)
        if not self._inside(zone) or zone.high > self.height + 1e-6:
            return None
        # A rug lies under what stands on it, so it collides with other rugs only.
        is_rug = piece.kind == "rug"
        solid = [p.zone for i, p in enumerate(self.placed) if i != parent and (p.piece.kind == "rug") == is_rug]
        if overlaps(zone.grown(margin), solid).any():
            return None
        kept = [r.zone for r in self.reserved if r.owner is None or r.owner not in set(near)]
        if not is_rug and parent is None and overlaps(zone, kept).any():
            return None
        placed = Placed(piece, position, yaw, zone, parent)
        if clear > 0:
            front = front_of(placed, clear)
            if not self._inside(front) or overlaps(front, solid).any():
                return None
            self.reserved.append(Reserved(front, len(self.placed)))
        self.placed.append(placed)
        return len(self.placed) - 1

    def _inside(self, zone: Zone) -> bool:
        corners = zone.corners()
        return bool((corners >= -1e-6).all() and (corners <= np.array([self.width, self.depth]) + 1e-6).all())

    def against_wall(
        self,
        piece: Piece,
        *,
        walls: Sequence[int] = (0, 1, 2, 3),
        clear: float = 0.0,
        z: float = 0.0,
        gap: float = GAP,
        where: str = "any",
        margin: float = 0.01,
        tries: int = 28,
    ) -> int | None:
        """Places the piece with its back on a wall. ``where``: "any", "middle" or "corner" of the wall."""
        middle, half = (piece.low[0] + piece.high[0]) / 2, piece.size[0] / 2
        out = gap - float(piece.low[1])
        for _ in range(tries):
            wall = int(self.rng.choice(walls))
            reach = self.wall_length(wall) / 2 - half - GAP
            if reach < 0:
                continue
            if where == "middle":
                along = float(np.clip(self.rng.normal(0, 0.25 * reach), -reach, reach))
            elif where == "corner":
                along = float(self.rng.choice([-1, 1])) * (reach - abs(self.rng.normal(0, 0.03)))
            else:
                along = float(self.rng.uniform(-reach, reach))
            xy = self.wall_point(wall, along - middle, out)
            found = self.try_place(piece, xy, wall * np.pi / 2, z=z, clear=clear, margin=margin)
            if found is not None:
                return found
        return None

    def on_top(
        self, piece: Piece, parent: int, *, tries: int = 10, turn: float = 0.2, back: bool = False
    ) -> int | None:
        """Stands the piece on the first surface of ``parent``; ``back`` puts it at the rear edge."""
        base = self.placed[parent]
        if not base.piece.tops:
            return None
        top = base.piece.tops[0]
        low = np.array([top.x[0], top.y[0]]) - piece.low[:2]
        high = np.array([top.x[1], top.y[1]]) - piece.high[:2]
        for _ in range(tries):
            if (low > high).any():
                return None
            local = self.rng.uniform(low, high)
            if back:
                local[1] = low[1]
            yaw = base.yaw + (0.0 if back else float(self.rng.normal(0, turn)))
            xyz = base.point((local[0], local[1], top.z))
            # A turned piece must still stand wholly on its support.
            corners = zone_of(piece, xyz, yaw).corners() - base.position[:2]
            corners = corners @ rotation_z(base.yaw)[:2, :2]
            if (corners < [top.x[0] - 0.05, top.y[0] - 0.05]).any() or (
                corners > [top.x[1] + 0.05, top.y[1] + 0.05]
            ).any():
                continue
            found = self.try_place(piece, xyz[:2], yaw, z=float(xyz[2]), parent=parent, margin=0.005)
            if found is not None:
                return found
        return None

    def beside(self, piece: Piece, of: int, side: int, *, gap: float = 0.06, back: bool = True) -> int | None:
        """Places the piece to the left (-1) or right (1) of another, backs in line, looking the same way."""
        base = self.placed[of]
        edge = base.piece.high[0] if side > 0 else base.piece.low[0]
        x = edge + gap - piece.low[0] if side > 0 else edge - gap - piece.high[0]
        y = base.piece.low[1] - piece.low[1] if back else 0.0
        point = base.point((x, y, 0.0))
        return self.try_place(piece, point[:2], base.yaw, near=(of,))

    def before(self, piece: Piece, of: int, distance: float, *, facing: bool, shift: float = 0.0) -> int | None:
        """Places the piece ``distance`` metres before another's front, looking back at it or the same way."""
        base = self.placed[of]
        back_edge = piece.high[1] if facing else -piece.low[1]
        local = (shift, float(base.piece.high[1]) + distance + float(back_edge), 0.0)
        point = base.point(local)
        return self.try_place(piece, point[:2], base.yaw + (np.pi if facing else 0.0), near=(of,))

    def in_open(self, piece: Piece, *, margin: float, aligned: bool = True, tries: int = 40) -> int | None:
        """Places the piece freely in the room with ``margin`` metres around it, nearest the middle first."""
        room = np.array([self.width, self.depth])
        for k in range(tries):
            spread = 0.05 + 0.9 * k / tries
            xy = room / 2 + self.rng.uniform(-0.5, 0.5, 2) * room * spread
            yaw = float(self.rng.integers(4)) * np.pi / 2 if aligned else float(self.rng.uniform(0, 2 * np.pi))
            found = self.try_place(piece, xy, yaw, margin=margin)
            if found is not None:
                return found
        return None


def front_of(placed: Placed, depth: float) -> Zone:
    """The zone of ``depth`` metres before a piece's front, as wide as the piece."""
    piece = placed.piece
    middle = ((piece.low[0] + piece.high[0]) / 2, piece.high[1] + depth / 2, 0.0)
    center = placed.point(middle)
    return Zone((float(center[0]), float(center[1])), (float(piece.size[0]) / 2, depth / 2), placed.yaw, 0.02, 1.8)
