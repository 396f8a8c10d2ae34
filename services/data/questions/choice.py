"""Questions with options: what is nearest, in which direction, what appears first.

Conventions of VSI-Bench. Every question keeps a margin, so that a small error of a box or a pose cannot change the
right answer, and the wrong options are drawn such that nothing but the scene tells them from the right one.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import numpy as np

from services.data.questions.boxes import Box, bearing, flat_distance
from services.data.questions.draft import Draft, generator, sample
from services.data.questions.facts import Facts, Thing, box_of

NEAREST_MARGIN = 0.15
"""The nearest object is nearer than the next by this many metres, and by this share of its distance."""
STAND_OFF = 0.75
"""Least distance on the floor (metres) between where one stands and what one faces or looks for."""
ANGLE_MARGIN = 15.0
"""Degrees that a direction keeps from the border between two answers."""
HINT_SHARE = 0.25
"""Part of the visibility threshold that an object must stay below before its first view."""

DIRECTIONS = {
    "object_rel_direction_easy": ("left", "right"),
    "object_rel_direction_medium": ("left", "right", "back"),
    "object_rel_direction_hard": ("front-left", "front-right", "back-left", "back-right"),
}


def object_rel_distance(facts: Facts, seed: int, limit: int) -> list[Draft]:
    """Which of four unique objects is the nearest to a fifth one, by the closest points."""
    rng = generator(seed, facts.id, "object_rel_distance")
    things = facts.unique
    drafts: list[Draft] = []
    for _ in range(4 * limit if len(things) >= 5 else 0):
        target, *others = (things[i] for i in rng.permutation(len(things))[:5])
        ranked = sorted(others, key=lambda other: facts.distances[target.id, other.id])
        first, second = (facts.distances[target.id, other.id] for other in ranked[:2])
        if second - first < NEAREST_MARGIN * max(1.0, first):
            continue
        text = f"Measured between closest points, which of these objects is the nearest to the {target.label}?"
        draft = _draft(facts, "object_rel_distance", text, ranked[0].label, tuple(o.label for o in ranked[1:]))
        if draft not in drafts:
            drafts.append(draft)
        if len(drafts) == limit:
            break
    return drafts


def direction(angle: float, kind: str, margin: float = ANGLE_MARGIN) -> str | None:
    """Answer for a bearing in degrees (positive is left), or None within ``margin`` of a border between answers.

    easy knows left and right, and asks only for what is not behind; medium calls everything behind that one must
    turn 135 degrees or more to face; hard names the quadrant.
    """
    side, turn = ("left" if angle > 0 else "right"), abs(angle)
    if kind == "object_rel_direction_easy":
        return side if margin <= turn <= 135 - margin else None
    if kind == "object_rel_direction_medium":
        if turn >= 135 + margin:
            return "back"
        return side if margin <= turn <= 135 - margin else None
    if min(turn, abs(turn - 90), 180 - turn) < margin:
        return None
    return f"{'front' if turn < 90 else 'back'}-{side}"


def apart(*boxes: Box) -> bool:
    """Whether every two of the boxes stand far enough from each other to speak of a direction."""
    return all(flat_distance(a, b) >= STAND_OFF for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def object_rel_direction(facts: Facts, seed: int, limit: int) -> list[Draft]:
    """Standing at A and facing B, in which direction is C: at most ``limit`` of each of the three difficulties."""
    rng = generator(seed, facts.id, "object_rel_direction")
    triples = sample(list(permutations(range(len(facts.unique)), 3)), 40 * limit, rng)
    drafts: dict[str, list[Draft]] = {kind: [] for kind in DIRECTIONS}
    given: Counter[tuple[str, str]] = Counter()
    for number, indices in enumerate(triples):
        a, b, c = (facts.unique[i] for i in indices)
        if not apart(box_of(a), box_of(b), box_of(c)):
            continue
        # One triple makes one question, or the three difficulties would tell each other's answers.
        kind = list(DIRECTIONS)[number % 3]
        angle = bearing(box_of(a).center, box_of(b).center, box_of(c).center)
        answer = direction(angle, kind)
        # Every answer equally often within the scene as well: furniture along walls favours some.
        if answer is None or given[kind, answer] == math.ceil(limit / len(DIRECTIONS[kind])):
            continue
        given[kind, answer] += 1
        wrong = tuple(option for option in DIRECTIONS[kind] if option != answer)
        drafts[kind].append(_draft(facts, kind, _direction_text(a, b, c, kind), answer, wrong))
    return [draft for kind in DIRECTIONS for draft in drafts[kind]]


def _direction_text(a: Thing, b: Thing, c: Thing, kind: str) -> str:
    start = f"You stand where the {a.label} is and face the {b.label}. "
    if kind == "object_rel_direction_easy":
        return start + f"Is the {c.label} on your left or on your right?"
    if kind == "object_rel_direction_medium":
        return start + (
            f"Is the {c.label} on your left, on your right, or at your back? It is at your back if you would have to "
            "turn by 135 degrees or more to face it."
        )
    return start + (
        f"In which quadrant around you is the {c.label}: front-left, front-right, back-left or back-right? Front is "
        "the direction that you face."
    )


def first_seen(thing: Thing, threshold: float) -> int | None:
    """Column of the first view that shows the object; None if none does, or if an earlier view shows a hint of it."""
    shown = np.flatnonzero(thing.share >= threshold)
    if len(shown) == 0 or (thing.share[: shown[0]] >= HINT_SHARE * threshold).any():
        return None
    return int(shown[0])


def obj_appearance_order(facts: Facts, seed: int, limit: int) -> list[Draft]:
    """In which order four labels appear for the first time; labels may have several objects, the first one counts.

    The wrong orders are drawn evenly from all 23, so that the right one is not the one most like the others.
    """
    rng = generator(seed, facts.id, "obj_appearance_order")
    first = _first_by_label(facts)
    labels = sorted(first)
    drafts: list[Draft] = []
    for _ in range(4 * limit if len(set(first.values())) >= 4 else 0):
        chosen = [labels[i] for i in rng.permutation(len(labels))[:4]]
        if len({first[label] for label in chosen}) < 4:
            continue
        orders = list(permutations(chosen))
        right = tuple(sorted(chosen, key=lambda label: first[label]))
        wrong = [orders[i] for i in rng.permutation(len(orders)) if orders[i] != right][:3]
        names = ", ".join(chosen)
        text = f"In which order do these kinds of object appear for the first time in the pictures: {names}?"
        draft = _draft(
            facts, "obj_appearance_order", text, ", ".join(right), tuple(", ".join(order) for order in wrong)
        )
        if all(set(draft.answer.split(", ")) != set(other.answer.split(", ")) for other in drafts):
            drafts.append(draft)
        if len(drafts) == limit:
            break
    return drafts


def _first_by_label(facts: Facts) -> dict[str, int]:
    """First view of each label whose every object has a clear first view (or is never to be seen at all)."""
    first: dict[str, int] = {}
    for label in facts.counts:
        things = [t for t in facts.things if t.label == label]
        views = [first_seen(t, facts.min_visible) for t in things]
        hinted = [t for t, view in zip(things, views, strict=True) if view is None and t.share.max() > 0]
        clear = [view for view in views if view is not None]
        if clear and not hinted:
            first[label] = min(clear)
    return first


def _draft(facts: Facts, kind: str, text: str, answer: str, wrong: tuple[str, ...]) -> Draft:
    return Draft(scene=facts.id, split=facts.split, type=kind, text=text, answer=answer, wrong=wrong, views=facts.views)
