"""Spans as JSON lines: who did what, when, how many bytes. Any process may write; a run folder collects them.

A process calls :func:`configure` once with the run's ``events`` folder and its own name; after that
:func:`span` and :func:`emit` append to ``events/<who>.jsonl``. Without ``configure`` they cost a comparison.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_path: Path | None = None
_who = ""


def configure(folder: Path | None, who: str) -> None:
    """Send this process's events to ``folder/<who>.jsonl`` (None: nowhere)."""
    global _path, _who
    with _lock:
        _who = who
        _path = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _path = folder / f"{who}.jsonl"


def name() -> str:
    """What this process is called in the events; "" before :func:`configure`."""
    return _who


def emit(what: str, t0: float, t1: float, **fields: Any) -> None:
    """Record that ``what`` lasted from ``t0`` to ``t1`` (Unix seconds). Fields are JSON values.

    An event never ends a run: when the folder is gone or the disk is full, this says so once and records no more.
    """
    global _path
    if _path is None:
        return
    line = {"who": _who, "what": what, "t0": round(t0, 6), "t1": round(t1, 6), **fields}
    data = (json.dumps(line) + "\n").encode()
    with _lock:
        path = _path
        if path is None:
            return
        try:
            _append(path, data)
        except OSError as error:
            _path = None
            _log.warning("events of %s are no longer recorded: %s", _who, error)


def _append(path: Path, data: bytes) -> None:
    """One write call on a file opened for appending: lines of several processes do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


@contextmanager
def span(what: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """Time a block; what the block puts into the yielded dict is recorded with it."""
    t0 = time.time()
    try:
        yield fields
    finally:
        emit(what, t0, time.time(), **fields)


def read(folder: Path) -> list[dict[str, Any]]:
    """All events of a run in order of time. A torn last line (a killed process) is left out."""
    events: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return sorted(events, key=lambda event: (event["t0"], event["t1"]))
