"""Kinds of sample: what the units of a source are for each kind, and how a unit becomes views with roles.

A *kind* is registered once in :data:`SAMPLERS`. Its sampler says how many units an entry of a manifest has and
makes the content of a unit. A unit is what an epoch draws at most once; two units of a kind never have the same
(item, views). Everything is a pure function of the entry, the unit and the generator that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from configs import ConfigError, RunConfig
from configs.schema import ViewSetConfig
from services.contracts import Role, ViewRole


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
class Draw:
    """The content of one unit."""

    views: tuple[ViewRole, ...] = ()
    questions: tuple[str, ...] = ()


class Sampler(Protocol):
    """Units of an entry, and what a unit is made of."""

    def units(self, entry: EntryLike) -> int:
        """How many units the entry has; 0 where this kind cannot be made of it."""
        ...

    def draw(self, n_views: int, unit: int, random: np.random.Generator) -> Draw:
        """The content of unit ``unit`` of an entry with ``n_views`` views."""
        ...


class ViewSampler:
    """One view of a scene a sample; the unit is the index of the view."""

    def units(self, entry: EntryLike) -> int:  # noqa: D102
        return entry.n_views if entry.kind == "scene" else 0

    def draw(self, n_views: int, unit: int, random: np.random.Generator) -> Draw:  # noqa: ARG002, D102
        return Draw(views=(ViewRole(index=unit),))


class ItemSampler:
    """An image or a conversation that is no scene; one unit an item."""

    def units(self, entry: EntryLike) -> int:  # noqa: D102
        return 1 if entry.kind == "item" else 0

    def draw(self, n_views: int, unit: int, random: np.random.Generator) -> Draw:  # noqa: ARG002, D102
        return Draw(views=tuple(ViewRole(index=index) for index in range(n_views)))


class ViewSetSampler:
    """Ordered views of a scene at a constant frame interval, some of them targets.

    Unit u covers the first frames [u * stride, (u + 1) * stride): the set starts at one of them. Ranges of first
    frames are disjoint, so no two units of a scene can give the same set of views.
    """

    def __init__(self, config: ViewSetConfig) -> None:
        self.config = config
        low, high = _pair(config.views, "recipe.view_set.views", least=1)
        self.least, self.most = low, high
        self.interval = _pair(config.interval, "recipe.view_set.interval", least=1)
        if config.stride < 1:
            raise ConfigError(f"recipe.view_set.stride is {config.stride}; a whole number >= 1 is allowed")
        if not 0 <= config.target_ratio < 1:
            raise ConfigError(
                f"recipe.view_set.target_ratio is {config.target_ratio}; 0 <= ratio < 1 is allowed "
                "(at least one view is context)"
            )
        if config.target_ratio > 0 and low < 2:
            raise ConfigError(
                f"recipe.view_set.views is {list(config.views)} with target_ratio {config.target_ratio}; "
                "a set with targets needs at least 2 views"
            )

    def units(self, entry: EntryLike) -> int:  # noqa: D102
        if entry.kind != "scene":
            return 0
        starts = self._starts(entry.n_views)
        return max(0, -(-starts // self.config.stride))

    def _starts(self, n_views: int) -> int:
        """How many first frames leave room for the smallest set."""
        return n_views - (self.least - 1) * self.interval[0]

    def draw(self, n_views: int, unit: int, random: np.random.Generator) -> Draw:
        """Size, interval, first frame and targets are drawn among those that fit into the scene."""
        first = unit * self.config.stride
        start = int(random.integers(first, min(first + self.config.stride, self._starts(n_views))))
        room = n_views - 1 - start
        fits = min(self.most, 1 + room // self.interval[0])
        size = int(random.integers(self.least, fits + 1))
        widest = self.interval[1] if size == 1 else min(self.interval[1], room // (size - 1))
        step = int(random.integers(self.interval[0], widest + 1))
        targets = set(random.choice(size, self._targets(size), replace=False).tolist())
        return Draw(
            views=tuple(
                ViewRole(index=start + i * step, role=Role.TARGET if i in targets else Role.CONTEXT)
                for i in range(size)
            )
        )

    def _targets(self, size: int) -> int:
        if self.config.target_ratio == 0:
            return 0
        return min(size - 1, max(1, round(size * self.config.target_ratio)))


def _pair(values: list[int], key: str, least: int) -> tuple[int, int]:
    if len(values) != 2 or not least <= values[0] <= values[1]:
        raise ConfigError(f"{key} is {list(values)}; two numbers [from, to] with {least} <= from <= to are allowed")
    return values[0], values[1]


#: Kind -> sampler. A later kind (pairs from a co-visibility index, questions, packed text) is one more line.
SAMPLERS: dict[str, Callable[[RunConfig], Sampler]] = {
    "view": lambda _: ViewSampler(),
    "view_set": lambda config: ViewSetSampler(config.recipe.view_set),
    "item": lambda _: ItemSampler(),
}


def sampler(kind: str, config: RunConfig) -> Sampler:
    """The sampler of ``kind``; ConfigError lists the kinds there are."""
    if kind not in SAMPLERS:
        raise ConfigError(f"recipe.quotas names the kind {kind!r}; allowed are {sorted(SAMPLERS)}")
    return SAMPLERS[kind](config)


class Pool:
    """The units of one source for one kind, numbered 0..len-1, without those in quarantine.

    Holds three compact columns and no reference to the manifest, so that a plan is small to send.
    """

    def __init__(self, ids: list[str], n_views: list[int], lengths: list[int], units: list[int]) -> None:
        self.ids = pa.array(ids, pa.large_string())
        self.n_views = np.asarray(n_views, np.int64)
        self.lengths = np.asarray(lengths, np.int64)
        self._ends = np.cumsum(np.asarray(units, np.int64))
        self._gaps = np.zeros(0, np.int64)
        self._size = int(self._ends[-1]) if len(ids) else 0

    @classmethod
    def of(cls, kind: str, source: str, entries: list, sampler: Sampler, quarantine: frozenset[str]) -> Pool:
        """Units of ``entries``. ``quarantine`` holds item ids, ``source/item`` ids or ids of single samples."""
        singles = _single_units(kind, source, quarantine)
        kept = [
            (entry, units)
            for entry in entries
            if (units := sampler.units(entry)) > 0
            and entry.id not in quarantine
            and f"{source}/{entry.id}" not in quarantine
        ]
        pool = cls(
            [entry.id for entry, _ in kept],
            [entry.n_views for entry, _ in kept],
            [entry.length or 0 for entry, _ in kept],
            [units for _, units in kept],
        )
        removed: list[int] = []
        for position, (entry, units) in enumerate(kept):
            begin = int(pool._ends[position]) - units
            removed.extend(begin + unit for unit in singles.get(entry.id, ()) if unit < units)
        pool._remove(sorted(set(removed)))
        return pool

    def _remove(self, units: list[int]) -> None:
        # Unit number r_j of the j-th removed unit becomes "how many kept units lie before it": r_j - j. A kept
        # position p then stands after every removed unit with r_j - j <= p.
        self._gaps = np.asarray(units, np.int64) - np.arange(len(units))
        self._size -= len(units)

    def __len__(self) -> int:
        return self._size

    def locate(self, position: int) -> tuple[int, int]:
        """(entry, unit of that entry) of the ``position``-th unit that is not in quarantine."""
        index = position + int(np.searchsorted(self._gaps, position, side="right"))
        entry = int(np.searchsorted(self._ends, index, side="right"))
        begin = int(self._ends[entry - 1]) if entry else 0
        return entry, index - begin


def sample_id(source: str, item: str, kind: str, unit: int) -> str:
    """``source/item#kindN``: unique within an epoch, the same in every epoch."""
    return f"{source}/{item}#{kind}{unit}"


def _single_units(kind: str, source: str, quarantine: frozenset[str]) -> Mapping[str, list[int]]:
    """Item -> units of this kind and source that the quarantine names one by one."""
    found: dict[str, list[int]] = {}
    for entry in quarantine:
        item, mark, unit = entry.rpartition(f"#{kind}")
        if mark and unit.isdecimal() and item.startswith(f"{source}/"):
            found.setdefault(item.removeprefix(f"{source}/"), []).append(int(unit))
    return found
