"""Chosen samples of a split, so that a judge need not read all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar

from services.contracts import MicroBatch, PlanSample, Split, StepPlan
from services.streams.rows import PlannedStep

if TYPE_CHECKING:
    from actors.trainers.feed import Feed

_Entry = TypeVar("_Entry")


def planned(feed: Feed, split: Split, kind: str) -> list[PlanSample]:
    """Every sample of ``kind`` in a split once, in the order of the plan, without fillers."""
    plan = feed.plan(split, complete=True)
    steps = (plan.step(number) for number in range(plan.steps_per_epoch))
    batches = (batch for step in steps for batch in step.micro_batches if batch.kind == kind)
    return [sample for batch in batches for sample in batch.samples if sample.weight > 0]


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
