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
* Over a whole split (validation, test, neighbours, warming a cache: ``complete=True``) units come in order,
  all of them, and fillers of weight 0 complete the last batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from configs import ConfigError, RunConfig
from models import draws
from services.contracts import MicroBatch, PlanSample, Split, StepPlan
from services.errors import DataError
from services.streams.permutation import Permutation, key64, largest_remainder
from services.streams.sampling import PAIR_KINDS, Pool, Sampler, needs_pairs, sample_id, sampler

if TYPE_CHECKING:
    from services.data.pairs import PairIndex

_VERSION = 1
"""Raised when the same configuration gives other samples; part of the digest."""


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
class _KindPlan:
    """One kind: samplers and pools by source, what each source gives an epoch, and its micro-batches in a step."""

    name: str
    samplers: dict[str, Sampler]
    pools: dict[str, Pool]
    micro_batches: int
    drawn: dict[str, int]
    """Samples of an epoch by source; together micro_batches * micro_batch * steps_per_epoch (training)."""


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
        self.kinds = micro_batch_kinds(config.recipe.quotas, config.trainer.accumulation)
        weights = {name: config.data.sources[name].weight for name in sorted(manifests)}
        indices = _indices(config, {name: manifests[name] for name in weights if weights[name] > 0}, pairs)
        samplers = {
            kind: {name: _sampler(kind, config, name, indices) for name in weights if weights[name] > 0}
            for kind in sorted(set(self.kinds))
        }
        pools = {kind: self._pools(kind, manifests, made, quarantine, indices) for kind, made in samplers.items()}
        self.steps_per_epoch = self._count_steps(pools, weights)
        self._plans = {
            kind: _KindPlan(
                kind,
                {name: samplers[kind][name] for name in by_source},
                by_source,
                self.kinds.count(kind),
                self._drawn(kind, by_source, weights),
            )
            for kind, by_source in pools.items()
        }
        self.digest = self._digest(config, manifests, weights, quarantine, indices)

    @property
    def samples(self) -> int:
        """Distinct units that the plan can draw, over all kinds and sources."""
        return sum(len(pool) for plan in self._plans.values() for pool in plan.pools.values())

    def step(self, global_step: int) -> StepPlan:
        """The plan of step ``global_step`` >= 0; steps go on through as many epochs as asked for."""
        if global_step < 0:
            raise ValueError(f"steps count from 0, got {global_step}")
        epoch, step = divmod(global_step, self.steps_per_epoch)
        taken = dict.fromkeys(self._plans, 0)
        micro_batches = []
        for index, kind in enumerate(self.kinds):
            begin = (step * self._plans[kind].micro_batches + taken[kind]) * self.micro_batch
            taken[kind] += 1
            micro_batches.append(MicroBatch(index=index, kind=kind, samples=self._samples(kind, epoch, begin)))
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

    def _pools(
        self,
        kind: str,
        manifests: Mapping[str, Any],
        samplers: Mapping[str, Sampler],
        quarantine: frozenset[str],
        indices: Mapping[str, PairIndex],
    ) -> dict[str, Pool]:
        """The non-empty pools of ``kind`` by source. DataError when there is none."""
        pools = {
            name: Pool.of(kind, name, manifests[name].of_split(self.split), made, quarantine)
            for name, made in samplers.items()
        }
        filled = {name: pool for name, pool in pools.items() if len(pool)}
        if not filled:
            lacks = [index.missing() for index in indices.values()] if kind in PAIR_KINDS else []
            raise DataError(
                f"no samples of kind {kind!r} in split {self.split.value!r} of the sources {sorted(manifests)} "
                f"(drawn from: {sorted(samplers)}, {len(quarantine)} ids in quarantine); add a source that has some, "
                f"or set recipe.quotas.{kind}=0" + "".join(f"\n  {text}" for text in lacks if text)
            )
        return filled

    def _count_steps(self, pools: Mapping[str, Mapping[str, Pool]], weights: Mapping[str, float]) -> int:
        """Steps of an epoch (training: the least over kinds; complete: the most)."""
        sizes = {kind: self.kinds.count(kind) * self.micro_batch for kind in pools}
        if self.complete:
            return max(-(-sum(map(len, pools[kind].values())) // size) for kind, size in sizes.items())
        steps = {kind: _steps_without_repetition(pools[kind], weights, size) for kind, size in sizes.items()}
        short = min(steps, key=lambda kind: (steps[kind], kind))
        if not steps[short]:
            raise DataError(
                f"one step draws {sizes[short]} samples of kind {short!r}, but split {self.split.value!r} has "
                f"{ {name: len(pool) for name, pool in pools[short].items()} } of them at weights "
                f"{ {name: weights[name] for name in pools[short]} }; lower trainer.micro_batch or "
                "trainer.accumulation, change data.sources.*.weight, or add data"
            )
        return steps[short]

    def _drawn(self, kind: str, pools: Mapping[str, Pool], weights: Mapping[str, float]) -> dict[str, int]:
        if self.complete:
            return {name: len(pool) for name, pool in pools.items()}
        total = self.kinds.count(kind) * self.micro_batch * self.steps_per_epoch
        return largest_remainder(total, {name: weights[name] for name in pools})

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
            "view_set": dataclasses.asdict(config.recipe.view_set),
            "sources": [[name, weights[name], manifests[name].digest] for name in sorted(manifests)],
            "quarantine": sorted(quarantine),
        }
        if indices:
            named["pairs"] = [[name, indices[name].digest] for name in sorted(indices)]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    # -- drawing --------------------------------------------------------------------------------------------

    def _samples(self, kind: str, epoch: int, begin: int) -> tuple[PlanSample, ...]:
        """Samples at places [begin, begin + micro_batch) of the kind's epoch."""
        plan = self._plans[kind]
        places = np.arange(begin, begin + self.micro_batch)
        total = sum(plan.drawn.values())
        if self.complete:
            return tuple(self._in_order(plan, int(place), total) for place in places)
        if len(plan.drawn) > 1:
            places = Permutation(total, key64("mix", self.seed, epoch, kind))(places)
        chosen: list[PlanSample | None] = [None] * self.micro_batch
        offset = 0
        for source, drawn in plan.drawn.items():
            mine = np.flatnonzero((places >= offset) & (places < offset + drawn))
            if mine.size:
                units = self._units(plan, source, epoch, places[mine] - offset)
                for slot, unit in zip(mine.tolist(), units.tolist(), strict=True):
                    chosen[slot] = self._sample(plan, source, epoch, unit)
            offset += drawn
        assert all(sample is not None for sample in chosen), "places of the sources cover the epoch"
        return tuple(sample for sample in chosen if sample is not None)

    def _units(self, plan: _KindPlan, source: str, epoch: int, local: np.ndarray) -> np.ndarray:
        """Unit positions of the ``local``-th draws of a source in an epoch.

        A permutation of all units is cut into pieces of one epoch each; when it is used up a new one begins.
        """
        size, drawn = len(plan.pools[source]), plan.drawn[source]
        turn, piece = divmod(epoch, size // drawn)
        shuffled = Permutation(size, key64("units", self.seed, turn, plan.name, source))
        return shuffled(local + piece * drawn)

    def _in_order(self, plan: _KindPlan, place: int, total: int) -> PlanSample:
        """Unit ``place`` of all sources in order; beyond the last one a filler of weight 0."""
        offset, wrapped = 0, place % total
        for source, pool in plan.pools.items():
            if wrapped < offset + len(pool):
                sample = self._sample(plan, source, 0, wrapped - offset)
                break
            offset += len(pool)
        if place < total:
            return sample
        return dataclasses.replace(sample, id=f"{sample.id}+{place // total}", weight=0.0)

    def _sample(self, plan: _KindPlan, source: str, epoch: int, position: int) -> PlanSample:
        pool = plan.pools[source]
        entry, unit = pool.locate(position)
        item = pool.ids[entry].as_py()
        seed = key64("sample", self.seed, epoch, plan.name, source, item, unit) >> 1
        random = np.random.default_rng(seed)
        broken = pool.broken.get(entry, frozenset())
        draw = plan.samplers[source].draw(int(pool.n_views[entry]), unit, random, broken, item)
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
    return sampler(kind, config, None if index is None else {scene: index.of(scene) for scene in index.facts})


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
