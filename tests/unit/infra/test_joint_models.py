from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infra.bench.harness import measure
from infra.bench.joint_models import TABLE, peak_bytes


@pytest.mark.parametrize("bench", TABLE, ids=lambda bench: bench.name)
def test_benchmarks_run_and_compare_equal_results(bench: object, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    line = measure(bench, tmp_path, quick=True, rounds=1)  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    assert line["value"] > 0
    assert line["baseline"] > 0
    assert line["ratio"] == pytest.approx(line["value"] / line["baseline"], rel=1e-3)


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            held = torch.empty(1000, dtype=torch.float32)
            both = held + 1
            del held, both

    assert peak_bytes(work) == pytest.approx(8000, abs=600)
