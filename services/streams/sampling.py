"""Kinds of sample: what the units of a source are for each kind, and how a unit becomes views with roles.

A *kind* is registered once, in :data:`SAMPLERS`, or in :data:`PAIR_KINDS` where it is drawn from a source's
co-visibility index (:mod:`services.data.pairs`), with a :class:`services.streams.sampler.Sampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

import numpy as np
import pyarrow as pa

from configs import ConfigError, RunConfig
from configs.schema import ViewSetConfig
from services.contracts import Role, ViewRole
from services.streams.sampler import Draw, EntryLike, Sampler, Unit
from services.streams.view_walks import WalkSampler


class ViewSampler(Sampler):
    """One view of a scene a sample; the unit is the index of the view."""

    def units(self, entry: EntryLike) -> int:  # noqa: D102
        return entry.n_views if entry.kind == "scene" else 0

    def spoiled(self, entry: EntryLike, broken: frozenset[int]) -> Iterable[int]:  # noqa: ARG002, D102
        return broken

    def draw(self, unit: Unit, random: np.random.Generator) -> Draw:  # noqa: ARG002, D102
        return Draw(views=(ViewRole(index=unit.number),))


class ItemSampler(Sampler):
    """An image or a conversation that is no scene, all of its images as context; one unit an item."""

    def units(self, entry: EntryLike) -> int:  # noqa: D102
        return 1 if entry.kind == "item" else 0

    def spoiled(self, entry: EntryLike, broken: frozenset[int]) -> Iterable[int]:  # noqa: D102
        return () if broken.isdisjoint(range(entry.n_views)) else (0,)

    def draw(self, unit: Unit, random: np.random.Generator) -> Draw:  # noqa: ARG002, D102
        return Draw(views=tuple(ViewRole(index=index) for index in range(unit.n_views)))


class ConversationSampler(ItemSampler):
    """An item with text (ingest states its length), and any number of images."""

    def units(self, entry: EntryLike) -> int:  # noqa: D102
        return super().units(entry) if entry.length > 0 else 0


class ViewSetSampler(Sampler):
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

    def spoiled(self, entry: EntryLike, broken: frozenset[int]) -> Iterable[int]:  # noqa: D102
        return [unit for unit in range(self.units(entry)) if not self._without(entry.n_views, unit, broken)]

    def draw(self, unit: Unit, random: np.random.Generator) -> Draw:
        """Size, interval, first frame and targets are drawn among those that fit into the scene.

        A set that would hold a broken view is drawn again, from all sets of the unit that hold none.
        """
        n_views, broken = unit.n_views, unit.broken
        start = _one_of(self._firsts(n_views, unit.number), random)
        size = _one_of(self._sizes(n_views, start), random)
        step = _one_of(self._steps(n_views, start, size), random)
        frames = range(start, start + size * step, step)
        if not broken.isdisjoint(frames):
            sound = self._without(n_views, unit.number, broken)
            frames = sound[int(random.integers(len(sound)))]
        targets = set(random.choice(len(frames), self._targets(len(frames)), replace=False).tolist())
        roles = (Role.TARGET if place in targets else Role.CONTEXT for place in range(len(frames)))
        return Draw(views=tuple(ViewRole(index=index, role=role) for index, role in zip(frames, roles, strict=True)))

    def _starts(self, n_views: int) -> int:
        """How many first frames leave room for the smallest set."""
        return n_views - (self.least - 1) * self.interval[0]

    def _firsts(self, n_views: int, unit: int) -> range:
        first = unit * self.config.stride
        return range(first, min(first + self.config.stride, self._starts(n_views)))

    def _sizes(self, n_views: int, start: int) -> range:
        return range(self.least, min(self.most, 1 + (n_views - 1 - start) // self.interval[0]) + 1)

    def _steps(self, n_views: int, start: int, size: int) -> range:
        widest = self.interval[1] if size == 1 else min(self.interval[1], (n_views - 1 - start) // (size - 1))
        return range(self.interval[0], widest + 1)

    def _without(self, n_views: int, unit: int, broken: frozenset[int]) -> list[range]:
        """The frames of every set of the unit that has none of the broken views."""
        frames = (
            range(start, start + size * step, step)
            for start in self._firsts(n_views, unit)
            for size in self._sizes(n_views, start)
            for step in self._steps(n_views, start, size)
        )
        return [views for views in frames if broken.isdisjoint(views)]

    def _targets(self, size: int) -> int:
        if self.config.target_ratio == 0:
            return 0
        return min(size - 1, max(1, round(size * self.config.target_ratio)))


class PairSampler(Sampler):
    """Two views of a scene that see the same things; the unit is the number of the pair in the scene's list.

    Args:
        pairs: item -> its pairs (P, 2) of views, int32.
        ordered: give every pair twice, once in each order, as a context and a target (the unit's lowest bit says
            which order); otherwise both views are context.
    """

    def __init__(self, pairs: Mapping[str, np.ndarray], *, ordered: bool) -> None:
        self.orders = 2 if ordered else 1
        filled = {item: views for item, views in pairs.items() if len(views)}
        self._begin = dict(zip(filled, _begins(len(views) for views in filled.values()), strict=False))
        self._count = {item: len(views) for item, views in filled.items()}
        # One array, not one a scene: a plan with a million pairs is sent to every worker.
        self._views = np.concatenate([np.zeros((0, 2), np.int32), *filled.values()]).astype(np.int32, copy=False)

    def units(self, entry: EntryLike) -> int:  # noqa: D102
        return self.orders * self._count.get(entry.id, 0)

    def spoiled(self, entry: EntryLike, broken: frozenset[int]) -> Iterable[int]:  # noqa: D102
        begin = self._begin.get(entry.id, 0)
        views = self._views[begin : begin + self._count.get(entry.id, 0)]
        gone = np.flatnonzero(np.isin(views, list(broken)).any(axis=1))
        return (self.orders * gone[:, None] + np.arange(self.orders)).ravel().tolist()

    def draw(self, unit: Unit, random: np.random.Generator) -> Draw:  # noqa: ARG002, D102
        number, swapped = divmod(unit.number, self.orders)
        first, second = self._views[self._begin[unit.item] + number].tolist()
        if self.orders == 1:
            return Draw(views=(ViewRole(index=first), ViewRole(index=second)))
        context, target = (second, first) if swapped else (first, second)
        return Draw(views=(ViewRole(index=context), ViewRole(index=target, role=Role.TARGET)))


def _begins(counts: Iterable[int]) -> Iterable[int]:
    return accumulate(counts, initial=0)


def _one_of(values: range, random: np.random.Generator) -> int:
    return int(random.integers(values.start, values.stop))


def _pair(values: list[int], key: str, least: int) -> tuple[int, int]:
    if len(values) != 2 or not least <= values[0] <= values[1]:
        raise ConfigError(f"{key} is {list(values)}; two numbers [from, to] with {least} <= from <= to are allowed")
    return values[0], values[1]


def _view_sets(config: RunConfig, source: str) -> Sampler:
    settings = config.recipe.view_set
    if settings.scheme != "walks":
        return ViewSetSampler(settings)
    found = config.data.sources.get(source)
    return WalkSampler(settings, source, found.interval if found else ())


#: Kind -> (config, source) -> sampler.
SAMPLERS: dict[str, Callable[[RunConfig, str], Sampler]] = {
    "view": lambda *_: ViewSampler(),
    "view_set": _view_sets,
    "item": lambda *_: ItemSampler(),
    "conversation": lambda *_: ConversationSampler(),
}
#: Kind -> whether the order of a pair counts. Their sampler is made for each source from its co-visibility index.
PAIR_KINDS: dict[str, bool] = {"pair": False, "generation": True}


def needs_pairs(config: RunConfig) -> bool:
    """Whether a kind of the recipe is drawn from the co-visibility index (``services.data.pairs``)."""
    return any(share > 0 for kind, share in config.recipe.quotas.items() if kind in PAIR_KINDS)


def sampler(kind: str, config: RunConfig, pairs: Mapping[str, np.ndarray] | None = None, source: str = "") -> Sampler:
    """The sampler of ``kind`` for ``source``; ConfigError lists the kinds there are.

    ``pairs`` (item -> views (P, 2)) is what one source has of them; a kind made of pairs needs it.
    """
    if kind in PAIR_KINDS:
        if pairs is None:
            raise ValueError(f"the kind {kind!r} is drawn from pairs of views; give those of the source")
        return PairSampler(pairs, ordered=PAIR_KINDS[kind])
    if kind not in SAMPLERS:
        allowed = sorted({*SAMPLERS, *PAIR_KINDS})
        raise ConfigError(f"recipe.quotas names the kind {kind!r}; allowed are {allowed}")
    return SAMPLERS[kind](config, source)


class Pool:
    """The units of one source for one kind, numbered 0..len-1, without those in quarantine.

    Holds three compact columns and no reference to the manifest, so that a plan is small to send.
    """

    def __init__(self, ids: list[str], n_views: list[int], lengths: list[int], units: list[int]) -> None:
        self.ids = pa.array(ids, pa.large_string())
        self.n_views = np.asarray(n_views, np.int64)
        self.lengths = np.asarray(lengths, np.int64)
        self.broken: dict[int, frozenset[int]] = {}
        """Place of an entry -> its views in quarantine."""
        self._ends = np.cumsum(np.asarray(units, np.int64))
        self._gaps = np.zeros(0, np.int64)
        self._size = int(self._ends[-1]) if len(ids) else 0

    @classmethod
    def of(
        cls,
        kind: str,
        source: str,
        entries: Iterable[EntryLike],
        sampler: Sampler,
        quarantine: frozenset[str],
        size: int = 0,
    ) -> Pool:
        """Units of ``entries``; with ``size`` only planned view sets of so many views.

        ``quarantine`` holds item ids, ``source/item`` ids, ids of single samples, and of single views
        (``source/item#viewN``): no sample of any kind holds such a view.
        """
        singles, views = _numbered(kind, source, quarantine), _numbered("view", source, quarantine)
        ids: list[str] = []
        n_views, lengths, counts, removed = [], [], [], []
        broken: dict[int, frozenset[int]] = {}
        begin = 0
        for entry in entries:
            units = sampler.units(entry)
            if units <= 0 or entry.id in quarantine or f"{source}/{entry.id}" in quarantine:
                continue
            gone = set(singles.get(entry.id, ()))
            if entry.id in views:
                broken[len(ids)] = views[entry.id]
                gone.update(sampler.spoiled(entry, views[entry.id]))
            if size:
                gone.update(unit for unit in range(units) if sampler.size_of(entry.id, unit) != size)
            removed += [begin + unit for unit in gone if unit < units]
            ids.append(entry.id)
            n_views.append(entry.n_views)
            lengths.append(entry.length or 0)
            counts.append(units)
            begin += units
        pool = cls(ids, n_views, lengths, counts)
        pool.broken = broken
        pool._remove(sorted(removed))
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


def _numbered(kind: str, source: str, quarantine: frozenset[str]) -> Mapping[str, frozenset[int]]:
    """Item -> the units of this kind and source that the quarantine names one by one."""
    found: dict[str, set[int]] = {}
    for entry in quarantine:
        item, mark, unit = entry.rpartition(f"#{kind}")
        if mark and unit.isdecimal() and item.startswith(f"{source}/"):
            found.setdefault(item.removeprefix(f"{source}/"), set()).add(int(unit))
    return {item: frozenset(units) for item, units in found.items()}
