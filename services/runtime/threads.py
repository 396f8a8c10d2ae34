"""How the threads of a process share its cores. Imports nothing: it has to be applied before torch is imported."""

from __future__ import annotations

import os

#: Threads of the loader, the store and torch share the cores. An OpenMP thread that spins while it waits for one that
#: has no core makes a training step tens of times slower; this tells it to sleep.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


def share_cores() -> None:
    """Make waiting threads sleep, unless the user has said otherwise. Call it before torch is first imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
