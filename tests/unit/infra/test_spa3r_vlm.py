from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from infra.bench.harness import Context, measure
from infra.bench.spa3r import ROWS, table
from infra.bench.spa3r_vlm import QUESTIONS, TABLE, prepare_packed
from models.spa3r.vlm import packing


@pytest.mark.parametrize("bench", TABLE, ids=lambda bench: bench.name)
def test_benchmarks_run_and_compare_equal_results(bench: Any, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    line = measure(bench, tmp_path, quick=True, rounds=1)
    torch.set_num_threads(threads)
    assert line["value"] > 0
    assert line["baseline"] > 0
    if bench.name == "vlm_packed":
        assert line["ratio"] < 0.75
        assert line["extra"]["error"] < 1e-5
        assert line["extra"]["questions"] == QUESTIONS


def test_sides_that_differ_are_no_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seeing_everything(segments: torch.Tensor, attention: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(len(segments), 1, segments.shape[1], segments.shape[1], dtype=torch.bool).tril()

    monkeypatch.setattr(packing, "block_mask", seeing_everything)
    measured = prepare_packed(Context(folder=tmp_path, quick=True))
    measured.value()
    measured.baseline()
    with pytest.raises(AssertionError, match=r"vlm_packed: the sums are .* allowed 1e-05"):
        measured.extra()


def test_every_row_is_described() -> None:
    assert {bench.name for bench in TABLE} <= {bench.name for bench in table()} <= set(ROWS)
