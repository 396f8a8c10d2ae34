"""Route plans: fill in the turns on a walk from object to object."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, permutations, product

import numpy as np

from services.data.questions.boxes import bearing, walkable
from services.data.questions.choice import apart
from services.data.questions.draft import Draft, generator, sample
from services.data.questions.facts import Facts, Thing, box_of

TURNS = ("turn left", "turn right", "turn back")
BLANK = "[fill in]"
LARGEST_DEVIATION = 35.0
"""Degrees by which a turn may differ from 90 (left, right) or 180 (back): half-way between them, less a margin."""
BODY = 0.2
"""Half the width of who walks, metres."""


def turn(angle: float) -> str | None:
    """The turn for a bearing in degrees (positive is left), or None where no turn describes it clearly."""
    if abs(angle) >= 180 - LARGEST_DEVIATION:
        return "turn back"
    if abs(abs(angle) - 90) <= LARGEST_DEVIATION:
        return "turn left" if angle > 0 else "turn right"
    return None


def route_planning(facts: Facts, seed: int, limit: int) -> list[Draft]:
    """Start at A facing B, walk to C, and in half of the questions on to D: which turns are needed at A and at C.

    Every leg must be walkable in a straight line past all other objects. The wrong options are drawn evenly from
    all other turns, or pairs of turns.
    """
    rng = generator(seed, facts.id, "route_planning")
    long = _routes(facts, 4, math.ceil(limit / 2), rng)
    return long + _routes(facts, 3, limit - len(long), rng)


def _routes(facts: Facts, length: int, limit: int, rng: np.random.Generator) -> list[Draft]:
    """Routes over ``length`` objects, the one that is faced at the start among them."""
    drafts: list[Draft] = []
    given: Counter[str] = Counter()
    plans = [", ".join(plan) for plan in product(TURNS, repeat=length - 2)]
    for indices in sample(list(permutations(range(len(facts.unique)), length)), 60 * limit, rng):
        if len(drafts) == limit:
            break
        start, faced, *stops = (facts.unique[i] for i in indices)
        answer = _plan(facts, start, faced, stops)
        if answer is None or given[answer] == math.ceil(limit / len(plans)) + 1:
            continue
        given[answer] += 1
        others = [plan for plan in plans if plan != answer]
        wrong = tuple(others[i] for i in rng.permutation(len(others))[:3])
        text = _text(start, faced, stops)
        drafts.append(
            Draft(
                scene=facts.id,
                split=facts.split,
                type="route_planning",
                text=text,
                answer=answer,
                wrong=wrong,
                views=facts.views,
            )
        )
    return drafts


def _plan(facts: Facts, start: Thing, faced: Thing, stops: Sequence[Thing]) -> str | None:
    """The turns of a route, or None where one is unclear or a leg cannot be walked."""
    route = (start, *stops)
    if not apart(box_of(start), box_of(faced)) or not apart(*(box_of(thing) for thing in route)):
        return None
    ahead = box_of(faced).center
    turns = []
    for here, there in pairwise(route):
        position, goal = box_of(here).center, box_of(there).center
        action = turn(bearing(position, ahead, goal))
        if action is None or not _clear(facts, here, there):
            return None
        turns.append(action)
        # Having arrived, one faces on: the point as far behind the goal as the start of this leg is before it.
        ahead = 2 * goal - position
    return ", ".join(turns)


def _clear(facts: Facts, start: Thing, end: Thing) -> bool:
    obstacles = [t.box for t in facts.things if t.box is not None and t.id not in (start.id, end.id)]
    return walkable(box_of(start), box_of(end), obstacles, floor=facts.floor, body=BODY)


def _text(start: Thing, faced: Thing, stops: Sequence[Thing]) -> str:
    goal = stops[-1].label
    steps = []
    for stop in stops:
        steps += [BLANK, f"Go straight on to the {stop.label}."]
    numbered = " ".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))
    return (
        f"A robot stands at the {start.label}, faces the {faced.label} and is to go to the {goal}. Its plan has gaps; "
        f"each {BLANK} is one of: {', '.join(TURNS)}. {numbered} Which turns belong into the gaps, in order?"
    )
