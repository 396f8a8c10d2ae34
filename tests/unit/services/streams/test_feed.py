"""The feed of the pipeline without Ray: order, bounds, ranks, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from services.streams import rows
from services.streams.pipeline import Feed
from services.streams.plan import EpochPlan
from tests.unit.services.streams.small_world import SmallManifest, small_config, write_scenes


@pytest.fixture
def plan(tmp_path: Path) -> EpochPlan:
    return EpochPlan(small_config(tmp_path), {"small": SmallManifest(write_scenes(tmp_path, (4, 5, 7)))})


class Tables:
    """A pipeline that gives two steps a table and counts how far it was pulled."""

    def __init__(self, plan: EpochPlan, start: int, stop: int, error_at: int = -1) -> None:
        self.plan, self.start, self.stop, self.error_at = plan, start, stop, error_at
        self.pulled = start

    def __call__(self) -> Iterator[pa.Table]:
        for step in range(self.start, self.stop, 2):
            if step == self.error_at:
                raise OSError("the pipeline broke")
            self.pulled = step + 2
            yield pa.concat_tables([rows.to_table(self.plan.step(s)) for s in (step, step + 1)])


def make_feed(tables: Tables, world_size: int = 1, lookahead: int = 4) -> Feed:
    return Feed(start=tables.start, world_size=world_size, lookahead=lookahead, tables=tables)


def test_every_rank_gets_its_rows_of_every_step(plan: EpochPlan) -> None:
    feed = make_feed(Tables(plan, 6, 16), world_size=2)
    expected = {rank: [plan.local_step(step, rank, 2) for step in range(6, 16)] for rank in range(2)}
    got: dict[int, list] = {0: [], 1: []}

    def read(rank: int) -> None:
        while (table := feed.take(rank, 6 + len(got[rank]), 3, 10.0)) is not None and table.num_rows:
            got[rank].extend(planned.plan for planned in rows.from_table(table))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    feed.close()
    assert got == expected


def test_the_slowest_rank_bounds_the_pipeline(plan: EpochPlan) -> None:
    tables = Tables(plan, 0, 100)
    feed = make_feed(tables, world_size=2)
    for step in range(4):
        assert rows_of(feed.take(0, step, 1, 10.0)) == [step]
    assert feed.take(0, 4, 1, 0.1) is None, "rank 1 has not asked for anything"
    assert tables.pulled <= 6
    assert feed.wait_until(0, 0.0)
    assert not feed.wait_until(1, 0.05)
    assert rows_of(feed.take(1, 0, 2, 10.0)) == [0, 1], "both are there, rank 0 had them"
    assert rows_of(feed.take(1, 2, 1, 10.0)) == [2]
    assert feed.wait_until(2, 0.0)
    assert rows_of(feed.take(0, 4, 1, 10.0)) == [4]
    feed.close()


def rows_of(table: pa.Table | None) -> list[int]:
    assert table is not None
    return list(dict.fromkeys(table["step"].to_pylist()))


def test_what_the_pipeline_raises_reaches_the_rank(plan: EpochPlan) -> None:
    feed = make_feed(Tables(plan, 0, 8, error_at=2))
    assert [rows_of(feed.take(0, step, 1, 10.0)) for step in range(2)] == [[0], [1]]
    with pytest.raises(OSError, match="the pipeline broke"):
        feed.take(0, 2, 8, 10.0)
    feed.close()


def test_a_feed_closes_while_its_pipeline_waits(plan: EpochPlan) -> None:
    feed = make_feed(Tables(plan, 0, 1000))
    began = time.monotonic()
    feed.close()
    assert time.monotonic() - began < 10
    assert feed._pulling.done()


def test_a_slice_needs_ranks_that_divide_the_batch(plan: EpochPlan) -> None:
    with pytest.raises(ValueError, match="4 rows of micro-batch 0 for 3 ranks"):
        rows.rank_slice(rows.to_table(plan.step(0)), 0, 3)
