"""What a kind of sample says to the plan: how many units an entry of a manifest has, and what a unit is made of.

A unit is what an epoch draws at most once; two units of a kind never have the same (item, views). Everything is a pure
function of the entry, the unit and the generator that it is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.contracts import ViewRole


class EntryLike(Protocol):
    """What a sampler reads of an entry of a manifest."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def n_views(self) -> int: ...  # noqa: D102
    @property
    def length(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One unit of an entry, as a plan draws it."""

    n_views: int
    """Of the entry."""
    number: int = 0
    """Among the units of the entry."""
    item: str = ""
    """Id of the entry."""
    broken: frozenset[int] = frozenset()
    """Views of the entry that no sample may hold."""
    size: int = 0
    """Views of the set, where the plan draws that for a whole micro-batch (:attr:`Sampler.sizes`)."""
    turn: int | None = None
    """How often the units of the source were gone through before; None in a pass over all of them in order."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The content of one unit."""

    views: tuple[ViewRole, ...] = ()
    questions: tuple[str, ...] = ()
    item: str = ""
    """What the sample is named by instead of its unit's entry and number; "" for these."""


class Sampler(ABC):
    """Units of the entries of one source, for one kind."""

    sizes: Sequence[int] = ()
    """Increasing numbers of views that sets may have, one of them a micro-batch; () where samples of a micro-batch need
    not be alike."""
    planned: bool = False
    """Whether a unit holds the same views in every epoch, and so has one of :attr:`sizes` of its own."""

    @abstractmethod
    def units(self, entry: EntryLike) -> int:
        """How many units the entry has; 0 where this kind cannot be made of it."""

    @abstractmethod
    def spoiled(self, entry: EntryLike, broken: frozenset[int]) -> Iterable[int]:
        """Units that cannot be made without one of the views ``broken``."""

    @abstractmethod
    def draw(self, unit: Unit, random: np.random.Generator) -> Draw:
        """The content of a unit, without its broken views."""

    def size_of(self, item: str, unit: int) -> int:  # noqa: ARG002
        """Views of a planned unit of an entry; 0 where none are planned."""
        return 0

    def every_draw(self, unit: Unit) -> Sequence[Draw]:  # noqa: ARG002
        """All that a planned unit can be, over all epochs; () where every epoch draws anew."""
        return ()
