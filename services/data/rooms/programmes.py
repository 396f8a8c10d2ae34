"""What each type of room is furnished with. Types share chairs, lamps, plants, rugs, tables and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from services.data.rooms.furniture import decor, fixtures, seating, tables
from services.data.rooms.furniture.workshop import Piece, Workshop
from services.data.rooms.layout import GAP, Layout, Reserved, Zone, front_of
from services.data.rooms.shapes import Material

#: Smallest and largest width and depth of a room of each type, metres.
EXTENTS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "bedroom": ((3.4, 4.6), (3.3, 4.4)),
    "living room": ((4.2, 5.8), (3.8, 5.0)),
    "kitchen": ((3.2, 4.4), (3.0, 4.0)),
    "bathroom": ((2.5, 3.4), (2.4, 3.1)),
    "office": ((3.2, 4.6), (3.0, 4.2)),
    "dining room": ((3.8, 5.0), (3.5, 4.5)),
}


@dataclass(slots=True)
class Furnishing:
    """A room in the making: where things stand, what makes them, and what was needed but did not fit."""

    layout: Layout
    shop: Workshop
    type: str
    door_wall: int = 0
    window_walls: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def rng(self) -> np.random.Generator:
        """The generator that all of this room's choices are drawn from."""
        return self.shop.rng

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return bool(self.rng.uniform() < probability)

    def need(self, number: int | None, what: str) -> int | None:
        """Notes what the room cannot do without."""
        if number is None:
            self.missing.append(what)
        return number


def openings(room: Furnishing) -> None:
    """A door, one or two windows on other walls, curtains beside some windows."""
    layout, rng = room.layout, room.rng
    width, height = float(rng.uniform(0.8, 0.92)), float(rng.uniform(2.0, 2.1))
    leaf = decor.door(room.shop, width, height)
    room.door_wall = int(rng.integers(4))
    # Doors sit near a corner more often than in the middle of a wall.
    where = "corner" if room.chance(0.6) else "any"
    number = layout.against_wall(leaf, walls=(room.door_wall,), gap=0.0, where=where)
    if room.need(number, "door") is not None:
        layout.reserved.append(Reserved(front_of(layout.placed[-1], 0.95)))
    others = [k for k in range(4) if k != room.door_wall]
    count = 1 if room.type == "bathroom" else int(rng.choice([1, 1, 2]))
    cloth = room.shop.cloth(patterned=0.4)
    draped = room.type in ("bedroom", "living room", "dining room", "office") and room.chance(0.7)
    for wall in rng.permutation(others)[:count]:
        _window(room, int(wall), cloth if draped else None)


def _window(room: Furnishing, wall: int, cloth: Material | None) -> None:
    layout, rng = room.layout, room.rng
    widest = layout.wall_length(wall) - 1.3
    small = room.type == "bathroom"
    width = float(np.clip(rng.uniform(0.6, 0.9) if small else rng.uniform(1.0, 1.9), 0.5, widest))
    low = float(rng.uniform(1.2, 1.35) if small else rng.uniform(0.82, 0.98))
    glass = decor.window(room.shop, width, float(rng.uniform(0.7, 0.9) if small else rng.uniform(1.05, 1.3)))
    number = layout.against_wall(glass, walls=(wall,), gap=0.0, where="middle", z=low)
    if number is None:
        return
    room.window_walls.append(wall)
    base = layout.placed[number]
    point = base.point((0.0, 0.3, 0.0))
    layout.reserved.append(
        Reserved(Zone((float(point[0]), float(point[1])), (width / 2, 0.3), base.yaw, low, base.zone.high))
    )
    if cloth is None:
        return
    bottom = 0.04 if room.chance(0.5) else low - 0.15
    each = float(rng.uniform(0.26, 0.42))
    for side in (-1, 1):
        panel = decor.curtain(room.shop, each, base.zone.high + 0.12 - bottom, cloth)
        x = side * (width / 2 + 0.06 + float(panel.size[0]) / 2)
        layout.try_place(panel, base.point((x, 0.0, 0.0))[:2], base.yaw, z=bottom)


def chairs_around(room: Furnishing, table: int, make: Callable[[Workshop], Piece], most: int) -> int:
    """Chairs of one model along a table's sides, drawn out a little, and gives how many found a place."""
    layout, rng = room.layout, room.rng
    base = layout.placed[table]
    w, d = base.piece.size[:2]
    along = 2 if w > 1.15 else 1
    seats = [
        (x, side * d / 2, np.pi if side > 0 else 0.0) for side in (1, -1) for x in np.linspace(-0.25, 0.25, along) * w
    ]
    if along == 1:
        seats = [(0.0, d / 2, np.pi), (0.0, -d / 2, 0.0)]
    seats += [(side * w / 2, 0.0, side * np.pi / 2) for side in (-1, 1)]
    # One model for the whole table: every chair starts from the same state of the generator.
    state = rng.bit_generator.state
    pieces = []
    for _ in range(most):
        rng.bit_generator.state = state
        pieces.append(make(room.shop))
    count = 0
    for x, y, turn in seats:
        if count == most:
            break
        chair = pieces[count]
        yaw = turn + float(rng.normal(0, 0.08))
        away = np.array([-np.sin(turn), np.cos(turn)])  # the way the chair looks, towards the table
        local = np.array([x, y]) - away * (float(chair.high[1]) + 0.03 + float(rng.uniform(0, 0.08)))
        point = base.point((local[0], local[1], 0.0))
        if layout.try_place(chair, point[:2], base.yaw + yaw, near=(table,)) is not None:
            count += 1
    return count


def bedroom(room: Furnishing) -> None:
    """Bed between night stands, wardrobe, dresser; sometimes a desk, a chair, a television."""
    layout, shop = room.layout, room.shop
    free = [k for k in range(4) if k != room.door_wall]
    bed = layout.against_wall(seating.bed(shop), walls=free, where="middle", clear=0.45, tries=60)
    if room.need(bed, "bed") is None or bed is None:
        return
    made = tables.nightstand(shop)
    for side in (-1, 1):
        stand = layout.beside(made, bed, side)
        if stand is not None and room.chance(0.75):
            layout.on_top(decor.table_lamp(shop) if room.chance(0.8) else decor.pot_plant(shop), stand)
    layout.against_wall(tables.wardrobe(shop), clear=0.6, where="corner", tries=40)
    if room.chance(0.6):
        chest = layout.against_wall(tables.dresser(shop), clear=0.5)
        _adorn(room, chest, (decor.television, decor.pot_plant, decor.table_lamp))
    if room.chance(0.3):
        _work_place(room)
    if room.chance(0.45):
        layout.against_wall(seating.armchair(shop) if room.chance(0.5) else seating.dining_chair(shop), clear=0.3)
    if room.chance(0.3):
        layout.against_wall(tables.bookshelf(shop), clear=0.5)
    if room.chance(0.65):
        _rug_at(room, bed, float(room.rng.uniform(0.4, 1.0)))


def living_room(room: Furnishing) -> None:
    """Sofa and coffee table opposite a television; armchairs, shelves."""
    layout, shop, rng = room.layout, room.shop, room.rng
    free = [k for k in range(4) if k != room.door_wall]
    couch = layout.against_wall(seating.sofa(shop), walls=free, where="middle", clear=1.1, tries=60)
    if room.need(couch, "sofa") is None or couch is None:
        return
    low = layout.before(tables.coffee_table(shop), couch, float(rng.uniform(0.32, 0.42)), facing=True)
    if low is not None and room.chance(0.6):
        layout.on_top(decor.pot_plant(shop), low)
    opposite = (round(layout.placed[couch].yaw / (np.pi / 2)) + 2) % 4
    stand = layout.against_wall(tables.sideboard(shop), walls=(opposite,), where="middle", clear=0.5, tries=40)
    if stand is None:
        stand = layout.against_wall(tables.sideboard(shop), clear=0.4, tries=40)
    if stand is not None:
        layout.on_top(decor.television(shop), stand, back=False, turn=0.02)
        if room.chance(0.3):
            layout.on_top(decor.pot_plant(shop), stand)
    for _ in range(int(rng.integers(0, 3))):
        layout.against_wall(seating.armchair(shop), clear=0.4)
    for _ in range(int(rng.integers(0, 3))):
        layout.against_wall(tables.bookshelf(shop), clear=0.35, tries=40)
    if room.chance(0.35):
        chest = layout.against_wall(tables.dresser(shop), clear=0.4)
        _adorn(room, chest, (decor.pot_plant, decor.table_lamp))
    if room.chance(0.4):
        side = layout.beside(tables.side_table(shop), couch, int(rng.choice([-1, 1])))
        _adorn(room, side, (decor.table_lamp, decor.pot_plant))
    if room.chance(0.8):
        _rug_at(room, couch, float(rng.uniform(0.5, 0.8)))


def kitchen(room: Furnishing) -> None:
    """A line of units with sink and stove, refrigerator, wall cabinets; sometimes a table with chairs."""
    layout, shop, rng = room.layout, room.shop, room.rng
    walls = [k for k in range(4) if k != room.door_wall]
    walls.sort(key=lambda k: (k in room.window_walls, -layout.wall_length(k)))
    for wall in walls:
        if _kitchen_line(room, wall):
            break
    else:
        room.missing.append("kitchen line")
        return
    table = None
    if room.chance(0.75):
        table = layout.in_open(tables.kitchen_table(shop), margin=0.25)
    if table is not None:
        chairs_around(room, table, seating.dining_chair if room.chance(0.7) else seating.stool, int(rng.integers(2, 4)))
        if room.chance(0.6):
            layout.on_top(decor.pot_plant(shop), table)
    if room.chance(0.3):
        shelf = layout.against_wall(tables.sideboard(shop), clear=0.5)
        _adorn(room, shelf, (decor.pot_plant, decor.pot_plant))


def _kitchen_line(room: Furnishing, wall: int) -> bool:
    """Sets refrigerator, counters and stove side by side along one wall; False when they do not fit."""
    layout, shop, rng = room.layout, room.shop, room.rng
    body = shop.body()
    plate = (
        shop.wood(other=True)
        if room.chance(0.4)
        else shop.material(
            str(rng.choice(["marble", "terrazzo"])), (0.15, 0.15, 0.16), (0.6, 0.59, 0.57), tile=0.6, gloss=0.4
        )
    )
    cold, cooker = fixtures.refrigerator(shop), fixtures.stove(shop)
    length = layout.wall_length(wall)
    spare = length - float(cold.size[0] + cooker.size[0]) - 0.1
    first = float(np.clip(rng.uniform(0.8, 1.2), 0.7, spare - 0.5))
    second = float(min(spare - first, rng.uniform(0.5, 1.2)))
    if first < 0.69 or second < 0.4:
        return False
    line = [cold, fixtures.counter(shop, first, body, plate, doors=True), cooker]
    line.append(fixtures.counter(shop, second, body, plate, doors=room.chance(0.5)))
    if room.chance(0.5):
        line.reverse()
    total = sum(float(p.size[0]) for p in line) + 0.012 * (len(line) - 1)
    start = (-1 if room.chance(0.5) else 1) * (length / 2 - GAP - total / 2) - total / 2
    kept, reserved = len(layout.placed), len(layout.reserved)
    numbers, x = [], start
    for piece in line:
        xy = layout.wall_point(wall, x - float(piece.low[0]), GAP - float(piece.low[1]))
        number = layout.try_place(piece, xy, wall * np.pi / 2, clear=0.8, margin=0.005)
        if number is None:
            del layout.placed[kept:], layout.reserved[reserved:]
            return False
        numbers.append(number)
        x += float(piece.size[0]) + 0.012
    counters = [n for n in numbers if layout.placed[n].piece.kind == "counter"]
    widest = max(counters, key=lambda n: float(layout.placed[n].piece.size[0]))
    room.need(layout.on_top(fixtures.kitchen_sink(shop), widest, turn=0.0, tries=30), "sink")
    for number in counters:
        base = layout.placed[number]
        if room.chance(0.85):
            hung = fixtures.wall_cabinet(shop, float(base.piece.size[0]), body)
            y = float(base.piece.low[1] - hung.low[1])
            layout.try_place(hung, base.point((0.0, y, 0.0))[:2], base.yaw, z=1.42, parent=number, margin=0.004)
        if room.chance(0.4):
            layout.on_top(decor.pot_plant(shop), number)
    return True


def bathroom(room: Furnishing) -> None:
    """Bathtub, toilet, and a basin below a mirror."""
    layout, shop, rng = room.layout, room.shop, room.rng
    tub = layout.against_wall(fixtures.bathtub(shop), where="corner", clear=0.45, tries=60)
    if tub is None and room.chance(0.7):
        room.missing.append("bathtub")
    room.need(layout.against_wall(fixtures.toilet(shop), clear=0.45, tries=60), "toilet")
    if room.chance(0.65):
        base = layout.against_wall(fixtures.vanity(shop), clear=0.55, tries=60)
        sink = None if base is None else layout.on_top(fixtures.vessel_sink(shop), base, turn=0.0, tries=20)
    else:
        base = sink = layout.against_wall(fixtures.pedestal_sink(shop), clear=0.55, tries=60)
    room.need(sink, "sink")
    if sink is not None:
        at = layout.placed[sink]
        wall = round(at.yaw / (np.pi / 2)) % 4
        tangent = np.array([np.cos(at.yaw), np.sin(at.yaw)])
        along = float((np.array(at.zone.center) - layout.wall_point(wall, 0.0, 0.0)) @ tangent)
        xy = layout.wall_point(wall, along, 0.004)
        layout.try_place(decor.mirror(shop), xy, wall * np.pi / 2, z=float(rng.uniform(1.25, 1.4)))
    if room.chance(0.3):
        layout.against_wall(tables.bookshelf(shop) if room.chance(0.3) else tables.side_table(shop), clear=0.3)
    if room.chance(0.25):
        layout.against_wall(seating.stool(shop))
    if room.chance(0.75) and tub is not None:
        _rug_at(room, tub, 0.08, size=(float(rng.uniform(0.7, 1.0)), float(rng.uniform(0.5, 0.6))))


def office(room: Furnishing) -> None:
    """One or two desks with screens and swivel chairs, shelves, cupboards."""
    layout, shop, rng = room.layout, room.shop, room.rng
    room.need(_work_place(room), "desk")
    if room.chance(0.5):
        _work_place(room)
    for _ in range(int(rng.integers(1, 4))):
        layout.against_wall(tables.bookshelf(shop), clear=0.45, tries=40)
    if room.chance(0.5):
        chest = layout.against_wall(tables.dresser(shop) if room.chance(0.5) else tables.sideboard(shop), clear=0.45)
        _adorn(room, chest, (decor.pot_plant, decor.table_lamp))
    if room.chance(0.3):
        layout.against_wall(seating.armchair(shop), clear=0.4)
    elif room.chance(0.3):
        layout.against_wall(seating.dining_chair(shop))
    if room.chance(0.35):
        _rug_open(room)


def _work_place(room: Furnishing) -> int | None:
    """A desk at a wall with its chair, screen and lamp; the number of the desk."""
    layout, shop = room.layout, room.shop
    number = layout.against_wall(tables.desk(shop), clear=0.8, tries=50)
    if number is None:
        return None
    chair = seating.office_chair(shop) if room.chance(0.85) else seating.dining_chair(shop)
    turned = layout.before(chair, number, float(room.rng.uniform(0.02, 0.12)), facing=True)
    if turned is None:
        room.missing.append("desk chair")
    layout.on_top(decor.monitor(shop), number, turn=0.1, tries=20)
    if room.chance(0.6):
        layout.on_top(decor.table_lamp(shop), number)
    return number


def dining_room(room: Furnishing) -> None:
    """A large table with its chairs, a sideboard, sometimes shelves."""
    layout, shop = room.layout, room.shop
    table = layout.in_open(tables.dining_table(shop), margin=0.85, tries=60)
    if room.need(table, "dining table") is None or table is None:
        return
    most = int(room.rng.choice([4, 4, 6]))
    if chairs_around(room, table, seating.dining_chair, most) < 3:
        room.missing.append("dining chairs")
    if room.chance(0.6):
        layout.on_top(decor.pot_plant(shop), table)
    board = layout.against_wall(tables.sideboard(shop) if room.chance(0.6) else tables.dresser(shop), clear=0.4)
    _adorn(room, board, (decor.pot_plant, decor.table_lamp))
    if room.chance(0.4):
        layout.against_wall(tables.bookshelf(shop), clear=0.4)
    if room.chance(0.25):
        layout.against_wall(seating.armchair(shop), clear=0.3)
    if room.chance(0.3):
        layout.against_wall(seating.bench(shop), clear=0.3)
    if room.chance(0.5):
        base = layout.placed[table]
        size = base.piece.size[:2] + room.rng.uniform(0.8, 1.2)
        layout.try_place(decor.rug(shop, float(size[0]), float(size[1])), base.zone.center, base.yaw)


def _adorn(room: Furnishing, on: int | None, makers: tuple[Callable[[Workshop], Piece], ...]) -> None:
    """Stands one or two small things on a piece of furniture, when it was placed."""
    if on is None:
        return
    for make in makers:
        if room.chance(0.5):
            room.layout.on_top(make(room.shop), on)


def _rug_at(room: Furnishing, of: int, distance: float, size: tuple[float, float] | None = None) -> None:
    """A rug before a piece, partly under what stands there."""
    rng = room.rng
    width, depth = size or (float(rng.uniform(1.5, 2.4)), float(rng.uniform(1.1, 1.7)))
    base = room.layout.placed[of]
    made = decor.rug(room.shop, width, depth)
    centre = base.point((float(rng.normal(0, 0.1)), float(base.piece.high[1]) + distance, 0.0))
    if size is not None:
        centre = base.point((0.0, float(base.piece.high[1]) + distance + depth / 2, 0.0))
    room.layout.try_place(made, centre[:2], base.yaw)


def _rug_open(room: Furnishing) -> None:
    rng = room.rng
    made = decor.rug(room.shop, float(rng.uniform(1.4, 2.2)), float(rng.uniform(1.0, 1.5)))
    room.layout.in_open(made, margin=0.0)


def finish(room: Furnishing) -> None:
    """What any room may have: a ceiling lamp, pictures, a floor lamp, plants."""
    layout, shop, rng = room.layout, room.shop, room.rng
    drop = (
        float(rng.uniform(0.35, 0.6)) if room.type in ("dining room", "living room") and layout.height > 2.5 else 0.09
    )
    lamp = decor.ceiling_lamp(shop, drop)
    tables_ = layout.of_kind("dining_table")
    middle = layout.placed[tables_[0]].zone.center if tables_ else (layout.width / 2, layout.depth / 2)
    room.need(layout.try_place(lamp, middle, 0.0, z=layout.height - float(lamp.high[2])), "ceiling lamp")
    dry = room.type != "bathroom"
    if dry and room.chance(0.45):
        layout.against_wall(decor.floor_lamp(shop), where="corner", tries=40)
    for _ in range(int(rng.choice([0, 1, 1, 2, 2])) if dry else int(room.chance(0.3))):
        layout.against_wall(decor.floor_plant(shop), where="corner" if room.chance(0.6) else "any")
    for _ in range(int(rng.integers(2, 6)) if dry else int(room.chance(0.4))):
        layout.against_wall(decor.picture(shop), gap=0.004, z=float(rng.uniform(1.3, 1.6)), tries=24, margin=0.1)


PROGRAMMES: dict[str, Callable[[Furnishing], None]] = {
    "bedroom": bedroom,
    "living room": living_room,
    "kitchen": kitchen,
    "bathroom": bathroom,
    "office": office,
    "dining room": dining_room,
}
