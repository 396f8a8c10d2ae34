"""Sets of views for predictive pre-training: a walk through a scene in increasing time, some of its views targets.

A set of V views starts anywhere in the scene and goes on by gaps drawn one by one from the source's interval, as the
published training draws them; view 0 is always context, and int(V (1 - ratio)) views are in all. Nothing of a draw
outlives it: a short scene limits its own gaps, never the setting that other scenes read.

With ``plans_per_scene`` = P a scene has P sets in all, each with a view count and ``partitions`` ways to divide it into
context and targets: unit p of the scene is its set p, the same in every epoch, and a cache can serve it. With 0 every
epoch walks anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from configs import ConfigError
from configs.schema import ViewSetConfig
from services.contracts import Role, ViewRole
from services.streams.permutation import key64
from services.streams.sampler import Draw, EntryLike, Sampler, Unit


class WalkSampler(Sampler):
    """View sets of one source, whose ``interval`` (from, to), in frames, takes the place of the recipe's."""

    def __init__(self, config: ViewSetConfig, source: str = "", interval: Sequence[int] = ()) -> None:
        self.config, self.source = config, source
        least, most = config.views if len(config.views) == 2 else (0, 0)
        self.interval = self._interval(interval)
        if not 1 <= least <= most:
            raise ConfigError(
                f"recipe.view_set.views is {list(config.views)}; two numbers [from, to], 1 <= from <= to, are allowed"
            )
        self.sizes = range(least, most + 1)
        self.planned = config.plans_per_scene > 0
        if self.contexts(least) < 1 or (config.target_ratio > 0 and least < 2):
            raise ConfigError(
                f"recipe.view_set.views is {list(config.views)} with target_ratio {config.target_ratio}: a set of "
                f"{least} views has int({least} x {1 - config.target_ratio:g}) = {self.contexts(least)} context views, "
                "and needs at least 1 of at least 2 views; raise the smallest number of views, or lower the ratio"
            )

    def _interval(self, own: Sequence[int]) -> tuple[int, int]:
        ends = own or self.config.interval
        if len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            key = f"data.sources.{self.source}.interval" if own else "recipe.view_set.interval"
            raise ConfigError(f"{key} is {list(ends)}; two numbers [from, to], 1 <= from <= to, are allowed")
        return ends[0], ends[1]

    def contexts(self, size: int) -> int:
        """Context views of a set of ``size`` views, view 0 among them."""
        # The product of a ratio such as 0.9 and a size may fall short of a whole number by rounding.
        return int(size * (1 - self.config.target_ratio) + 1e-9)

    def units(self, entry: EntryLike) -> int:
        """One for each set of the scene; 0 for a scene with fewer views than the largest set has.

        No view is ever in a set twice: a target that is also context would be learnt by copying.
        """
        return max(1, self.config.plans_per_scene) if entry.kind == "scene" and entry.n_views >= self.sizes[-1] else 0

    def size_of(self, item: str, unit: int) -> int:
        """Views of the planned set ``unit`` of a scene; a scene's sets take all counts in turn."""
        offset = key64("set size", self.config.seed, self.source, item)
        return self.sizes[(offset + unit) % len(self.sizes)]

    def spoiled(self, entry: EntryLike, broken: frozenset[int]) -> Iterable[int]:
        """All units where too few sound views are left; else none, since walks go around the broken ones."""
        return range(self.units(entry)) if entry.n_views - len(broken) < self.sizes[-1] else ()

    def draw(self, unit: Unit, random: np.random.Generator) -> Draw:
        """The views of a set in increasing time.

        ``random`` is of the epoch: it draws a whole set where none are planned, and the partition of a planned one.
        """
        if not self.planned:
            return self._set(self._frames(unit.n_views, unit.size or self.sizes[-1], random, unit.broken), random)
        if not self.config.partitions:
            return self._set(self._planned(unit), random)
        return self._partition(unit, int(random.integers(self.config.partitions)))

    def every_draw(self, unit: Unit) -> Sequence[Draw]:
        """A planned set in each of its partitions; () where sets or partitions are drawn anew in every epoch."""
        return [self._partition(unit, number) for number in range(self.config.partitions if self.planned else 0)]

    def _partition(self, unit: Unit, number: int) -> Draw:
        return self._set(self._planned(unit), self._random("partition", unit.item, unit.number, number))

    def _planned(self, unit: Unit) -> list[int]:
        size = self.size_of(unit.item, unit.number)
        return self._frames(unit.n_views, size, self._random("frames", unit.item, unit.number), unit.broken)

    def _random(self, what: str, *of: object) -> np.random.Generator:
        return np.random.default_rng(key64("view set", self.config.seed, self.source, what, *of))

    def _frames(self, n_views: int, size: int, random: np.random.Generator, broken: frozenset[int]) -> list[int]:
        """Increasing places of ``size`` views, none of them broken."""
        sound = [index for index in range(n_views) if index not in broken] if broken else range(n_views)
        low, high = self.interval
        if len(sound) > (size - 1) * low:
            high = min(high, (len(sound) - 1) // (size - 1)) if size > 1 else high
            steps = np.cumsum(random.integers(low, high + 1, size - 1))
            last = int(steps[-1]) if size > 1 else 0
            start = int(random.integers(len(sound) - last))
            places = [start, *(start + steps).tolist()]
        else:
            places = np.sort(random.choice(len(sound), size, replace=False)).tolist()
        return [sound[place] for place in places]

    def _set(self, frames: list[int], random: np.random.Generator) -> Draw:
        kept = 1 + random.choice(len(frames) - 1, self.contexts(len(frames)) - 1, replace=False)
        context = {0, *kept.tolist()}
        roles = (Role.CONTEXT if place in context else Role.TARGET for place in range(len(frames)))
        return Draw(views=tuple(ViewRole(index=index, role=role) for index, role in zip(frames, roles, strict=True)))
