"""The joint benchmarks at tiny sizes, and the table of their results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from infra.bench import joint, joint_bridge, joint_cached, joint_step, spa3r_cached
from infra.bench.harness import measure
from infra.bench.table import main, table


def test_every_benchmark_is_described() -> None:
    assert sorted(bench.name for bench in joint.table()) == sorted(joint.ROWS)


def test_the_link_and_bare_gloo_bring_the_same(tmp_path: Path) -> None:
    line = measure(joint_bridge.TABLE[0], tmp_path, quick=True, rounds=1)
    assert line["extra"]["bytes"] == 2**20
    assert line["value"] > 0
    assert line["baseline"] > 0


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each role")
def test_roles_step_together_and_alone(tmp_path: Path) -> None:
    line = measure(joint_step.TABLE[0], tmp_path, quick=True, rounds=1)
    alone = line["extra"]["alone_s"]
    assert set(alone) == {"llm", "diffusion"}
    assert line["value"] > 0
    assert line["baseline"] == pytest.approx(max(alone.values()), rel=1.0), "the longer role is the ideal"


@pytest.mark.slow
def test_the_joint_stage_runs_online_and_from_the_cache(tmp_path: Path) -> None:
    line = measure(joint_cached.TABLE[0], tmp_path, quick=True, rounds=1)
    assert line["baseline"] > 1, "encoding takes time"
    assert all(line["extra"][name] > 0 for name in ("online_s", "cached_s", "train_s", "encode_s"))
    assert 0 < line["extra"]["frozen_share"] < 1


@pytest.mark.slow
def test_pre_training_runs_online_and_from_the_cache(tmp_path: Path) -> None:
    line = measure(spa3r_cached.TABLE[0], tmp_path, quick=True, rounds=1)
    assert line["baseline"] > 1, "encoding takes time"
    assert line["extra"]["frozen_share"] == pytest.approx(1 - 1 / line["baseline"], abs=1e-3)


def line_of(name: str, *, met: bool = True, quick: bool = False, unit: str = "ms") -> dict[str, object]:
    target = {"on": "ratio", "op": "<=", "limit": 1.2}
    value = 3 * 2**20 if unit == "B" else 1.234
    return {
        "name": name, "value": value, "baseline": 2.0, "unit": unit, "ratio": 0.617, "target": target, "met": met,
        "extra": {"quick": quick},
    }  # fmt: skip


def test_a_table_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "joint.jsonl"
    assert main(["joint", "--results", str(path)]) == 1
    assert "make bench NAME=joint" in capsys.readouterr().err
    lines = [line_of("matching_memory", unit="B"), line_of("bridge_1mb"), line_of("bridge_1mb", met=False)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["joint", "--results", str(path)]) == 0
    head, _, bridge, memory = capsys.readouterr().out.splitlines()
    assert head.startswith("| name | what |")
    assert "| 1.23 ms | 2 ms, gloo's send and receive of the same tensor | 0.62 | ratio ≤ 1.2, **missed** |" in bridge
    assert "| 3.0 MiB |" in memory


def test_figures_of_a_smoke_test_make_no_table() -> None:
    with pytest.raises(ValueError, match="--quick"):
        table([line_of("bridge_1mb", quick=True)], joint.ROWS)
