"""Log records of a run: worker processes write theirs as events, the driver shows them on its terminal.

What Ray and its workers print stays in Ray's session logs (``loom3d --debug`` shows it). What *our* code says in a
worker, such as a broken sample or a skipped step, must not be lost among it: :func:`record` makes such a record an
event of the run, and :func:`relayed` lets the driver show it.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from services.telemetry import events

RUN = "loom3d"
"""Logger of a run's story; its records are shown from INFO on, those of others from WARNING on."""

OURS = (RUN, "actors", "configs", "models", "services")
"""First parts of the names of our loggers."""

EVENT = "log"
_RELAY = f"{RUN}.relay"
_CLEAR = "\r\033[K"


class EventHandler(logging.Handler):
    """Makes every record of our loggers an event of this process. Records of libraries are left to other handlers."""

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        if record.name.partition(".")[0] in OURS and record.name != _RELAY:
            events.emit(EVENT, record.created, record.created, level=record.levelname, text=self.format(record))


class TerminalHandler(logging.Handler):
    """Shows records on standard error, above the progress line if there is one."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        stream = self._stream if self._stream is not None else sys.stderr
        label = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        # The progress line is drawn anew by its next update.
        stream.write(f"{_CLEAR if stream.isatty() else ''}{label}{self.format(record)}\n")
        stream.flush()


def record(folder: Path, who: str) -> None:
    """Send this process's events, and what our loggers say in it, to ``folder/<who>.jsonl``."""
    events.configure(folder, who)
    root, run = logging.getLogger(), logging.getLogger(RUN)
    if not root.handlers:
        root.addHandler(logging.StreamHandler())  # a worker's standard error: Ray's session logs
    if not any(isinstance(handler, EventHandler) for handler in root.handlers):
        root.addHandler(EventHandler())
    if run.level == logging.NOTSET:
        run.setLevel(logging.INFO)


@contextmanager
def terminal(*, debug: bool = False, stream: TextIO | None = None) -> Iterator[None]:
    """Show log records on ``stream`` (default: standard error) for a block; with ``debug``, those of DEBUG too."""
    root, run = logging.getLogger(), logging.getLogger(RUN)
    before, handler = run.level, TerminalHandler(stream)
    if debug:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    run.setLevel(logging.DEBUG if debug else logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        run.setLevel(before)


def debugging() -> bool:
    """Whether everything is to be shown (``loom3d VERB --debug``)."""
    return logging.getLogger(RUN).isEnabledFor(logging.DEBUG)


@contextmanager
def relayed(folder: Path, *, period_s: float = 0.5) -> Iterator[None]:
    """Log, in this process, what other processes record below ``folder`` while the block runs."""
    relay, stop = _Relay(folder), threading.Event()

    def work() -> None:
        while not stop.wait(period_s):
            relay.pump()
        relay.pump()

    thread = threading.Thread(target=work, name="log-relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


class _Relay:
    """Reads the files of events from where they ended when it was made; this process's own records are no news."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._began = folder, time.time()
        self._offsets = {path: path.stat().st_size for path in folder.glob("*.jsonl")}
        self._log = logging.getLogger(_RELAY)

    def pump(self) -> None:
        for path in sorted(self._folder.glob("*.jsonl")):
            if path.stem == events.name():
                continue
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for line in whole.splitlines():
                if f'"{EVENT}"'.encode() in line:
                    self._show(json.loads(line))

    def _show(self, event: dict[str, Any]) -> None:
        if event.get("what") == EVENT:
            level = logging.getLevelNamesMapping().get(str(event.get("level")), logging.WARNING)
            self._log.log(level, "[%s] %s", event.get("who"), event.get("text"))
