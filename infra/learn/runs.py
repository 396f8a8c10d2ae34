"""Experiments of many runs: each in a process of its own, in the order of what they read, stopped and gone on with.

An experiment lists its :class:`Job` s and how each is called; :func:`carry_out` trains what is not trained yet and
collects what every run came to. What follows from the results is in :mod:`infra.learn.claims`.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.learn.claims import Claim, markdown

DONE = "learn.json"
"""In a run folder: how the run was called and how long it took, once it is over."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the experiment."""

    phase: str
    """What --phase chooses."""
    part: str
    """What it is among those of a seed: encoder, vae, vae-c, ..."""
    recipe: str
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the run folder and of the result."""
        return f"{self.part}-{self.seed}"

    def command(self, root: Path, *settings: str) -> list[str]:
        """Overrides of ``loom3d train``, each key once: ``settings``, of which the last word on a key counts."""
        given = [f"recipe={self.recipe}", f"storage.root={root}", f"name={self.name}", f"seed={self.seed}", *settings]
        return merged(given)


def merged(given: Sequence[str]) -> list[str]:
    """Overrides, each key once: the last word on it counts."""
    return [f"{key}={value}" for key, value in dict(text.split("=", 1) for text in given).items()]


def job(phase: str, part: str, recipe: str, seed: int, *overrides: str) -> Job:
    """A :class:`Job`."""
    return Job(phase=phase, part=part, recipe=recipe, seed=seed, overrides=overrides)


def finished(one: Job, root: Path, command: Sequence[str]) -> bool:
    """Whether a run is over. SystemExit when its folder holds the run of another call."""
    path = root / "runs" / one.name / DONE
    if not path.exists():
        return False
    if sorted(json.loads(path.read_text())["command"]) != sorted(command):
        raise SystemExit(f"{path.parent} was trained by another call than this one; give another --root, or remove it")
    return True


def ready(one: Job, waiting: Sequence[Job]) -> bool:
    """Whether no run is waiting, or under way, whose weights ``one`` reads."""
    return not any(f"run:{other.name}/" in text for other in waiting for text in one.overrides)


def train(todo: Sequence[tuple[Job, Sequence[str]]], root: Path, *, parallel: int, end: float) -> Iterator[Job]:
    """Train and judge, ``parallel`` runs at a time and each from its newest checkpoint; yields those that are over.

    A run starts when those are over whose weights it reads. At the time ``end`` (of the monotonic clock) what is
    under way is stopped. SystemExit with the status of a run that fails.
    """
    waiting = list(todo)
    running: dict[subprocess.Popen[bytes], tuple[Job, Sequence[str], float]] = {}
    try:
        while waiting or running:
            pending = [one for one, _ in waiting] + [one for one, *_ in running.values()]
            for one, command in list(waiting):
                if len(running) < parallel and ready(one, pending):
                    waiting.remove((one, command))
                    print(f"== {one.name}: {one.recipe}", file=sys.stderr, flush=True)
                    process = subprocess.Popen([sys.executable, "-m", "actors", "train", *command])
                    running[process] = (one, command, time.monotonic())
            for process, (one, command, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[process]
                if process.returncode:
                    raise SystemExit(process.returncode)
                called = {"command": list(command), "seconds": round(time.monotonic() - began, 1)}
                (root / "runs" / one.name / DONE).write_text(json.dumps(called, indent=1))
                yield one
            if time.monotonic() > end:
                return
            time.sleep(0.2)
    finally:
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # started with the signal ignored, as a shell does behind "&"
                process.kill()
                process.wait()


def collect(one: Job, root: Path, out: Path) -> None:
    """Copy what a run came to and how it was called into ``<out>/<name>.json``; paths of this machine are left out."""
    folder = root / "runs" / one.name
    called = json.loads((folder / DONE).read_text())
    tables = json.loads((folder / "tables.json").read_text()) if (folder / "tables.json").exists() else []
    evaluation = json.loads((folder / "evaluation.json").read_text())
    result = {
        "name": one.name,
        "recipe": one.recipe,
        "seed": one.seed,
        "overrides": [text for text in called["command"] if "=/" not in text],
        "seconds": called["seconds"],
        **evaluation,
        "tables": [table for table in tables if not table["title"].startswith("Questions")],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{one.name}.json").write_text(json.dumps(result, indent=1) + "\n")


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> result, of all that are there."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*-[0-9]*.json"))]
    return {result["name"]: result for result in found}


def arguments(
    doc: str | None, name: str, results: Path, phases: Sequence[str], *, budget: float
) -> argparse.ArgumentParser:
    """The options that all experiments have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=f"~/loom3d/learn-{name}", help="storage.root of these runs")
    parser.add_argument("--phase", action="append", choices=tuple(phases), default=[], help="only these phases")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only these runs")
    parser.add_argument(
        "--budget", type=float, default=budget, help="minutes after which it stops; call again to go on"
    )
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run at all?")
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--table", action="store_true", help="print the claims from the results that are there")
    return parser


def check(args: argparse.Namespace, results: Path) -> Path:
    """The root of the runs. SystemExit for a quick call that would write where figures lie."""
    if args.quick and args.out == results:
        raise SystemExit("--quick makes no figures: give it a folder of its own with --out")
    return Path(args.root).expanduser().absolute()


def chosen(args: argparse.Namespace, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that --phase and --only leave. SystemExit for a name that there is not."""
    names = [one.name for one in jobs]
    if unknown := [name for name in args.only if name not in names]:
        raise SystemExit(f"--only {unknown[0]}: no such run; there are: {', '.join(names)}")
    return [
        one for one in jobs if (not args.phase or one.phase in args.phase) and (not args.only or one.name in args.only)
    ]


def carry_out(args: argparse.Namespace, root: Path, commands: Mapping[Job, Sequence[str]]) -> None:
    """Train what is not trained yet and collect everything, within the budget."""
    end = time.monotonic() + 60 * args.budget
    done = [one for one, command in commands.items() if finished(one, root, command)]
    for one in done:
        collect(one, root, args.out)
    todo = [(one, command) for one, command in commands.items() if one not in done]
    for number, one in enumerate(train(todo, root, parallel=args.parallel, end=end), start=1):
        collect(one, root, args.out)
        print(f"== {one.name} is over, {len(todo) - number} left", file=sys.stderr, flush=True)
        done.append(one)
    if len(done) < len(commands):
        print(f"{args.budget:g} minutes are over; the same call goes on", file=sys.stderr)


def conclude(args: argparse.Namespace, name: str, made: Sequence[Claim]) -> int:
    """Write and print the claims; 1 where there is nothing to say."""
    if not made:
        print(f"{args.out} holds no results; run `make learn NAME={name}` first", file=sys.stderr)
        return 1
    if not args.table:
        (args.out / "claims.json").write_text(json.dumps(list(made), indent=1) + "\n")
    print(markdown(made))
    return 0
