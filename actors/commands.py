"""What each verb of the command line does. Everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from configs import ConfigError, RunConfig


class Progress(Protocol):
    """Called with how far something is: counts done and in all, or the name of what is done, or both."""

    def __call__(self, *state: Any) -> None: ...  # noqa: D102


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A line on the terminal that is rewritten; nothing where standard error is no terminal."""
    shown = sys.stderr.isatty()

    def show(*state: Any) -> None:
        if shown:
            counts = "/".join(str(part) for part in state if isinstance(part, int))
            names = " ".join(str(part) for part in state if isinstance(part, str))
            print(f"\r\033[K{what} {counts} {names}", end="", file=sys.stderr, flush=True)

    yield show
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def local_root(config: RunConfig, what: str) -> Path:
    """``storage.root`` as a folder of this machine. ConfigError when it is a URI and ``what`` cannot go there."""
    from configs.paths import is_uri

    if is_uri(config.storage.root):
        raise ConfigError(f"storage.root={config.storage.root}: {what} need a local folder; give --out FOLDER")
    return Path(config.storage.root)


def configure(args: argparse.Namespace) -> RunConfig:
    """The configuration that ``--config`` and the overrides of a command describe. Raises ConfigError."""
    import configs

    return configs.load(args.overrides, file=args.config)


def train(args: argparse.Namespace) -> int:
    """Train, evaluate, report."""
    config = configure(args)
    from actors import driver

    result = driver.train(config)
    print(f"run      {result.folder}")
    print(f"report   {result.report}")
    return 0


def plan(args: argparse.Namespace) -> int:
    """Print what a run needs; status 1 when it does not fit."""
    config = configure(args)
    from actors import preflight

    result = preflight.plan(config, rates=Path(args.rates) if args.rates else None, address=args.address or "")
    print(json.dumps(result.as_dict(), indent=2) if args.json else preflight.render(result))
    return 0 if result.fits else 1


def config_show(args: argparse.Namespace) -> int:
    """Print the composed configuration."""
    import configs

    print(configs.to_yaml(configure(args)), end="")
    return 0


def config_keys(args: argparse.Namespace) -> int:
    """Print the documented keys."""
    from configs.keys import documented_keys

    for key in documented_keys():
        if args.pattern in key.path:
            print(f"{key.path}: {key.type} = {json.dumps(key.default)}\n    {key.comment}")
    return 0


def models(args: argparse.Namespace) -> int:
    """List the models of the registry with their roles and sizes."""
    import torch

    from models.registry import build, list_models, spec

    names = list_models(args.pattern)
    if not names:
        print(f"no model matches {args.pattern!r}; there are {', '.join(list_models())}")
        return 1
    for name in names:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build(name).parameters())
        found = spec(name)
        roles = ", ".join(role.name for role in found.roles)
        print(f"{name:<24}{parameters / 1e6:>10.3f} M parameters   roles: {roles}   {found.doc}")
    return 0


def data_make(args: argparse.Namespace) -> int:
    """Make the procedural rooms of the configuration where they are not there yet."""
    config = configure(args)
    if args.out:
        from services.data.rooms import make_rooms

        with progress("room") as show:
            folder = make_rooms(config.data.rooms, Path(args.out).expanduser().absolute(), show)
    else:
        from services.data.sources import ensure_rooms

        local_root(config, "rooms")
        with progress("room") as show:
            folder = ensure_rooms(config.data.rooms, config.storage, show)
    print(f"{config.data.rooms.scenes} rooms of {config.data.rooms.views} views in {folder}")
    return 0


def data_index(args: argparse.Namespace) -> int:
    """Read every source of the configuration and write its manifest."""
    config = configure(args)
    from services.data.sources import run_index

    with progress("entry") as show:
        reports = run_index(config, show)
    for report in reports:
        print("\n".join(report.lines()))
    return 0


def data_check(args: argparse.Namespace) -> int:
    """Look for faults in every source; status 1 when there are some."""
    config = configure(args)
    from services.data.checks import run_check

    out = Path(args.out).expanduser() if args.out else local_root(config, "reports of checks") / "checks"
    sets: dict[str, Path] = {}
    for text in args.against:
        name, _, file = text.partition("=")
        if not name or not file:
            raise ConfigError(f"--against {text}: write NAME=FILE, a text file with one scene id a line")
        sets[name] = Path(file).expanduser()
    with progress("scene") as show:
        reports = run_check(config, out, sets, show)
    for report in reports:
        print("\n".join(report.lines()))
        print(f"  report {out / report.source / 'report.html'}")
        if report.findings:
            print(f"  leave them out with data.quarantine={out / report.source / 'quarantine.txt'}")
    return 1 if any(report.findings for report in reports) else 0


def data_questions(args: argparse.Namespace) -> int:
    """Write questions, referring expressions and captions about every scene with instances."""
    config = configure(args)
    from services.data.questions import run_questions

    out = Path(args.out).expanduser() if args.out else local_root(config, "questions") / "questions"
    with progress("scene") as show:
        lines = run_questions(config, out, show)
    print("\n".join(lines))
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the report of a run folder again."""
    from actors.report import write_report

    print(write_report(Path(args.run).expanduser().absolute()))
    return 0
