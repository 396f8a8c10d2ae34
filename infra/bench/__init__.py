"""Benchmarks. Each prints one JSON object a line; see harness.py."""

import os

# Threads of the loader, of the store and of torch share the cores. An OpenMP thread that spins while it waits for one
# that has no core makes a training step tens of times slower; it is told to sleep. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
