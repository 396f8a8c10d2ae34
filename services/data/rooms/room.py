"""A finished room: geometry with labels and instances in the scene's world frame, and its lights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from configs.schema import RoomsConfig
from services.contracts import Box3D, Instance
from services.data.rooms.classes import IDS
from services.data.rooms.furniture.workshop import Colour, Workshop, colour
from services.data.rooms.layout import Layout, Placed
from services.data.rooms.plan import GENERATOR_VERSION, RoomPlan, plan_room
from services.data.rooms.programmes import EXTENTS, PROGRAMMES, Furnishing, finish, openings
from services.data.rooms.shapes import Material, Triangles, merge, rotation_z
from services.data.rooms.textures import Atlas
from services.errors import DataError

ATTEMPTS = 40
"""Layouts tried before a room is given up; each draws everything anew."""


@dataclass(frozen=True, slots=True)
class Light:
    """A rectangle that gives light, in the world frame. A lamp is a small one without a direction."""

    center: np.ndarray
    u: np.ndarray
    """(3,) half of one edge."""
    v: np.ndarray
    normal: np.ndarray | None
    """(3,) the side that shines; None shines to all sides."""
    power: Colour
    """Intensity along the normal: illuminance at distance d is power * cosines / d**2."""


@dataclass(slots=True)
class Room:
    """Everything about one room that pictures, masks, boxes and questions are computed from."""

    plan: RoomPlan
    size: tuple[float, float, float]
    """Width, depth, height in metres, in the room's own frame."""
    to_world: np.ndarray
    """4x4 room frame -> world frame: a turn about z and a shift along x and y."""
    triangles: Triangles
    """In the world frame."""
    face_instance: np.ndarray
    """(F,) int32 instance id of each triangle (value in the masks), 0 for wall, floor and ceiling."""
    face_label: np.ndarray
    """(F,) int32 label id of each triangle."""
    materials: list[Material]
    atlas: Atlas
    lights: list[Light]
    placed: list[Placed]
    """In the room frame; ``placed[i]`` is instance i + 1."""
    instances: tuple[Instance, ...] = field(default_factory=tuple)
    """With boxes in the world frame: yaw only, width along the first axis, depth, height."""

    @property
    def axis_alignment(self) -> np.ndarray:
        """4x4 world -> room frame: walls along x and y, a corner of the floor at the origin."""
        turn, shift = self.to_world[:3, :3], self.to_world[:3, 3]
        inverse = np.eye(4)
        inverse[:3, :3], inverse[:3, 3] = turn.T, -turn.T @ shift
        return inverse


def build_room(config: RoomsConfig, index: int) -> Room:
    """Makes room ``index`` of ``config.seed``: deterministic, and independent of any file but the textures.

    Raises:
        DataError: no layout was found in which all that the type needs has its place.
    """
    plan = plan_room(config.seed, index)
    misses: list[str] = []
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([GENERATOR_VERSION, config.seed, index, attempt])
        furnished = _furnish(plan, rng, Atlas(config.textures))
        if not furnished.missing:
            return _assemble(plan, furnished)
        misses += furnished.missing
    raise DataError(
        f"{plan.id} ({plan.type}): none of {ATTEMPTS} layouts had room for {', '.join(sorted(set(misses)))}; "
        "choose another data.rooms.seed"
    )


def _furnish(plan: RoomPlan, rng: np.random.Generator, atlas: Atlas) -> Furnishing:
    from services.data.rooms.paths import walkable

    (w0, w1), (d0, d1) = EXTENTS[plan.type]
    width, depth, height = float(rng.uniform(w0, w1)), float(rng.uniform(d0, d1)), float(rng.uniform(2.4, 2.8))
    room = Furnishing(Layout(rng, width, depth, height), Workshop(rng, atlas), plan.type)
    openings(room)
    if not room.missing:
        PROGRAMMES[plan.type](room)
    if not room.missing:
        finish(room)
    if not room.missing and walkable(room.layout.placed, (width, depth)) is None:
        room.missing.append("a person to walk")
    return room


def _surfaces(room: Furnishing) -> tuple[Material, Material, list[Material], Material]:
    """Materials of floor, ceiling, the four walls and the skirting."""
    shop, rng = room.shop, room.rng
    wet = room.type in ("bathroom", "kitchen")
    roll = rng.uniform()
    if roll < (0.75 if wet else 0.12):
        tone = colour(float(rng.uniform(0.03, 0.12)), float(rng.uniform(0, 0.3)), float(rng.uniform(0.45, 0.85)))
        name = str(rng.choice(["tiles", "tiles", "checker", "terrazzo", "marble"]))
        dark = (tone[0] * 0.45, tone[1] * 0.45, tone[2] * 0.45)
        floor = shop.material(name, dark, tone, tile=float(rng.uniform(1.0, 1.6)), gloss=0.25)
    elif roll < 0.85:
        dark, light = shop.woods[0 if rng.uniform() < 0.4 else 1]
        name = str(rng.choice(["planks", "planks", "parquet"]))
        floor = shop.material(name, dark, light, tile=float(rng.uniform(1.2, 1.8)), gloss=0.2)
    else:
        tone = shop.vivid(float(rng.uniform(0.4, 0.7)))
        floor = shop.material("carpet", (tone[0] * 0.6, tone[1] * 0.6, tone[2] * 0.6), tone, tile=0.7)
    ceiling = shop.flat((0.84, 0.84, 0.83))
    tone = colour(float(rng.uniform()), float(rng.uniform(0.0, 0.3)), float(rng.uniform(0.72, 0.97)))
    dark = (tone[0] * 0.88, tone[1] * 0.88, tone[2] * 0.88)
    paint = shop.material(str(rng.choice(["plain", "plaster"])), dark, tone, tile=1.7)
    if (room.type == "bathroom" and rng.uniform() < 0.75) or (room.type == "kitchen" and rng.uniform() < 0.25):
        name = str(rng.choice(["bricks", "tiles"]))
        paint = shop.material(
            name, (tone[0] * 0.7, tone[1] * 0.7, tone[2] * 0.7), (0.82, 0.82, 0.8), tile=1.1, gloss=0.3
        )
    walls = [paint] * 4
    accent = rng.uniform()
    if accent < 0.45 and not wet:
        strong = shop.vivid(float(rng.uniform(0.45, 0.8)))
        name = str(rng.choice(["plaster", "damask", "stripes", "bricks", "plain"]))
        special = shop.material(name, (strong[0] * 0.75, strong[1] * 0.75, strong[2] * 0.75), strong, tile=1.3)
        walls[int(rng.integers(4))] = special
    skirting = shop.flat((0.8, 0.8, 0.78)) if rng.uniform() < 0.6 else shop.wood()
    return floor, ceiling, walls, skirting


def _shell(room: Furnishing) -> list[tuple[str, Triangles]]:
    """Floor, ceiling, walls with skirting boards: (label, triangles) in the room frame."""
    layout = room.layout
    w, d, h = layout.width, layout.depth, layout.height
    floor, ceiling, walls, skirting = _surfaces(room)
    ground, above = room.shop.shape(), room.shop.shape()
    ground.quad(np.array([[0, 0, 0], [w, 0, 0], [w, d, 0], [0, d, 0]]), floor, (w, d))
    above.quad(np.array([[0, 0, h], [0, d, h], [w, d, h], [w, 0, h]]), ceiling, (d, w))
    pieces = [("floor", ground.triangles()), ("ceiling", above.triangles())]
    for k in range(4):
        shape, length = room.shop.shape(), layout.wall_length(k)
        ends = [layout.wall_point(k, s * length / 2, 0.0) for s in (1, -1)]
        corners = [[*ends[0], 0.0], [*ends[1], 0.0], [*ends[1], h], [*ends[0], h]]
        shape.quad(np.array(corners), walls[k], (length, h))
        middle = layout.wall_point(k, 0.0, 0.006)
        shape.box((*middle, 0.04), (length, 0.012, 0.08), skirting, rotation_z(k * np.pi / 2))
        pieces.append(("wall", shape.triangles()))
    return pieces


def _lights(room: Furnishing, to_world: np.ndarray) -> list[Light]:
    """Daylight through the windows, the ceiling lamp, and one more lamp."""
    rng, turn = room.rng, to_world[:3, :3]
    day = float(rng.uniform(0.5, 1.6))
    sky, warm = colour(0.58, float(rng.uniform(0.02, 0.16)), 1.0), colour(0.09, float(rng.uniform(0.08, 0.3)), 1.0)
    lights: list[Light] = []
    for placed in room.layout.placed:
        kind = placed.piece.kind
        frame = turn @ rotation_z(placed.yaw)
        if kind == "window":
            low, high = placed.piece.low, placed.piece.high
            half = (high - low) / 2
            point = placed.point((0.0, 0.1, float(half[2])))
            power = 2.2 * day * 4 * float(half[0] * half[2])
            lights.append(
                Light(
                    turn @ point + to_world[:3, 3],
                    frame @ [half[0] * 0.9, 0.0, 0.0],
                    frame @ [0.0, 0.0, half[2] * 0.85],
                    frame @ [0.0, 1.0, 0.0],
                    (sky[0] * power, sky[1] * power, sky[2] * power),
                )
            )
        for glow in placed.piece.glow:
            power = float(rng.uniform(1.2, 2.2)) if kind == "ceiling_lamp" else 0.4
            radius = 0.14 if kind == "ceiling_lamp" else 0.06
            center = turn @ placed.point(glow) + to_world[:3, 3]
            tint = (warm[0] * power, warm[1] * power, warm[2] * power)
            lights.append(Light(center, turn @ [radius, 0, 0], turn @ [0, radius, 0], None, tint))
    # The strongest ones cast shadows; further lamps only glow, which nobody misses and which saves rays.
    lights.sort(key=lambda light: -sum(light.power))
    return lights[:3]


def _assemble(plan: RoomPlan, room: Furnishing) -> Room:
    """Moves everything into the world frame and numbers it."""
    rng = room.rng
    to_world = np.eye(4)
    to_world[:3, :3] = rotation_z(float(rng.uniform(0, 2 * np.pi)))
    to_world[:2, 3] = rng.uniform(-3.0, 3.0, 2)
    pieces: list[Triangles] = []
    instance_of, label_of = [], []
    for label, triangles in _shell(room):
        pieces.append(triangles)
        instance_of.append(np.zeros(len(triangles.material), np.int32))
        label_of.append(np.full(len(triangles.material), IDS[label], np.int32))
    instances = []
    for number, placed in enumerate(room.layout.placed, start=1):
        piece = placed.piece
        count = len(piece.triangles.material)
        pieces.append(piece.triangles.moved(rotation_z(placed.yaw), placed.position))
        instance_of.append(np.full(count, number, np.int32))
        label_of.append(np.full(count, IDS[piece.label], np.int32))
        instances.append(Instance(id=number, label=piece.label, class_id=IDS[piece.label], box=_box(placed, to_world)))
    layout = room.layout
    return Room(
        plan=plan,
        size=(layout.width, layout.depth, layout.height),
        to_world=to_world,
        triangles=merge(pieces).moved(to_world[:3, :3], to_world[:3, 3]),
        face_instance=np.concatenate(instance_of),
        face_label=np.concatenate(label_of),
        materials=room.shop.materials,
        atlas=room.shop.atlas,
        lights=_lights(room, to_world),
        placed=layout.placed,
        instances=tuple(instances),
    )


def _box(placed: Placed, to_world: np.ndarray) -> Box3D:
    """The tight box of a piece in the world frame."""
    center = to_world[:3, :3] @ placed.point((placed.piece.low + placed.piece.high) / 2) + to_world[:3, 3]
    axes = to_world[:3, :3] @ rotation_z(placed.yaw)
    return Box3D(
        center=(float(center[0]), float(center[1]), float(center[2])),
        size=(float(placed.piece.size[0]), float(placed.piece.size[1]), float(placed.piece.size[2])),
        axes=tuple(tuple(float(x) for x in row) for row in axes),
    )
