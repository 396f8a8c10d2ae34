"""``make bench NAME=joint``: joint training, the bridge between roles, and UniUGG's networks; collected here."""

from __future__ import annotations

import sys
from importlib import import_module

from infra.bench.harness import Bench, main

#: Each has a ``TABLE`` of benchmarks.
GROUPS = ("joint_step", "joint_bridge", "joint_cached", "joint_models")


def table() -> list[Bench]:
    """All benchmarks of the groups, in order."""
    return [bench for group in GROUPS for bench in import_module(f"infra.bench.{group}").TABLE]


if __name__ == "__main__":
    sys.exit(main(table(), isolated="infra.bench.joint"))
