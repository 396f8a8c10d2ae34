"""Questions whose answer is a number: how many, how far, how large, how large the room.

An answer is given with the decimals of the benchmark. It is asked for only where rounding to them changes it by at
most 3 %, so that the stated answer is exact for the measure (mean relative accuracy starts at 5 %).
"""

from __future__ import annotations

from itertools import combinations

from services.data.questions.draft import Draft, generator, plural, sample
from services.data.questions.facts import Facts, box_of

MIN_DISTANCE = 0.3
"""Objects closer than this (metres) are "beside each other"; nobody measures that by eye."""
MAX_ROUNDING = 0.03
"""Largest relative error that writing the answer with its decimals may make."""


def _stated(value: float, decimals: int) -> str | None:
    """The number as the answer states it, or None where rounding would change it too much."""
    rounded = round(value, decimals)
    if value <= 0 or abs(rounded - value) > MAX_ROUNDING * value:
        return None
    return f"{rounded:.{decimals}f}"


def object_counting(facts: Facts) -> list[Draft]:
    """How many objects of a label there are: two or more, all of them visible, so that counting can succeed."""
    drafts = []
    for label, count in sorted(facts.counts.items()):
        things = [thing for thing in facts.things if thing.label == label]
        if count < 2 or not all(facts.is_visible(thing) for thing in things):
            continue
        text = f"How many {plural(label)} are there in this room?"
        drafts.append(_draft(facts, "object_counting", text, str(count)))
    return drafts


def object_abs_distance(facts: Facts, seed: int, limit: int) -> list[Draft]:
    """Distance of the closest points of two unique objects, in metres with one decimal."""
    rng = generator(seed, facts.id, "object_abs_distance")
    drafts = []
    for i, j in sample(list(combinations(range(len(facts.unique)), 2)), len(facts.unique) ** 2, rng):
        a, b = (facts.unique[k] for k in rng.permutation([i, j]))
        gap = facts.distances[a.id, b.id]
        stated = _stated(gap, 1)
        if gap < MIN_DISTANCE or stated is None:
            continue
        text = (
            f"How many metres lie between the {a.label} and the {b.label}, measured between the closest points of "
            "the two objects?"
        )
        drafts.append(_draft(facts, "object_abs_distance", text, stated))
        if len(drafts) == limit:
            break
    return drafts


def object_size_estimation(facts: Facts) -> list[Draft]:
    """Longest of length, width and height of a unique object, in whole centimetres."""
    drafts = []
    for thing in facts.unique:
        stated = _stated(100 * box_of(thing).longest, 0)
        if stated is None:
            continue
        text = f"How many centimetres does the {thing.label} measure along its longest side (length, width or height)?"
        drafts.append(_draft(facts, "object_size_estimation", text, stated))
    return drafts


def room_size_estimation(facts: Facts) -> list[Draft]:
    """Floor area of the room in square metres with one decimal, where a mesh tells it."""
    area = facts.area
    stated = None if area is None else _stated(area, 1)
    if stated is None:
        return []
    text = (
        "How many square metres of floor does this room have? Take all parts together if more than one room is shown."
    )
    return [_draft(facts, "room_size_estimation", text, stated)]


def _draft(facts: Facts, kind: str, text: str, answer: str) -> Draft:
    return Draft(scene=facts.id, split=facts.split, type=kind, text=text, answer=answer, views=facts.views)
