"""Questions about one picture: what kind of place it shows, whether an object is in it, and how many of a kind are.

Answers are open, in a word or a number, and exact because the instance masks say them. Presence is asked as POPE does
(Li et al., EMNLP 2023): by yes or no, of objects that are in the picture and of random others, equally often for each
kind of object, so that neither the words nor the favourite answer give anything away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from services.data.questions.draft import Draft, generator, plural, with_article
from services.data.questions.facts import Facts

SCENE_TYPE, PRESENCE, COUNT = "scene_type", "object_presence", "object_count"
SINGLE_TYPES = (SCENE_TYPE, PRESENCE, COUNT)
YES, NO = "yes", "no"


def single_questions(facts: Facts, labels: Sequence[str], seed: int, limit: int) -> list[Draft]:
    """At most ``limit`` drafts of each type about single views of a scene, and more of what is not there.

    What fills less than the visibility threshold of a picture, but is not wholly absent, is not asked about.

    Args:
        facts: of the scene.
        labels: kinds of object that may be asked about where they are not: those of all scenes.
        seed: of the choice.
        limit: of each type.
    """
    rng = generator(seed, facts.id, "single_questions")
    return [
        *_scene_type(facts, rng)[:limit],
        *_presence(facts, sorted(labels), rng, limit),
        *_count(facts, rng)[:limit],
    ]


def _scene_type(facts: Facts, rng: np.random.Generator) -> list[Draft]:
    """What kind of place a view shows, where the scene says it and the view shows an object."""
    kind = (facts.scene.scene_type or "").strip().lower()
    seen = [column for column in range(len(facts.views)) if any(_seen(facts, column).values())]
    order = rng.permutation(len(seen))
    return [_draft(facts, SCENE_TYPE, "What kind of place is this?", kind, seen[i]) for i in order if kind]


def _presence(facts: Facts, labels: Sequence[str], rng: np.random.Generator, limit: int) -> list[Draft]:
    """Objects that a view shows, and others that it does not; balancing keeps as many of these as of those.

    Others are drawn from all kinds alike, so more of them are needed for the kinds that rooms are full of.
    """
    shown, hidden = [], []
    for column in range(len(facts.views)):
        seen = _seen(facts, column)
        shown += [(column, label) for label, count in sorted(seen.items()) if count]
        hidden += [(column, label) for label in labels if label not in seen]
    drafts = []
    for places, answer, most in ((shown, YES, -(-limit // 2)), (hidden, NO, 2 * limit)):
        for i in rng.permutation(len(places))[:most]:
            column, label = places[i]
            drafts.append(_draft(facts, PRESENCE, f"Is there {with_article(label)} in the picture?", answer, column))
    return drafts


def _count(facts: Facts, rng: np.random.Generator) -> list[Draft]:
    """How many objects of a kind a view shows, where all of them that it shows can be seen well."""
    drafts = []
    for column in range(len(facts.views)):
        for label, count in sorted(_seen(facts, column).items()):
            if count:
                text = f"How many {plural(label)} are in the picture?"
                drafts.append(_draft(facts, COUNT, text, str(count), column))
    return [drafts[i] for i in rng.permutation(len(drafts))]


def _seen(facts: Facts, column: int) -> dict[str, int]:
    """Kind of object -> how many of it a view shows; 0 where one of them can hardly be seen."""
    counts: Counter[str] = Counter()
    unsure = set()
    for thing in facts.things:
        share = thing.share[column]
        if share >= facts.min_visible:
            counts[thing.label] += 1
        elif share > 0:
            unsure.add(thing.label)
    return {label: 0 if label in unsure else counts[label] for label in {*counts, *unsure}}


def _draft(facts: Facts, kind: str, text: str, answer: str, column: int) -> Draft:
    return Draft(scene=facts.id, split=facts.split, type=kind, text=text, answer=answer, views=(facts.views[column],))
