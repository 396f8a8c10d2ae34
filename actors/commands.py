"""What each verb of the command line does. Everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs import ConfigError, RunConfig
from services.telemetry.progress import counting


def configure(args: argparse.Namespace) -> RunConfig:
    """The configuration that ``--config`` and the overrides of a command describe. Raises ConfigError."""
    import configs

    return configs.load(args.overrides, file=args.config)


def train(args: argparse.Namespace) -> int:
    """Train, evaluate, report."""
    config = configure(args)
    from actors import driver

    result = driver.train(config)
    _print_metrics(result.metrics)
    print(f"run      {result.folder}")
    print(f"report   {result.report}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Judge a finished run again."""
    from actors.evaluate import evaluate_run

    report, evaluation = evaluate_run(args.run, args.overrides, file=args.config, split=args.split)
    _print_metrics(evaluation["metrics"])
    print(f"judged   {evaluation['samples']} samples of the {evaluation['split']} split")
    print(f"report   {report}")
    return 0


def _print_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    from actors.report.units import with_unit

    metrics = {with_unit(name): metric for name, metric in metrics.items()}
    width = max((len(name) for name in metrics), default=0) + 2
    for name, metric in metrics.items():
        named = {} if metric["baseline"] is None else {metric["baseline_name"]: metric["baseline"]}
        beside = "; ".join(f"{what} {value:.4g}" for what, value in {**named, **metric.get("also", {})}.items())
        print(f"{name:<{width}}{metric['value']:>10.4g}   {beside}".rstrip())


def plan(args: argparse.Namespace) -> int:
    """Print what a run needs; status 1 when it does not fit."""
    config = configure(args)
    from actors import preflight

    rates = Path(args.rates) if args.rates else None
    result = preflight.plan(config, rates=rates, address=args.address or "", compare=args.strategies)
    print(json.dumps(result.as_dict(), indent=2) if args.json else preflight.render(result))
    return 0 if result.fits else 1


def generate(args: argparse.Namespace) -> int:
    """Imagine views; status 1 when none of them shows anything."""
    from actors import generate as verb

    made = verb.run(args)
    for view in made.metadata["views"]:
        print(
            f"view {view['files']}: turned {view['angle_degrees']:.1f} degrees, moved {view['distance_metres']:.2f} m, "
            f"covered {verb.share(view['coverage'])}; the reference's points cover {verb.share(view['overlap'])}"
        )
    for remark in made.remarks:
        print(f"note: {remark}")
    print(f"page     {made.folder / verb.PAGE}")
    return 1 if made.sees_nothing else 0


def ask(args: argparse.Namespace) -> int:
    """Answer questions about pictures, frames or imagined views."""
    from actors import ask as verb

    path, asked = verb.run(args)
    if args.json:
        print(json.dumps([part.as_dict() for part in asked], indent=2))
        return 0
    for part in asked:
        print(f"about {', '.join(part.views)}")
        for found in part.answers:
            print(f"  Q  {found.question}\n  A  {found.answer}")
        for remark in part.remarks:
            print(f"note: {remark}")
        if part.features is not None:
            print(f"features {part.features.cached} from the cache, {part.features.computed} computed")
    print(f"answers  {path}")
    return 0


def show_field(args: argparse.Namespace) -> int:
    """Draw predicted features beside those that are there."""
    from actors import show_field as verb

    made = verb.run(args)
    for target, cosine in made.cosines.items():
        print(f"{target:<6}cosine {cosine:.3f} at unseen views of the sets that were read")
    print(f"{made.pictures} pictures, listed in {made.folder}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a run in the layouts of other libraries."""
    from actors import export as verb

    made = verb.run(args)
    for folder, what in made.contents.items():
        print(f"{folder:<20}{what}")
    for folder, proof in made.proofs.items():
        print(f"updates of {folder}: {proof}")
    print(f"card     {made.folder / 'README.md'}")
    return 0


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

        with counting("making rooms", config.logger.progress) as show:
            folder = make_rooms(config.data.rooms, Path(args.out).expanduser().absolute(), show)
    else:
        from services.data.sources import ensure_rooms

        with counting("making rooms", config.logger.progress) as show:
            folder = ensure_rooms(config.data.rooms, config.storage, show)
    print(f"{config.data.rooms.scenes} rooms of {config.data.rooms.views} views in {folder}")
    return 0


def data_index(args: argparse.Namespace) -> int:
    """Read every source of the configuration and write its manifest."""
    config = configure(args)
    from services.data.sources import run_index

    with counting("", config.logger.progress) as show:
        reports = run_index(config, show)
    for report in reports:
        print("\n".join(report.lines()))
    return 0


def data_check(args: argparse.Namespace) -> int:
    """Look for faults in every source; status 1 when there are some."""
    config = configure(args)
    from services.data.checks import run_check

    out = Path(args.out).expanduser() if args.out else Path(config.storage.root) / "checks"
    sets: dict[str, Path] = {}
    for text in args.against:
        name, _, file = text.partition("=")
        if not name or not file:
            raise ConfigError(f"--against {text}: write NAME=FILE, a text file with one scene id a line")
        sets[name] = Path(file).expanduser()
    with counting("checking", config.logger.progress) as show:
        reports = run_check(config, out, sets, show)
    for report in reports:
        print("\n".join(report.lines()))
        print(f"  report {out / report.source / 'report.html'}")
        if report.findings:
            print(f"  leave them out with data.quarantine={out / report.source / 'quarantine.txt'}")
    return 1 if any(report.findings for report in reports) else 0


def data_pairs(args: argparse.Namespace) -> int:
    """Make the co-visibility index of every source, and a page about it; status 1 when a source has no pairs."""
    config = configure(args)
    from services.data.pairs_report import run_pairs

    out = Path(args.out).expanduser() if args.out else Path(config.storage.root) / "pairs"
    with counting("", config.logger.progress) as show:
        lines, empty = run_pairs(config, out, show)
    print("\n".join(lines))
    return 1 if empty else 0


def data_questions(args: argparse.Namespace) -> int:
    """Write questions, referring expressions and captions about every scene with instances."""
    config = configure(args)
    from services.data.questions import run_questions

    out = Path(args.out).expanduser() if args.out else Path(config.storage.root) / "questions"
    with counting("questions about", config.logger.progress) as show:
        lines = run_questions(config, out, show)
    print("\n".join(lines))
    return 0


def data_show(args: argparse.Namespace) -> int:
    """Draw one scene: cameras from above, pictures, depth, masks, points."""
    config = configure(args)
    from services.data.show import run_show

    name = args.scene.replace("/", "-")
    out = Path(args.out).expanduser() if args.out else Path(config.storage.root) / "show" / name
    print(run_show(config, args.scene, out))
    return 0


@contextmanager
def open_cache(config: RunConfig) -> Iterator[Any]:
    """The feature store of the configuration. ConfigError when it says that nothing is stored."""
    from contextlib import closing

    from services.features.sink import open_store

    store = open_store(config)
    if store is None:
        raise ConfigError("cache.mode=never stores nothing; choose cache=local, or another option of the group cache")
    with closing(store):
        yield store


def features_warm(args: argparse.Namespace) -> int:
    """Encode what is not stored yet; status 1 when inputs could not be encoded."""
    config = configure(args)
    from services.data.sources import open_sources
    from services.features.maintain import chosen_encoders, warm

    manifests = open_sources(config)
    if args.source and args.source not in manifests:
        raise ConfigError(f"--source {args.source}: no such source; there are {', '.join(manifests)}")
    broken = 0
    with open_cache(config) as store:
        for encoder in chosen_encoders(config, args.encoder):
            for name in [args.source] if args.source else list(manifests):
                with counting(f"encoding {name} ({encoder})", config.logger.progress) as show:
                    found = warm(
                        config, store, name, manifests[name], encoder=encoder, splits=args.split, progress=show
                    )
                print(found)
                broken += len(found.broken)
    return 1 if broken else 0


def features_stats(args: argparse.Namespace) -> int:
    """Print what the cache holds."""
    config = configure(args)
    from services.features.maintain import stats

    with open_cache(config) as store:
        print(stats(config, store))
    return 0


def features_verify(args: argparse.Namespace) -> int:
    """Encode a sample again and compare; status 1 when it drifted or nothing could be checked."""
    config = configure(args)
    from services.features.maintain import chosen_encoders, verify

    sound = True
    with open_cache(config) as store:
        for encoder in chosen_encoders(config, args.encoder):
            found = verify(config, store, encoder=encoder, sample=args.sample, tolerance=args.tolerance)
            print(found)
            sound &= found.ok
    return 0 if sound else 1


def features_why(args: argparse.Namespace) -> int:
    """Say which part of the key or fingerprint of a sample differs from what is stored; status 1 when it is absent."""
    config = configure(args)
    from services.data.sources import open_sources
    from services.features.maintain import chosen_encoders
    from services.features.why import why

    stored, manifests = True, open_sources(config)
    with open_cache(config) as store:
        for encoder in chosen_encoders(config, args.encoder):
            found = why(config, store, manifests, args.sample, encoder=encoder)
            print(found)
            stored &= found.stored
    return 0 if stored else 1


def features_gc(args: argparse.Namespace) -> int:
    """Remove features that are not kept, oldest first."""
    config = configure(args)
    from services.features.maintain import gc

    if not args.keep and args.budget is None:
        raise ConfigError("features gc removes nothing by itself: give --keep NAME, --budget BYTES, or both")
    with open_cache(config) as store:
        print(gc(config, store, keep=args.keep or None, budget=args.budget))
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the report of a run folder again."""
    from actors.report import write_report

    against = Path(args.against).expanduser().absolute() if args.against else None
    print(write_report(Path(args.run).expanduser().absolute(), against))
    return 0
