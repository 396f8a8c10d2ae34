"""Questions with options: what is nearest, in which direction, what appears first.

Conventions of VSI-Bench. Every question keeps a margin, so that a small error of a box or a pose cannot change the
right answer, and the wrong options are drawn such that nothing but the scene tells them from the right one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, permutations

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
"""Part of the visibility threshold from which somebody might notice an object."""
TRIALS = 400
"""Attempts to find four labels, and views, with a certain order of appearance."""
LONGEST = 8
"""Views of a question about a part of the views."""

DIRECTIONS = {
    "object_rel_direction_easy": ("left", "right"),
    "object_rel_direction_medium": ("left", "right", "back"),
    "object_rel_direction_hard": ("front-left", "front-right", "back-left", "back-right"),
}
SCARCE = frozenset({"back", "back-left", "back-right"})


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
    """Standing at A and facing B, in which direction is C: at most ``limit`` of each of the three difficulties.

    Every answer is wanted equally often within the scene already. One triple makes one question, or the three
    difficulties would tell each other's answers; it goes where its answer is scarcest (furniture stands along the
    walls, so hardly anything is behind somebody who faces into the room).
    """
    rng = generator(seed, facts.id, "object_rel_direction")
    drafts: list[Draft] = []
    given: Counter[tuple[str, str]] = Counter()
    for indices in sample(list(permutations(range(len(facts.unique)), 3)), 60 * limit, rng):
        a, b, c = (facts.unique[i] for i in indices)
        if not apart(box_of(a), box_of(b), box_of(c)):
            continue
        angle = bearing(box_of(a).center, box_of(b).center, box_of(c).center)
        wanted = [
            (given[kind, answer], answer not in SCARCE, kind, answer)
            for kind, options in DIRECTIONS.items()
            if (answer := direction(angle, kind)) is not None
            and given[kind, answer] < math.ceil(limit / len(options))
            and sum(given[kind, option] for option in options) < limit
        ]
        if not wanted:
            continue
        _, _, kind, answer = min(wanted)
        given[kind, answer] += 1
        wrong = tuple(option for option in DIRECTIONS[kind] if option != answer)
        drafts.append(_draft(facts, kind, _direction_text(a, b, c, kind), answer, wrong))
    return sorted(drafts, key=lambda draft: draft.type)


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


def appearances(facts: Facts) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Labels (L) in order of the alphabet; in which views each is clearly visible, and in which it might be noticed.

    Both (L, V) bool. A label is visible where one of its objects is.
    """
    labels = sorted(facts.counts)
    share = np.array([np.max([t.share for t in facts.things if t.label == label], axis=0) for label in labels])
    share = share.reshape(len(labels), len(facts.views))
    clear, hint = (np.asarray(share >= level * facts.min_visible) for level in (1.0, HINT_SHARE))
    return labels, clear, hint


def is_certain_order(rows: Sequence[int], clear: np.ndarray, hint: np.ndarray) -> bool:
    """Whether each row of labels is clearly visible in some view before anything of the next can be noticed."""
    if not all(clear[row].any() for row in rows):
        return False
    return all(int(clear[a].argmax()) < int(hint[b].argmax()) for a, b in pairwise(rows))


def obj_appearance_order(facts: Facts, seed: int, limit: int) -> list[Draft]:
    """In which order four labels appear for the first time; labels may have several objects, the first one counts.

    Asked about all views, and about some of them in their order: where the first view shows half of the room, fewer
    views make a question possible. The wrong orders are drawn evenly from all 23, so that the right one is not the
    one most like the others.
    """
    rng = generator(seed, facts.id, "obj_appearance_order")
    labels, clear, hint = appearances(facts)
    drafts: list[Draft] = []
    for trial in range(TRIALS if min(clear.shape) >= 4 else 0):
        found = _from_all_views(clear, hint, rng) if trial < TRIALS // 4 else _from_some_views(clear, hint, rng)
        if found is None:
            continue
        rows, columns = found
        right = tuple(labels[row] for row in rows)
        if any(set(right) == set(other.answer.split(", ")) for other in drafts):
            continue
        orders = [order for order in permutations(right) if order != right]
        wrong = tuple(", ".join(orders[i]) for i in rng.permutation(len(orders))[:3])
        names = ", ".join(right[i] for i in rng.permutation(4))
        text = f"In which order do these kinds of object appear for the first time in the pictures: {names}?"
        draft = _draft(facts, "obj_appearance_order", text, ", ".join(right), wrong)
        drafts.append(dataclasses.replace(draft, views=tuple(facts.views[column] for column in columns)))
        if len(drafts) == limit:
            break
    return drafts


_Sequence = tuple[list[int], list[int]]
"""Four rows (labels) in their order of appearance, and the columns (views) that are shown."""


def _from_all_views(clear: np.ndarray, hint: np.ndarray, rng: np.random.Generator) -> _Sequence | None:
    rows = rng.permutation(np.flatnonzero(clear.any(1)))[:4].tolist()
    rows.sort(key=lambda row: int(clear[row].argmax()))
    if len(rows) < 4 or not is_certain_order(rows, clear, hint):
        return None
    return rows, list(range(clear.shape[1]))


def _from_some_views(clear: np.ndarray, hint: np.ndarray, rng: np.random.Generator) -> _Sequence | None:
    """Go forward through the views and take in each a label that the views taken so far do not hint at.

    Then put in further views as long as the order remains certain, so that not every view brings a new label.
    """
    count = clear.shape[1]
    rows: list[int] = []
    columns: list[int] = []
    for _ in range(4):
        noticed = np.asarray(hint[:, columns].any(1))
        start = columns[-1] + 1 if columns else 0
        new = clear[:, start:] & ~noticed[:, None]
        possible = np.flatnonzero(new.any(0))
        if len(possible) == 0:
            return None
        # Early views are taken more often: they leave more for the labels to come.
        column = int(possible[int(len(possible) * rng.random() ** 2)])
        rows.append(int(rng.choice(np.flatnonzero(new[:, column]))))
        columns.append(start + column)
    for extra in rng.permutation(np.setdiff1d(np.arange(count), columns))[: LONGEST - 4].tolist():
        longer = sorted([*columns, extra])
        if is_certain_order(rows, clear[:, longer], hint[:, longer]):
            columns = longer
    return rows, columns


def _draft(facts: Facts, kind: str, text: str, answer: str, wrong: tuple[str, ...]) -> Draft:
    return Draft(scene=facts.id, split=facts.split, type=kind, text=text, answer=answer, wrong=wrong, views=facts.views)
