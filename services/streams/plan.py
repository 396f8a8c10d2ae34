"""The plan of an epoch: a pure function of (recipe, seed, global step, manifests by digest, quarantine).

A step is an ordered list of global micro-batches, the same for every world size, so resuming at a step, or with
another number of ranks, needs no state beside the step's number.

The rules:

* Every step holds the same number of micro-batches of each kind: ``recipe.quotas`` over
  ``trainer.accumulation`` by largest remainder. The kind is thus a function of the index in the step.
* In training, an epoch is the largest number of whole steps in which no source, at its share of every kind,
  draws a unit twice. Shares of sources over an epoch are ``data.sources.*.weight`` by largest remainder. What is
  left over when the epoch ends is dropped for that epoch; a source that is larger than its share is walked
  through by the following epochs before any of its units comes again.
* A micro-batch of view sets drawn by walks has one number of views. Where sets are planned, sets of one size make a
  part of the kind: an epoch is a shuffled sequence of the parts' micro-batches. Where they are not, the size is drawn
  for each micro-batch.
* Where conversations are packed, a unit is a pack of them (:mod:`services.streams.packs`).
* Over a whole split (validation, test, neighbours, warming a cache: ``complete=True``) units come in order,
  all of them, and fillers of weight 0 complete the last batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from configs import ConfigError, RunConfig
from models import draws
from services.contracts import MicroBatch, PlanSample, Split, StepPlan
from services.errors import DataError
from services.streams.packs import KIND as PACKED
from services.streams.packs import PackSampler, picture_groups
from services.streams.permutation import Permutation, key64, largest_remainder
from services.streams.sampler import Sampler, Unit
from services.streams.sampling import PAIR_KINDS, Pool, needs_pairs, sample_id, sampler

if TYPE_CHECKING:
    from services.data.pairs import PairIndex

PACKING = frozenset({"spa3_vlm"})
"""Recipes whose model reads several conversations behind one prefix."""
_VERSION = 1
"""Raised when the same configuration gives other samples (another default does); part of the digest."""


def generator(seed: int, step: int, sample_id: str, purpose: str) -> torch.Generator:
    """A CPU generator for one draw (noise, dropped condition, augmentation), keyed by all four arguments."""
    return draws.generator(draw_key(seed, step, sample_id), purpose)


def draw_key(seed: int, step: int, sample_id: str) -> int:
    """The key of all draws of a sample at a step: the column ``draw`` of a batch, for :mod:`models.draws`."""
    return key64("draw", seed, step, sample_id) >> 1


def check_world_size(micro_batch: int, world_size: int) -> None:
    """ConfigError unless ``world_size`` ranks can share a micro-batch evenly."""
    if world_size < 1 or micro_batch % world_size:
        allowed = [n for n in range(1, micro_batch + 1) if micro_batch % n == 0]
        raise ConfigError(
            f"{world_size} workers cannot share trainer.micro_batch={micro_batch} evenly; with it, "
            f"cluster.roles.*.workers may be {allowed}"
        )


def micro_batch_kinds(quotas: Mapping[str, float], accumulation: int) -> tuple[str, ...]:
    """The kind of each micro-batch of a step, kinds spread evenly over the step.

    ConfigError when a quota is negative, all are 0, or a kind with a quota would get no micro-batch.
    """
    if accumulation < 1:
        raise ConfigError(f"trainer.accumulation is {accumulation}; a whole number >= 1 is allowed")
    try:
        counts = largest_remainder(accumulation, quotas)
    except ValueError as error:
        raise ConfigError(f"recipe.quotas: {error}") from error
    for kind, count in counts.items():
        if count == 0 and quotas[kind] > 0:
            raise ConfigError(
                f"recipe.quotas gives {kind!r} a share of {quotas[kind]:g} of {dict(quotas)}, which is no "
                f"micro-batch of a step with trainer.accumulation={accumulation}; raise trainer.accumulation "
                f"to {_least_accumulation(quotas)} or more, or set the quota to 0"
            )
    places = [((j + 0.5) / count, kind) for kind, count in counts.items() for j in range(count)]
    return tuple(kind for _, kind in sorted(places))


def _least_accumulation(quotas: Mapping[str, float]) -> int:
    """The smallest accumulation at which every kind with a quota gets a micro-batch."""
    wanted = {kind for kind, share in quotas.items() if share > 0}
    accumulation = len(wanted)
    while any(largest_remainder(accumulation, quotas)[kind] == 0 for kind in wanted):
        accumulation += 1
    return accumulation


@dataclasses.dataclass(frozen=True)
class _Part:
    """Samples of a kind that may share a micro-batch: pools by source, and what each source gives an epoch."""

    name: str
    """The kind; where it has several parts, with the number of views."""
    size: int
    """Views of every planned set; 0 for all kinds that are not divided."""
    pools: dict[str, Pool]
    micro_batches: int
    """Of an epoch, at most (training), or of a pass over all (complete)."""
    drawn: dict[str, int]
    """Samples of an epoch by source; together micro_batches * micro_batch (training)."""


@dataclasses.dataclass(frozen=True)
class _KindPlan:
    """One kind: its samplers by source, its parts, and how many micro-batches of a step it has."""

    name: str
    samplers: dict[str, Sampler]
    parts: tuple[_Part, ...]
    per_step: int

    @property
    def micro_batches(self) -> int:
        """Of an epoch, over the parts."""
        return sum(part.micro_batches for part in self.parts)


class EpochPlan:
    """See the module. Cheap to make, to send and to ask; holds no paths and no pixels.

    ``complete`` (by default: whether ``split`` is not the training split) selects the pass over a whole split.
    ``pairs`` are the co-visibility indices by source (``services.data.pairs.open_pairs``), of which kinds made of pairs
    keep the views; None reads the stored ones where such a kind is drawn.

    Raises ConfigError for quotas that cannot be met and DataError when the data do not fill one step, or when there
    is no index of pairs.
    """

    def __init__(
        self,
        config: RunConfig,
        manifests: Mapping[str, Any],
        *,
        split: Split | str = Split.TRAIN,
        quarantine: frozenset[str] = frozenset(),
        complete: bool | None = None,
        pairs: Mapping[str, PairIndex] | None = None,
    ) -> None:
        self.seed = config.seed
        self.split = Split(split)
        self.complete = self.split is not Split.TRAIN if complete is None else complete
        self.micro_batch = config.trainer.micro_batch
        if self.micro_batch < 1:
            raise ConfigError(f"trainer.micro_batch is {self.micro_batch}; a whole number >= 1 is allowed")
        self.packed = config.recipe.spa3_vlm.questions_per_sample if config.recipe.name in PACKING else 1
        """Conversations about the same pictures that make one sample, at most."""
        self.kinds = micro_batch_kinds(config.recipe.quotas, config.trainer.accumulation)
        weights = {name: config.data.sources[name].weight for name in sorted(manifests)}
        indices = _indices(config, {name: manifests[name] for name in weights if weights[name] > 0}, pairs)
        samplers = {
            kind: {
                name: self._packs(config, name, manifests[name], quarantine)
                if kind == PACKED and self.packed > 1
                else _sampler(kind, config, name, indices)
                for name in weights
                if weights[name] > 0
            }
            for kind in sorted(set(self.kinds))
        }
        pools = {
            kind: {
                size: found
                for size in _sizes(made.values())
                if (found := self._pools(kind, manifests, made, quarantine, size))
            }
            for kind, made in samplers.items()
        }
        self._all_kinds_filled(pools, samplers, manifests, quarantine, indices)
        self.steps_per_epoch = self._count_steps(pools, weights)
        self._plans = {
            kind: _KindPlan(kind, samplers[kind], self._parts(kind, by_size, weights), self.kinds.count(kind))
            for kind, by_size in pools.items()
        }
        self.digest = self._digest(config, manifests, weights, quarantine, indices)

    @property
    def samples(self) -> int:
        """Distinct units that the plan can draw, over all kinds and sources."""
        parts = (part for plan in self._plans.values() for part in plan.parts)
        return sum(len(pool) for part in parts for pool in part.pools.values())

    def step(self, global_step: int) -> StepPlan:
        """The plan of step ``global_step`` >= 0; steps go on through as many epochs as asked for."""
        if global_step < 0:
            raise ValueError(f"steps count from 0, got {global_step}")
        epoch, step = divmod(global_step, self.steps_per_epoch)
        taken = dict.fromkeys(self._plans, 0)
        micro_batches = []
        for index, kind in enumerate(self.kinds):
            number = step * self._plans[kind].per_step + taken[kind]
            taken[kind] += 1
            micro_batches.append(MicroBatch(index=index, kind=kind, samples=self._samples(kind, epoch, number)))
        return StepPlan(step=global_step, epoch=epoch, micro_batches=tuple(micro_batches))

    def local_step(self, global_step: int, rank: int, world_size: int) -> StepPlan:
        """The step with only the samples of ``rank``. ConfigError when ``world_size`` does not divide the batch."""
        check_world_size(self.micro_batch, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} ranks; ranks count from 0")
        whole = self.step(global_step)
        return dataclasses.replace(
            whole,
            micro_batches=tuple(
                dataclasses.replace(batch, samples=batch.slice(rank, world_size)) for batch in whole.micro_batches
            ),
        )

    def local_steps(self, rank: int, world_size: int, start: int, stop: int) -> Iterator[StepPlan]:
        """:meth:`local_step` of the steps in [start, stop), in order."""
        for step in range(start, stop):
            yield self.local_step(step, rank, world_size)

    # -- making ---------------------------------------------------------------------------------------------

    def _packs(self, config: RunConfig, source: str, manifest: Any, quarantine: frozenset[str]) -> PackSampler:
        groups = picture_groups(manifest.of_split(self.split), source, quarantine)
        return PackSampler(groups, self.packed, seed=config.seed, source=source)

    def _pools(
        self,
        kind: str,
        manifests: Mapping[str, Any],
        samplers: Mapping[str, Sampler],
        quarantine: frozenset[str],
        size: int,
    ) -> dict[str, Pool]:
        """The non-empty pools of ``kind`` by source, of sets of ``size`` views where that is not 0."""
        pools = {
            name: Pool.of(kind, name, manifests[name].of_split(self.split), made, quarantine, size)
            for name, made in samplers.items()
        }
        return {name: pool for name, pool in pools.items() if len(pool)}

    def _all_kinds_filled(
        self,
        pools: Mapping[str, Mapping[int, Any]],
        samplers: Mapping[str, Mapping[str, Sampler]],
        manifests: Mapping[str, Any],
        quarantine: frozenset[str],
        indices: Mapping[str, PairIndex],
    ) -> None:
        """DataError for a kind of which there is nothing."""
        for kind, found in pools.items():
            if found:
                continue
            lacks = [index.missing() for index in indices.values()] if kind in PAIR_KINDS else []
            lacks += _too_short(samplers[kind])
            raise DataError(
                f"no samples of kind {kind!r} in split {self.split.value!r} of the sources {sorted(manifests)} "
                f"(drawn from: {sorted(samplers[kind])}, {len(quarantine)} ids in quarantine); add a source that has "
                f"some, or set recipe.quotas.{kind}=0" + "".join(f"\n  {text}" for text in lacks if text)
            )

    def _count_steps(self, pools: Mapping[str, Mapping[int, Mapping[str, Pool]]], weights: Mapping[str, float]) -> int:
        """Steps of an epoch (training: the least over kinds; complete: the most)."""
        counts = {kind: self.kinds.count(kind) for kind in pools}
        if self.complete:
            return max(-(-self._micro_batches(pools[kind], weights) // counts[kind]) for kind in counts)
        steps = {}
        for kind, by_size in pools.items():
            if len(by_size) == 1:
                (found,) = by_size.values()
                steps[kind] = _steps_without_repetition(found, weights, counts[kind] * self.micro_batch)
            else:
                steps[kind] = self._micro_batches(by_size, weights) // counts[kind]
        short = min(steps, key=lambda kind: (steps[kind], kind))
        if not steps[short]:
            have = {
                name: sum(len(found[name]) for found in pools[short].values() if name in found)
                for name in sorted({name for found in pools[short].values() for name in found})
            }
            divided = (
                ", divided by their number of views (fewer numbers: recipe.view_set.views; more sets: "
                "recipe.view_set.plans_per_scene)"
                if 0 not in pools[short]
                else ""
            )
            raise DataError(
                f"one step draws {counts[short] * self.micro_batch} samples of kind {short!r}, but split "
                f"{self.split.value!r} has {have} of them{divided} at weights "
                f"{ {name: weights[name] for name in have} }; lower trainer.micro_batch or "
                "trainer.accumulation, change data.sources.*.weight, or add data"
            )
        return steps[short]

    def _micro_batches(self, by_size: Mapping[int, Mapping[str, Pool]], weights: Mapping[str, float]) -> int:
        return sum(self._part_batches(found, weights) for found in by_size.values())

    def _part_batches(self, pools: Mapping[str, Pool], weights: Mapping[str, float]) -> int:
        """Micro-batches that the pools give: without repetition, or (complete) the last one filled up."""
        if self.complete:
            return -(-sum(map(len, pools.values())) // self.micro_batch)
        return _steps_without_repetition(pools, weights, self.micro_batch)

    def _parts(
        self, kind: str, by_size: Mapping[int, dict[str, Pool]], weights: Mapping[str, float]
    ) -> tuple[_Part, ...]:
        """The parts of a kind that give at least one micro-batch."""
        parts = []
        for size, pools in by_size.items():
            batches = self._part_batches(pools, weights)
            if len(by_size) == 1 and not self.complete:
                batches = self.kinds.count(kind) * self.steps_per_epoch
            if not batches:
                continue
            drawn = {name: len(pool) for name, pool in pools.items()}
            if not self.complete:
                drawn = largest_remainder(batches * self.micro_batch, {name: weights[name] for name in pools})
            parts.append(_Part(f"{kind}/{size}" if size else kind, size, pools, batches, drawn))
        return tuple(parts)

    def _digest(
        self,
        config: RunConfig,
        manifests: Mapping[str, Any],
        weights: Mapping[str, float],
        quarantine: frozenset[str],
        indices: Mapping[str, PairIndex],
    ) -> str:
        """Hex sha256 that names the samples of a run and their order."""
        named: dict[str, Any] = {
            "version": _VERSION,
            "seed": self.seed,
            "split": self.split.value,
            "complete": self.complete,
            "micro_batch": self.micro_batch,
            "kinds": self.kinds,
            "view_set": _given(config.recipe.view_set),
            "intervals": {name: source.interval for name, source in config.data.sources.items() if source.interval},
            "sources": [[name, weights[name], manifests[name].digest] for name in sorted(manifests)],
            "quarantine": sorted(quarantine),
        }
        if self.packed > 1:
            named["packed"] = self.packed
        if indices:
            named["pairs"] = [[name, indices[name].digest] for name in sorted(indices)]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    # -- drawing --------------------------------------------------------------------------------------------

    def _samples(self, kind: str, epoch: int, number: int) -> tuple[PlanSample, ...]:
        """Samples of micro-batch ``number`` of the kind's epoch."""
        plan = self._plans[kind]
        if not self.complete and len(plan.parts) > 1:
            shuffled = Permutation(plan.micro_batches, key64("parts", self.seed, epoch, kind))
            number = int(shuffled(np.array([number]))[0])
        part, first = plan.parts[0], 0
        for part in plan.parts:
            # What lies beyond the last part completes the last step: it goes on there, with fillers.
            if number < first + part.micro_batches or part is plan.parts[-1]:
                break
            first += part.micro_batches
        size = part.size or self._drawn_size(plan, epoch, number)
        places = np.arange((number - first) * self.micro_batch, (number - first + 1) * self.micro_batch)
        total = sum(part.drawn.values())
        if self.complete:
            return tuple(self._in_order(plan, part, int(place), total, size) for place in places)
        if len(part.drawn) > 1:
            places = Permutation(total, key64("mix", self.seed, epoch, part.name))(places)
        chosen: list[PlanSample | None] = [None] * self.micro_batch
        offset = 0
        for source, drawn in part.drawn.items():
            mine = np.flatnonzero((places >= offset) & (places < offset + drawn))
            if mine.size:
                units = self._units(part, source, epoch, places[mine] - offset)
                for slot, unit in zip(mine.tolist(), units.tolist(), strict=True):
                    chosen[slot] = self._sample(plan, part, source, epoch, unit, size)
            offset += drawn
        assert all(sample is not None for sample in chosen), "places of the sources cover the epoch"
        return tuple(sample for sample in chosen if sample is not None)

    def _drawn_size(self, plan: _KindPlan, epoch: int, number: int) -> int:
        """Views of the sets of a micro-batch where they are not planned; 0 for kinds of another sampler."""
        sizes = next(iter(plan.samplers.values())).sizes
        return sizes[key64("views", self.seed, epoch, plan.name, number) % len(sizes)] if sizes else 0

    def _units(self, part: _Part, source: str, epoch: int, local: np.ndarray) -> np.ndarray:
        """Unit positions of the ``local``-th draws of a source in an epoch.

        A permutation of all units is cut into pieces of one epoch each; when it is used up a new one begins.
        """
        turn, piece = self._turn(part, source, epoch)
        shuffled = Permutation(len(part.pools[source]), key64("units", self.seed, turn, part.name, source))
        return shuffled(local + piece * part.drawn[source])

    def _turn(self, part: _Part, source: str, epoch: int) -> tuple[int, int]:
        """How often an epoch's source was gone through before, and which piece of it the epoch draws."""
        return divmod(epoch, len(part.pools[source]) // part.drawn[source])

    def _in_order(self, plan: _KindPlan, part: _Part, place: int, total: int, size: int) -> PlanSample:
        """Unit ``place`` of all sources in order; beyond the last one a filler of weight 0."""
        offset, wrapped = 0, place % total
        for source, pool in part.pools.items():
            if wrapped < offset + len(pool):
                sample = self._sample(plan, part, source, 0, wrapped - offset, size)
                break
            offset += len(pool)
        if place < total:
            return sample
        return dataclasses.replace(sample, id=f"{sample.id}+{place // total}", weight=0.0)

    def _sample(self, plan: _KindPlan, part: _Part, source: str, epoch: int, position: int, size: int) -> PlanSample:
        pool = part.pools[source]
        entry, unit = pool.locate(position)
        item = pool.ids[entry].as_py()
        seed = key64("sample", self.seed, epoch, plan.name, source, item, unit) >> 1
        drawn = Unit(
            n_views=int(pool.n_views[entry]),
            number=unit,
            item=item,
            broken=pool.broken.get(entry, frozenset()),
            size=size,
            turn=None if self.complete else self._turn(part, source, epoch)[0],
        )
        draw = plan.samplers[source].draw(drawn, np.random.default_rng(seed))
        if draw.item:
            item, unit = draw.item, 0
        return PlanSample(
            id=sample_id(source, item, plan.name, unit),
            source=source,
            item=item,
            kind=plan.name,
            views=draw.views,
            seed=seed,
            questions=draw.questions,
            length=int(pool.lengths[entry]),
        )


def _given(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as by default, so that one added later renames no run from before it."""
    default = type(settings)()
    return {name: value for name, value in dataclasses.asdict(settings).items() if value != getattr(default, name)}


def _indices(
    config: RunConfig, manifests: Mapping[str, Any], pairs: Mapping[str, PairIndex] | None
) -> dict[str, PairIndex]:
    """The co-visibility index of every source that is drawn from; none when no kind is made of pairs."""
    if not needs_pairs(config):
        return {}
    if pairs is None:
        from services.data.pairs import stored_pairs

        return stored_pairs(config, manifests)
    absent = sorted(set(manifests) - set(pairs))
    if absent:
        raise DataError(f"there is no index of pairs of the sources {absent}; make it with `loom3d data pairs`")
    return {name: pairs[name] for name in manifests}


def _sampler(kind: str, config: RunConfig, source: str, indices: Mapping[str, PairIndex]) -> Sampler:
    """The sampler of a kind for one source."""
    index = indices.get(source)
    pairs = None if index is None else {scene: index.of(scene) for scene in index.facts}
    return sampler(kind, config, pairs, source)


def _sizes(samplers: Iterable[Sampler]) -> Sequence[int]:
    """The numbers of views that divide a kind into parts; (0,) for a kind that is not divided."""
    made = next(iter(samplers), None)
    return made.sizes if made is not None and made.planned else (0,)


def _too_short(samplers: Mapping[str, Sampler]) -> list[str]:
    """What a source must have for the largest view set."""
    return [
        f"{name}: a scene needs at least {made.sizes[-1]} views, the largest set of recipe.view_set.views"
        for name, made in samplers.items()
        if made.sizes
    ]


def _steps_without_repetition(pools: Mapping[str, Pool], weights: Mapping[str, float], size: int) -> int:
    """The largest number of steps of ``size`` samples in which every source's share fits its pool."""
    shares = {name: weights[name] for name in pools}
    whole = sum(shares.values())
    # An exact share is less than 1 away from the rounded one, so this bound is at most a step or so too high.
    steps = min(int((len(pool) + 1) * whole / shares[name]) for name, pool in pools.items()) // size
    while steps > 0:
        drawn = largest_remainder(steps * size, shares)
        if all(drawn[name] <= len(pool) for name, pool in pools.items()):
            return steps
        steps -= 1
    return 0
