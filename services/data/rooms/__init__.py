"""Procedural rooms: seeded indoor scenes with exact depth, masks, boxes and poses, in ScanNet's layout.

``make_rooms`` writes a folder of them; ``build_room`` gives one room's geometry, labels, instances and boxes
without any file, and ``Renderer`` with ``cameras`` the very views that are written.
"""

from services.data.rooms.make import make_rooms, rooms_digest
from services.data.rooms.plan import GENERATOR_VERSION, RoomPlan, plan_room, plan_rooms
from services.data.rooms.room import Room, build_room

__all__ = [
    "GENERATOR_VERSION",
    "Room",
    "RoomPlan",
    "build_room",
    "make_rooms",
    "plan_room",
    "plan_rooms",
    "rooms_digest",
]
