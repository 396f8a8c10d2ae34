"""Chosen samples of a split, so that a judge need not read all of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from services.contracts import MicroBatch, PlanSample, Split, StepPlan
from services.streams.rows import PlannedStep

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

_Entry = TypeVar("_Entry")


def planned(feed: Feed, split: Split, kind: str, limit: int = 0) -> list[PlanSample]:
    """Samples of ``kind`` in a split, each once, in the order of the plan; at most ``limit`` (0: all), evenly over it.

    Only the steps that hold them are planned, so a few of millions are found at once.
    """
    plan = feed.plan(split, complete=True)
    size = plan.kinds.count(kind) * plan.micro_batch

    def of_step(step: int) -> list[PlanSample]:
        batches = [batch for batch in plan.step(step).micro_batches if batch.kind == kind]
        return [sample for batch in batches for sample in batch.samples if sample.weight > 0]

    # Samples come in order, and fillers after the last one: whole steps, perhaps one of both, then fillers alone.
    whole = bisect_left(range(plan.steps_per_epoch), True, key=lambda step: len(of_step(step)) < size)
    total = whole * size + (len(of_step(whole)) if whole < plan.steps_per_epoch else 0)
    found = []
    for step, places in groupby(spread(range(total), limit), key=lambda place: place // size):
        samples = of_step(step)
        found += [samples[place % size] for place in places]
    return found


def spread(entries: Sequence[_Entry], limit: int) -> list[_Entry]:
    """At most ``limit`` entries (0: all), evenly over their order."""
    if not limit or len(entries) <= limit:
        return list(entries)
    return [entries[(2 * place + 1) * len(entries) // (2 * limit)] for place in range(limit)]


def load_samples(
    feed: Feed, samples: Sequence[PlanSample], *, split: Split, batch_size: int
) -> Iterator[tuple[dict[str, Any], tuple[PlanSample, ...]]]:
    """These samples (of one kind) in their order, in batches.

    The tensors are the loader's: clone what is kept beyond the next batch. A broken sample has weight 0.
    """
    parts = [tuple(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    plan = feed.plan(split, complete=True)
    with closing(feed.load(plan, stop=len(parts), steps=_Chosen(parts))) as loader:
        for step in loader:
            for micro in step.micro_batches:
                yield micro.batch, micro.samples


class _Chosen:
    """Batches of chosen samples as the loader takes the steps of a plan."""

    def __init__(self, parts: Sequence[tuple[PlanSample, ...]]) -> None:
        self._steps = iter(
            StepPlan(step=number, epoch=0, micro_batches=(MicroBatch(index=0, kind=part[0].kind, samples=part),))
            for number, part in enumerate(parts)
        )

    def __next__(self) -> PlannedStep:
        return PlannedStep(plan=next(self._steps))

    def arrived(self) -> list[PlannedStep]:
        """None arrive ahead."""
        return []
