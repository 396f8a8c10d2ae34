"""What can be seen in one picture, in words: a caption of each view, exact because the instance masks say it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from services.data.questions.draft import generator
from services.data.questions.facts import Facts
from services.data.questions.referring import listing

NAMED = 6
"""At most this many kinds of object are named, those that fill most of the picture."""
PROMPTS = (
    "What do you see?",
    "What is in the picture?",
    "Name what can be seen, largest first.",
    "Describe the picture in a few words.",
)


@dataclass(frozen=True, kw_only=True)
class ViewCaption:
    """Question and answer about the picture of one view of a scene."""

    view: int
    prompt: str
    text: str


def view_captions(facts: Facts, seed: int) -> tuple[ViewCaption, ...]:
    """A caption of each view in which an object can be seen well.

    Kinds of object come in the order of the share of the picture that they fill together, with their number:
    "A bed, two chairs and a lamp.".
    """
    rng = generator(seed, facts.id, "view_captions")
    made = []
    for column, view in enumerate(facts.views):
        seen = [thing for thing in facts.things if thing.share[column] >= facts.min_visible]
        if not seen:
            continue
        counts = Counter(thing.label for thing in seen)
        filled: Counter[str] = Counter()
        for thing in seen:
            filled[thing.label] += thing.share[column]
        ranked = sorted(counts, key=lambda label: (-filled[label], label))[:NAMED]
        text = listing([(label, counts[label]) for label in ranked])
        prompt = PROMPTS[int(rng.integers(len(PROMPTS)))]
        made.append(ViewCaption(view=view, prompt=prompt, text=f"{text[0].upper()}{text[1:]}."))
    return tuple(made)
