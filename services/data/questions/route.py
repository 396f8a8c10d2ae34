"""Route plans: fill in the turns on a walk from object to object."""

from __future__ import annotations

from itertools import permutations, product

from services.data.questions.boxes import bearing, walkable
from services.data.questions.choice import apart
from services.data.questions.draft import Draft, generator, sample
from services.data.questions.facts import Facts, Thing, box_of

TURNS = ("turn left", "turn right", "turn back")
BLANK = "[fill in]"
LARGEST_DEVIATION = 35.0
"""Degrees by which a turn may differ from 90 (left, right) or 180 (back): half-way between them, less a margin."""
MOST_ALIKE = 2
"""Questions of one scene with the same turns."""
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
    """Start at A facing B, walk to C and on to D: which turns are needed at A and at C.

    Both legs must be walkable in a straight line past all other objects. The wrong options are drawn evenly from
    the eight other pairs of turns.
    """
    rng = generator(seed, facts.id, "route_planning")
    drafts: list[Draft] = []
    for indices in sample(list(permutations(range(len(facts.unique)), 4)), 60 * limit, rng):
        a, b, c, d = (facts.unique[i] for i in indices)
        if not apart(box_of(a), box_of(b)) or not apart(box_of(a), box_of(c), box_of(d)):
            continue
        turns = [
            turn(bearing(box_of(a).center, box_of(b).center, box_of(c).center)),
            # At C one faces away from A: straight on is the point as far behind C as A is before it.
            turn(bearing(box_of(c).center, 2 * box_of(c).center - box_of(a).center, box_of(d).center)),
        ]
        if None in turns or not _clear(facts, a, c) or not _clear(facts, c, d):
            continue
        answer = ", ".join(str(t) for t in turns)
        if sum(draft.answer == answer for draft in drafts) == MOST_ALIKE:
            continue
        others = [", ".join(pair) for pair in product(TURNS, TURNS) if ", ".join(pair) != answer]
        wrong = tuple(others[i] for i in rng.permutation(len(others))[:3])
        drafts.append(
            Draft(
                scene=facts.id,
                split=facts.split,
                type="route_planning",
                text=_text(a, b, c, d),
                answer=answer,
                wrong=wrong,
                views=facts.views,
            )
        )
        if len(drafts) == limit:
            break
    return drafts


def _clear(facts: Facts, start: Thing, end: Thing) -> bool:
    obstacles = [t.box for t in facts.things if t.box is not None and t.id not in (start.id, end.id)]
    return walkable(box_of(start), box_of(end), obstacles, floor=facts.floor, body=BODY)


def _text(a: Thing, b: Thing, c: Thing, d: Thing) -> str:
    return (
        f"A robot stands at the {a.label}, faces the {b.label} and is to go to the {d.label}. Its plan has gaps; each "
        f"{BLANK} is one of: {', '.join(TURNS)}. 1. {BLANK} 2. Go straight on to the {c.label}. 3. {BLANK} "
        f"4. Go straight on to the {d.label}, the goal. Which turns belong into the gaps, in order?"
    )
