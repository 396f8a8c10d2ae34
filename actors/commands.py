"""What each verb of the command line does. Everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from configs import RunConfig


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
