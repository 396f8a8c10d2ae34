"""A question before its letters are dealt, and the naming and rounding that all types share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.contracts import Split


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A question with its exact answer. ``wrong`` are the other options, in no order; empty for a number.

    ``subject`` is what somebody who sees no image could condition a guess on: the question without its options.
    """

    scene: str
    split: Split | None
    type: str
    text: str
    answer: str
    wrong: tuple[str, ...] = ()
    views: tuple[int, ...] = ()

    @property
    def subject(self) -> str:
        """Key of the best guess without an image."""
        return self.text


def generator(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the names alone, not on the order of scenes or on Python's hashes."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def sample(items: Sequence[tuple[int, ...]], count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """At most ``count`` of the items, without repetition, in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


_IRREGULAR = {"person": "people", "bookshelf": "bookshelves", "shelf": "shelves", "curtain rod": "curtain rods"}
_NO_PLURAL = frozenset({"clothes", "stairs", "shoes", "blinds", "scissors", "food", "paper", "clothing"})


def plural(label: str) -> str:
    """English plural of an object's label."""
    if label in _NO_PLURAL:
        return label
    if label in _IRREGULAR:
        return _IRREGULAR[label]
    if label.endswith(("s", "x", "ch", "sh")):
        return label + "es"
    if label.endswith("y") and label[-2:-1] not in "aeiou":
        return label[:-1] + "ies"
    return label + "s"


def with_article(label: str) -> str:
    """Label with its indefinite article, as in "an armchair"; nothing before a plural."""
    if label in _NO_PLURAL:
        return label
    return f"{'an' if label[:1] in 'aeiou' else 'a'} {label}"
