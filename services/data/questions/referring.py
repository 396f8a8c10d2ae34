"""Sentences that single out one object of a scene, with the character spans of all objects they name, and captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from services.contracts import ReferringExpression
from services.data.questions.boxes import Box, distance
from services.data.questions.draft import generator, plural, with_article
from services.data.questions.facts import Facts, Thing, box_of

MARGIN = 0.25
"""The object meant beats every other one of its label by this many metres (or share, for size)."""
NEAR = 0.5
"""Closest points nearer than this (metres) count as beside each other."""
TOUCH = 0.06
"""What stands on something has its bottom within this of the other's top, metres."""
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def compose(template: str, target: Thing, *anchors: Thing) -> ReferringExpression:
    """Fill ``{}`` places with the objects' labels in order and note where each label stands, target first.

    The template names the target in its first place.
    """
    things = (target, *anchors)
    pieces = template.split("{}")
    assert len(pieces) == len(things) + 1, "one place in the template for each object"
    text, spans = pieces[0], []
    for thing, piece in zip(things, pieces[1:], strict=True):
        spans.append((len(text), len(text) + len(thing.label), thing.id))
        text += thing.label + piece
    return ReferringExpression(text=text, spans=tuple(spans))


def referring_expressions(facts: Facts, seed: int, limit: int) -> list[ReferringExpression]:
    """At most ``limit`` sentences about visible objects, each true of exactly one object of the scene."""
    expressions = [
        *_by_distance(facts),
        *_between(facts),
        *_largest(facts),
        *_beside(facts),
        *_on_top(facts),
    ]
    rng = generator(seed, facts.id, "referring")
    return [expressions[i] for i in rng.permutation(len(expressions))[:limit]]


def _rivals(facts: Facts) -> dict[str, list[Thing]]:
    """All objects of each label that has several, where every one has a box (else nobody knows which is meant)."""
    groups: dict[str, list[Thing]] = {}
    for label, count in facts.counts.items():
        things = [thing for thing in facts.things if thing.label == label]
        if count >= 2 and all(thing.box is not None for thing in things):
            groups[label] = things
    return groups


def _by_distance(facts: Facts) -> list[ReferringExpression]:
    """The chair closest to, or farthest from, a unique object."""
    found = []
    for things in _rivals(facts).values():
        for anchor in facts.unique:
            gaps = np.array([distance(box_of(thing), box_of(anchor)) for thing in things])
            order = np.argsort(gaps)
            nearest, farthest = things[order[0]], things[order[-1]]
            if gaps[order[1]] - gaps[order[0]] >= MARGIN and facts.is_visible(nearest):
                found.append(compose("the {} closest to the {}", nearest, anchor))
            if gaps[order[-1]] - gaps[order[-2]] >= MARGIN and facts.is_visible(farthest):
                found.append(compose("the {} farthest from the {}", farthest, anchor))
    return found


def _between(facts: Facts) -> list[ReferringExpression]:
    """The only object of its label that stands between two unique ones."""
    found = []
    groups = _rivals(facts) | {thing.label: [thing] for thing in facts.unique}
    for a, b in combinations(facts.unique, 2):
        for things in groups.values():
            if a in things or b in things:
                continue
            inside = [thing for thing in things if stands_between(box_of(thing), box_of(a), box_of(b), width=0.4)]
            # Nobody else may stand in a wider lane either: then "between" is beyond dispute.
            near = [thing for thing in things if stands_between(box_of(thing), box_of(a), box_of(b), width=0.8)]
            if len(inside) == 1 and len(near) == 1 and facts.is_visible(inside[0]):
                found.append(compose("the {} between the {} and the {}", inside[0], a, b))
    return found


def stands_between(box: Box, a: Box, b: Box, *, width: float) -> bool:
    """Whether the centre lies in the lane from a to b, ``width`` metres to each side, in its middle half."""
    line = (b.center - a.center)[:2]
    length = float(np.linalg.norm(line))
    if length < 1.0:
        return False
    offset = (box.center - a.center)[:2]
    along = float(offset @ line) / length
    across = abs(float(offset[0] * line[1] - offset[1] * line[0])) / length
    return bool(0.25 * length <= along <= 0.75 * length and across <= width)


def _largest(facts: Facts) -> list[ReferringExpression]:
    """The largest or smallest one of a label, by volume."""
    found = []
    for things in _rivals(facts).values():
        volumes = np.array([box_of(thing).volume for thing in things])
        order = np.argsort(volumes)
        if volumes[order[-1]] >= (1 + MARGIN) * volumes[order[-2]] and facts.is_visible(things[order[-1]]):
            found.append(compose("the largest {} in the room", things[order[-1]]))
        if volumes[order[1]] >= (1 + MARGIN) * volumes[order[0]] and facts.is_visible(things[order[0]]):
            found.append(compose("the smallest {} in the room", things[order[0]]))
    return found


def _beside(facts: Facts) -> list[ReferringExpression]:
    """A unique object and the unique object that it stands beside."""
    found = []
    for a in facts.unique:
        for b in facts.unique:
            if a.id != b.id and 0 < facts.distances[a.id, b.id] <= NEAR:
                found.append(compose("the {} that is right beside the {}", a, b))
    return found


def _on_top(facts: Facts) -> list[ReferringExpression]:
    """The only object of its label that stands on a unique object."""
    found = []
    groups = _rivals(facts) | {thing.label: [thing] for thing in facts.unique}
    for anchor in facts.unique:
        for things in groups.values():
            resting = [thing for thing in things if thing is not anchor and rests_on(box_of(thing), box_of(anchor))]
            if len(resting) == 1 and facts.is_visible(resting[0]):
                found.append(compose("the {} that stands on the {}", resting[0], anchor))
    return found


def rests_on(upper: Box, lower: Box) -> bool:
    """Whether ``upper`` stands on ``lower``: its bottom at the other's top, its centre above the other's footprint."""
    foot = np.array([upper.center[0], upper.center[1], lower.center[2]])
    return abs(upper.bottom - lower.top) <= TOUCH and bool(lower.contains(foot))


def captions(facts: Facts) -> tuple[str, ...]:
    """Short captions: what stands in the room, and where the mesh tells it, how large the room is."""
    room = facts.scene.scene_type or "room"
    counts = Counter(thing.label for thing in facts.visible)
    if not counts:
        return ()
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:6]
    start = with_article(room).capitalize()
    result = [f"{start} with {listing(ranked)}."]
    if facts.area is not None:
        result.append(f"{start} of about {facts.area:.0f} square metres.")
    return tuple(result)


def listing(counted: Sequence[tuple[str, int]]) -> str:
    """(label, how many) in words: "a bed, two chairs and a lamp"."""
    named = [_some(label, count) for label, count in counted]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _some(label: str, count: int) -> str:
    if count == 1:
        return with_article(label)
    return f"{_NUMBERS[count] if count < len(_NUMBERS) else count} {plural(label)}"
