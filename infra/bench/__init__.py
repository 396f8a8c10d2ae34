"""Benchmarks. Each prints one JSON object a line; see harness.py."""

from services.runtime import threads

threads.share_cores()
