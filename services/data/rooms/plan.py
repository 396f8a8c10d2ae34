"""Which room gets which type and split: a pure function of generator version, seed and the room's number.

Rooms come in rounds of six, one of each type, so that the types are balanced over any number of rooms. A round
gives one room to val and one to test, of types that advance by one from round to round; every tenth round gives
all to train. That is 70/15/15, each type alike in every split, and a longer list of rooms begins with the
shorter one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.contracts import Split
from services.data.rooms.classes import ROOM_TYPES

GENERATOR_VERSION = 1
"""Grows with every change that alters a room, a picture or a split; part of what names a folder of rooms."""


@dataclass(frozen=True, slots=True)
class RoomPlan:
    """One room to be made."""

    index: int
    id: str
    type: str
    split: Split


def plan_room(seed: int, index: int) -> RoomPlan:
    """Type and split of room ``index`` of a seed."""
    if index < 0:
        raise ValueError(f"a room's number is 0 or more, got {index}")
    count = len(ROOM_TYPES)
    number, place = divmod(index, count)
    first = np.random.default_rng([GENERATOR_VERSION, seed])
    val0, test0 = (int(k) for k in first.permutation(count)[:2])
    holding = number - number // 10  # rounds so far that gave rooms to val and test
    val, test = (val0 + holding) % count, (test0 + holding) % count
    order = [int(k) for k in np.random.default_rng([GENERATOR_VERSION, seed, number]).permutation(count)]
    if number == 0:  # three rooms are enough to have all three splits
        order = [k for k in order if k not in (val, test)]
        order[1:1] = [val, test]
    kind = order[place]
    split = Split.TRAIN
    if number % 10 != 9:
        split = {val: Split.VAL, test: Split.TEST}.get(kind, Split.TRAIN)
    return RoomPlan(index, f"room{seed}_{index:04d}", ROOM_TYPES[kind], split)


def plan_rooms(seed: int, scenes: int) -> list[RoomPlan]:
    """The first ``scenes`` rooms of a seed."""
    return [plan_room(seed, index) for index in range(scenes)]
