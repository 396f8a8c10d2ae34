"""The form of every benchmark: a value and its baseline, measured in turns, one JSON object a line.

A benchmark module has a table of :class:`Bench` and calls :func:`main`. ``prepare`` makes the data once and
returns two functions that each give one sample; they are called in alternating order, at least five rounds, after
one warm-up each, so that a drift of the machine meets both sides. ``ratio`` is median over median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Sample = Callable[[], float]
ROUNDS = 5


@dataclass(frozen=True)
class Target:
    """What a figure should be: of the ratio or of the value itself."""

    on: str
    op: str
    limit: float

    def __post_init__(self) -> None:
        if self.on not in ("ratio", "value") or self.op not in (">=", "<="):
            raise ValueError(f"target on {self.on!r} with {self.op!r}; allowed: ratio|value, >=|<=")

    def met(self, value: float, ratio: float | None) -> bool:
        """Whether the figure reaches the target; a ratio that does not exist does not."""
        figure = value if self.on == "value" else ratio
        if figure is None:
            return False
        return figure >= self.limit if self.op == ">=" else figure <= self.limit


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What ``prepare`` returns: two functions that give a sample, and what else is worth printing."""

    value: Sample
    baseline: Sample
    extra: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class Context:
    """What ``prepare`` gets."""

    folder: Path
    """An empty folder of this benchmark alone; removed afterwards."""
    quick: bool
    """Tiny sizes: does it run at all?"""
    cleanup: ExitStack = field(default_factory=ExitStack)
    """For what must be closed when the benchmark is over."""

    def size(self, full: int, quick: int) -> int:
        """``full``, or ``quick`` with --quick."""
        return quick if self.quick else full


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One row of a table of benchmarks."""

    name: str
    unit: str
    target: Target
    prepare: Callable[[Context], Measured]
    rounds: int = ROUNDS


def measure(bench: Bench, folder: Path, *, quick: bool, rounds: int = 0) -> dict[str, Any]:
    """Run one benchmark; the JSON object of its line."""
    started = time.perf_counter()
    with ExitStack() as cleanup:
        measured = bench.prepare(Context(folder=folder, quick=quick, cleanup=cleanup))
        rounds = rounds or (2 if quick else bench.rounds)
        value, baseline = interleave(measured.value, measured.baseline, rounds)
        extra = measured.extra()
    extra |= {"quick": quick, "seconds": round(time.perf_counter() - started, 1)}
    return result(bench.name, bench.unit, value, baseline, bench.target, extra)


def interleave(value: Sample, baseline: Sample, rounds: int = ROUNDS) -> tuple[list[float], list[float]]:
    """Samples of both sides in turns, after one warm-up each; who begins alternates."""
    value()
    baseline()
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            samples[side].append((value, baseline)[side]())
    return samples


def result(
    name: str, unit: str, value: Sequence[float], baseline: Sequence[float], target: Target, extra: dict[str, Any]
) -> dict[str, Any]:
    """The JSON object of one benchmark from its samples."""
    middle, other = statistics.median(value), statistics.median(baseline)
    ratio = middle / other if other else None
    return {
        "name": name,
        "value": _short(middle),
        "unit": unit,
        "baseline": _short(other),
        "ratio": None if ratio is None else _short(ratio),
        "target": {"on": target.on, "op": target.op, "limit": target.limit},
        "met": target.met(middle, ratio),
        "samples": {"value": [_short(item) for item in value], "baseline": [_short(item) for item in baseline]},
        "extra": {**extra, "load": round(os.getloadavg()[0], 2)},
    }


def main(table: Sequence[Bench], argv: Sequence[str] | None = None, *, isolated: str = "") -> int:
    """Command line of a benchmark module: runs its table, or what --only names; returns the exit status.

    ``isolated`` names a module that runs the same table: each benchmark then has a process of its own, so that none
    inherits the threads, the memory or the Ray of the one before.
    """
    parser = argparse.ArgumentParser(description="Prints one JSON object a line.")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, no figures")
    parser.add_argument("--rounds", type=int, default=0, help=f"rounds of each benchmark (default {ROUNDS})")
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    parser.add_argument("--folder", type=Path, help="where to keep data while measuring (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    names = [bench.name for bench in table]
    if unknown := [name for name in arguments.only if name not in names]:
        parser.error(f"--only {unknown[0]}: no such benchmark; there are: {', '.join(names)}")
    chosen = [bench for bench in table if not arguments.only or bench.name in arguments.only]
    if isolated and len(chosen) > 1:
        return _each_alone(isolated, [bench.name for bench in chosen], sys.argv[1:] if argv is None else argv)
    for bench in chosen:
        with _scratch(arguments.folder) as folder:
            line = json.dumps(measure(bench, folder, quick=arguments.quick, rounds=arguments.rounds))
        print(line)
        sys.stdout.flush()
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(line + "\n")
    return 0


def _each_alone(module: str, names: Sequence[str], argv: Sequence[str]) -> int:
    """Run each of ``names`` in a process of its own with the other arguments; the largest exit status."""
    others: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--only":
            next(arguments)
        elif not argument.startswith("--only="):
            others.append(argument)
    commands = ([sys.executable, "-m", module, "--only", name, *others] for name in names)
    return max(subprocess.run(command, check=False).returncode for command in commands)


def rate(work: Callable[[], float]) -> Sample:
    """A sample in units a second: ``work`` does something and returns how many units it did."""

    def sample() -> float:
        start = time.perf_counter()
        units = work()
        return units / (time.perf_counter() - start)

    return sample


def cpu_us(work: Callable[[], int]) -> Sample:
    """A sample in microseconds of this process's CPU time for each of the things that ``work`` says it did."""

    def sample() -> float:
        start = time.process_time()
        count = work()
        return (time.process_time() - start) / count * 1e6

    return sample


@contextlib.contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _short(number: float) -> float:
    return float(f"{number:.5g}")
