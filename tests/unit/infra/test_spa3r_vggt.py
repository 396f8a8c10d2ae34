from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from infra.bench import baselines_vggt
from infra.bench.harness import Context, measure
from infra.bench.spa3r import ROWS, table
from infra.bench.spa3r_vggt import TABLE, prepare_aggregator


@pytest.mark.parametrize("bench", TABLE, ids=lambda bench: bench.name)
def test_benchmarks_run_and_compare_equal_results(bench: Any, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    line = measure(bench, tmp_path, quick=True, rounds=1)
    torch.set_num_threads(threads)
    assert line["value"] > 0
    assert line["baseline"] > 0
    assert 0 <= line["extra"]["error"] < 1e-4
    assert line["extra"].get("flop_ideal", 0.5) < 1


def test_sides_that_differ_are_no_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        baselines_vggt, "view_mask", lambda targets, length: torch.ones(2 * [len(targets) * length], dtype=torch.bool)
    )
    with pytest.raises(AssertionError, match=r"aggregator: the two sides differ by .* allowed 1e-05"):
        prepare_aggregator(Context(folder=tmp_path, quick=True))


def test_every_row_is_described() -> None:
    assert {bench.name for bench in TABLE} <= {bench.name for bench in table()} <= set(ROWS)
