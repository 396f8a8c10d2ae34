"""Plan rows: a step's samples as an Arrow table, and back. Ids, keys and numbers; never a pixel or a feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from services.contracts import FeatureKey, MicroBatch, PlanSample, Role, StepPlan, ViewRole

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int64()),
        ("micro_batch", pa.int32()),
        ("kind", pa.string()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("item", pa.string()),
        ("views", pa.list_(pa.int32())),
        ("roles", pa.list_(pa.string())),
        ("seed", pa.int64()),
        ("questions", pa.list_(pa.string())),
        ("length", pa.int64()),
        ("weight", pa.float32()),
        ("keys", pa.list_(pa.binary())),
    ]
)
"""One row a sample, in plan order. ``keys`` are its feature keys (16 bytes each), null where none were made."""


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step as a rank receives it: its own samples, and the keys that the stream asked the service for."""

    plan: StepPlan
    keys: Mapping[str, tuple[FeatureKey, ...]] = field(default_factory=dict)
    """Sample id -> keys; empty where the plan was read directly."""


def to_table(plan: StepPlan, keys: Mapping[str, Sequence[FeatureKey]] | None = None) -> pa.Table:
    """Rows of one step. ``keys`` gives the feature keys of samples by id."""
    rows: list[dict[str, Any]] = []
    known = keys or {}
    for batch in plan.micro_batches:
        for sample in batch.samples:
            found = known.get(sample.id)
            rows.append(
                {
                    "step": plan.step,
                    "epoch": plan.epoch,
                    "micro_batch": batch.index,
                    "kind": sample.kind,
                    "id": sample.id,
                    "source": sample.source,
                    "item": sample.item,
                    "views": [view.index for view in sample.views],
                    "roles": [view.role.value for view in sample.views],
                    "seed": sample.seed,
                    "questions": list(sample.questions),
                    "length": sample.length,
                    "weight": sample.weight,
                    "keys": None if found is None else [key.digest for key in found],
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of steps as one, in one piece: Ray pickles every chunk of every column by itself."""
    return pa.concat_tables(tables).combine_chunks() if tables else SCHEMA.empty_table()


def from_table(table: pa.Table) -> Iterator[PlannedStep]:
    """The steps of a table of whole steps in plan order."""
    step = -1
    rows: list[dict[str, Any]] = []
    for row in table.select(SCHEMA.names).to_pylist():
        if rows and row["step"] != step:
            yield _planned(rows)
            rows = []
        step = row["step"]
        rows.append(row)
    if rows:
        yield _planned(rows)


def rank_slice(table: pa.Table, rank: int, world_size: int) -> pa.Table:
    """The rows of ``rank`` of a table of one step: samples [r*B/w, (r+1)*B/w) of each micro-batch."""
    if world_size == 1:
        return table
    chosen: list[int] = []
    places: dict[int, list[int]] = {}
    for place, index in enumerate(table["micro_batch"].to_pylist()):
        places.setdefault(index, []).append(place)
    for index in sorted(places):
        if len(places[index]) % world_size:
            raise ValueError(f"{len(places[index])} rows of micro-batch {index} for {world_size} ranks")
        share = len(places[index]) // world_size
        chosen.extend(places[index][rank * share : (rank + 1) * share])
    return table.take(chosen)


def _planned(rows: list[dict[str, Any]]) -> PlannedStep:
    batches: dict[int, list[PlanSample]] = {}
    for row in rows:
        batches.setdefault(row["micro_batch"], []).append(
            PlanSample(
                id=row["id"],
                source=row["source"],
                item=row["item"],
                kind=row["kind"],
                views=tuple(
                    ViewRole(index=index, role=Role(role))
                    for index, role in zip(row["views"], row["roles"], strict=True)
                ),
                seed=row["seed"],
                questions=tuple(row["questions"]),
                length=row["length"],
                weight=row["weight"],
            )
        )
    plan = StepPlan(
        step=rows[0]["step"],
        epoch=rows[0]["epoch"],
        micro_batches=tuple(
            MicroBatch(index=index, kind=samples[0].kind, samples=tuple(samples))
            for index, samples in sorted(batches.items())
        ),
    )
    return PlannedStep(
        plan=plan,
        keys={row["id"]: tuple(FeatureKey(key) for key in row["keys"]) for row in rows if row["keys"] is not None},
    )
