"""The benchmark harness, and every row of the feature store's table at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.bench import features_cache
from infra.bench.harness import Bench, Context, Measured, Target, interleave, main


def _bench(name: str, value: float, baseline: float, target: Target) -> Bench:
    def prepare(context: Context) -> Measured:
        assert context.folder.is_dir()
        return Measured(value=lambda: value, baseline=lambda: baseline, extra=lambda: {"size": context.size(7, 3)})

    return Bench(name=name, unit="MB/s", target=target, prepare=prepare)


def test_a_line_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [_bench("a", 3.0, 4.0, Target("ratio", ">=", 0.5)), _bench("b", 3.0, 0.0, Target("value", "<=", 2.0))]
    out = tmp_path / "lines"
    assert main(table, ["--out", str(out), "--rounds", "5"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [json.loads(line) for line in out.read_text().splitlines()]
    first, second = lines
    assert (first["name"], first["value"], first["baseline"], first["ratio"]) == ("a", 3.0, 4.0, 0.75)
    assert first["target"] == {"on": "ratio", "op": ">=", "limit": 0.5}
    assert first["samples"] == {"value": [3.0] * 5, "baseline": [4.0] * 5}
    assert (first["met"], first["extra"]["size"]) == (True, 7)
    assert (second["ratio"], second["met"]) == (None, False)


def test_only_and_quick(capsys: pytest.CaptureFixture[str]) -> None:
    table = [_bench(name, 1.0, 1.0, Target("ratio", ">=", 0.5)) for name in "ab"]
    main(table, ["--only", "b", "--quick"])
    (line,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (line["name"], line["extra"]["size"], line["extra"]["quick"]) == ("b", 3, True)
    with pytest.raises(SystemExit):
        main(table, ["--only", "c"])
    assert "there are: a, b" in capsys.readouterr().err


def test_the_sides_take_turns() -> None:
    calls: list[str] = []
    interleave(lambda: calls.append("v") or 1.0, lambda: calls.append("b") or 1.0, 4)  # type: ignore[func-returns-value]
    assert "".join(calls) == "vb" + "vb" + "bv" + "vb" + "bv"


def test_targets() -> None:
    assert Target("value", "<=", 10.0).met(10.0, None)
    assert not Target("ratio", ">=", 0.5).met(10.0, None)
    with pytest.raises(ValueError, match="allowed: ratio"):
        Target("median", ">=", 1.0)


def test_every_row_of_the_store_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(features_cache.TABLE, ["--quick", "--rounds", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == [bench.name for bench in features_cache.TABLE]
    assert all(line["value"] > 0 and line["baseline"] > 0 for line in lines)


def test_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    names, out = ("cache_get_12kb", "key_lookup_1e6"), tmp_path / "lines"
    arguments = [*(f"--only={name}" for name in names), "--quick", "--rounds", "1", "--out", str(out)]
    assert main(features_cache.TABLE, arguments, isolated="infra.bench.features") == 0
    assert [json.loads(line)["name"] for line in out.read_text().splitlines()] == list(names)
