"""The progress line of a run: step, losses, samples/s, share of time spent waiting for data, hit rate, ETA.

On a terminal it is one line that is drawn anew; elsewhere (a job log) a plain line now and then. In a run that
trains in worker processes the driver follows ``metrics.jsonl`` (:func:`follow`), since workers have no terminal.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from configs.schema import LoggerConfig
from services.telemetry.loggers import METRICS_FILE

PLAIN_EVERY_S = 5.0
_CLEAR = "\r\033[K"


class Counter(Protocol):
    """Called with how far something is: counts done and in all, or the name of what is done, or both."""

    def __call__(self, *state: Any) -> None: ...  # noqa: D102


@contextmanager
def counting(what: str, mode: str = "auto", *, stream: TextIO | None = None) -> Iterator[Counter]:
    """A line of counts, in the modes of ``logger.progress``: drawn anew on a terminal, now and then elsewhere.

    ``what`` names the work where the calls of the counter do not.
    """
    out = stream if stream is not None else sys.stderr
    drawn = mode == "auto" and out.isatty()
    last = time.monotonic()

    def show(*state: Any) -> None:
        nonlocal last
        counts = "/".join(str(part) for part in state if isinstance(part, int))
        names = " ".join(str(part) for part in state if isinstance(part, str))
        text = " ".join(part for part in (what, names, counts) if part)
        if drawn:
            out.write(_CLEAR + text)
            out.flush()
        elif mode != "off" and time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            out.write(text + "\n")
            out.flush()

    yield show
    if drawn:
        out.write(_CLEAR)
        out.flush()


class Progress:
    """Draws ``fields`` of the newest step; ``close`` leaves the last line standing."""

    def __init__(self, total_steps: int, config: LoggerConfig, *, stream: TextIO | None = None) -> None:
        self.total = total_steps
        self._stream = stream if stream is not None else sys.stderr
        self._mode = config.progress
        if self._mode == "auto":
            self._mode = "line" if self._stream.isatty() else "plain"
        self._first: tuple[int, float] | None = None
        self._last_plain = 0.0
        self._drawn = False

    def update(self, step: int, **fields: Any) -> None:
        """Show that ``step`` steps are done. Known fields: loss, samples_per_s, wait_share, hit_rate; others as is."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if self._mode == "off":
            return
        text = self._text(step, now, fields)
        if self._mode == "line":
            self._stream.write(_CLEAR + text)
            self._drawn = True
            self._stream.flush()
        elif now - self._last_plain >= PLAIN_EVERY_S or step >= self.total:
            self._last_plain = now
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """End the line."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()

    def _text(self, step: int, now: float, fields: dict[str, Any]) -> str:
        parts = [f"step {step}/{self.total}"]
        for name, value in fields.items():
            if name in ("wait_share", "hit_rate"):
                label = "wait" if name == "wait_share" else "hits"
                parts.append(f"{label} {100 * float(value):.0f}%")
            elif name == "samples_per_s":
                parts.append(f"{float(value):.0f} samples/s")
            elif isinstance(value, float):
                parts.append(f"{name} {value:.4g}")
            else:
                parts.append(f"{name} {value}")
        first_step, first_time = self._first or (step, now)
        if step > first_step:
            left = (self.total - step) * (now - first_time) / (step - first_step)
            parts.append(f"ETA {int(left) // 60}:{int(left) % 60:02d}")
        return "  ".join(parts)


def follow(
    folder: Path,
    progress: Progress,
    stop: threading.Event,
    *,
    start_at: int = 0,
    period_s: float = 0.5,
    roles: Sequence[str] = (),
) -> None:
    """Feed ``progress`` from the training lines that workers append to ``folder/metrics.jsonl`` until ``stop``.

    ``start_at`` is the size of the file before this run, so that a resumed run does not replay the old lines. Of
    several ``roles``, a step is shown once all of them have logged it, as one line.
    """
    path = folder / METRICS_FILE
    offset, rest = start_at, ""
    show = _Steps(progress, roles)
    while True:
        done = stop.wait(period_s)
        if path.exists():
            with path.open("r", encoding="utf-8") as file:
                if path.stat().st_size < offset:  # lines were taken out, by a run that resumes
                    offset, rest = path.stat().st_size, ""
                file.seek(offset)
                rest += file.read()
                offset = file.tell()
            *lines, rest = rest.split("\n")
            for line in lines:
                with suppress(json.JSONDecodeError):
                    show(json.loads(line))
        if done:
            progress.close()
            return


class _Steps:
    """Makes one update of the lines of a step."""

    def __init__(self, progress: Progress, roles: Sequence[str]) -> None:
        self._progress, self._roles = progress, roles if len(roles) > 1 else ()
        self._lines: dict[int, dict[str, Mapping[str, Any]]] = {}

    def __call__(self, row: Mapping[str, Any]) -> None:
        if row.get("split") != "train" or "loss" not in row:
            return
        step = int(row["step"])
        if not self._roles:
            self._progress.update(step, **_fields(row))
            return
        lines = self._lines.setdefault(step, {})
        lines[str(row.get("role"))] = row
        if all(role in lines for role in self._roles):
            self._lines = {}
            self._progress.update(step, **_of_roles({role: _fields(lines[role]) for role in self._roles}))


def _fields(row: Mapping[str, Any]) -> dict[str, float]:
    shown = ("loss", "samples_per_s", "wait_share", "hit_rate")
    return {name: row[name] for name in shown if row.get(name) is not None}


def _of_roles(lines: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One line for all: the sum of the losses and each role's, and of the other numbers the one that matters.

    Roles take the same steps, so that the one that sees most samples says how fast all are, and the one that waits
    longest how long.
    """
    fields = {"loss": sum(line["loss"] for line in lines.values())} if all("loss" in s for s in lines.values()) else {}
    fields |= {role: line["loss"] for role, line in lines.items() if "loss" in line}
    for name, choose in (("samples_per_s", max), ("wait_share", max), ("hit_rate", min)):
        values = [line[name] for line in lines.values() if name in line]
        if values:
            fields[name] = choose(values)
    return fields
