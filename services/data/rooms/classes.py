"""The semantic classes of the procedural rooms: stable label ids, named as NYU40 and ScanNet name them.

An id below 41 is the class's NYU40 id. What NYU40 has no name for gets an id above 40 and counts as NYU40's
"otherfurniture" (39) or "otherprop" (40). Wall, floor and ceiling are labelled but are not instances: nobody
counts them, and their boxes would contain the whole room.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoomClass:
    """One class: ``raw`` is the name that objects carry, ``category`` the NYU40 name it maps to."""

    id: int
    raw: str
    category: str
    nyu40: int


CLASSES: tuple[RoomClass, ...] = (
    RoomClass(1, "wall", "wall", 1),
    RoomClass(2, "floor", "floor", 2),
    RoomClass(3, "cabinet", "cabinet", 3),
    RoomClass(4, "bed", "bed", 4),
    RoomClass(5, "chair", "chair", 5),
    RoomClass(6, "sofa", "sofa", 6),
    RoomClass(7, "table", "table", 7),
    RoomClass(8, "door", "door", 8),
    RoomClass(9, "window", "window", 9),
    RoomClass(10, "bookshelf", "bookshelf", 10),
    RoomClass(11, "picture", "picture", 11),
    RoomClass(12, "counter", "counter", 12),
    RoomClass(14, "desk", "desk", 14),
    RoomClass(16, "curtain", "curtain", 16),
    RoomClass(19, "mirror", "mirror", 19),
    RoomClass(20, "rug", "floor mat", 20),
    RoomClass(22, "ceiling", "ceiling", 22),
    RoomClass(24, "refrigerator", "refridgerator", 24),  # NYU40 spells it so
    RoomClass(25, "television", "television", 25),
    RoomClass(32, "nightstand", "night stand", 32),
    RoomClass(33, "toilet", "toilet", 33),
    RoomClass(34, "sink", "sink", 34),
    RoomClass(35, "lamp", "lamp", 35),
    RoomClass(36, "bathtub", "bathtub", 36),
    RoomClass(41, "plant", "otherprop", 40),
    RoomClass(42, "stove", "otherfurniture", 39),
)

IDS: dict[str, int] = {c.raw: c.id for c in CLASSES}
NAMES: dict[int, str] = {c.id: c.raw for c in CLASSES}

STUFF: frozenset[str] = frozenset({"wall", "floor", "ceiling"})
"""Labelled, but no instances."""

ROOM_TYPES: tuple[str, ...] = ("bedroom", "living room", "kitchen", "bathroom", "office", "dining room")


def label_table() -> str:
    """The text of ``scannetv2-labels.combined.tsv``: one row a class, columns as in ScanNet's file."""
    rows = ["\t".join(("id", "raw_category", "category", "nyu40id", "nyu40class"))]
    rows += ["\t".join((str(c.id), c.raw, c.raw, str(c.nyu40), c.category)) for c in CLASSES]
    return "\n".join(rows) + "\n"
