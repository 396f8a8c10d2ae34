"""The ledger of broken samples of a run, and the limit on how many may break.

``quarantine.jsonl`` in the run folder has one JSON object a line: ``{"id", "step", "reason"}``. All ranks append to
the same file and read what the others wrote, so the limit is on the run and not on a rank.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from services.errors import DataError, QuarantineLimitError


class Ledger:
    """Records broken samples and ends the run when more than ``max_broken`` of ``total`` samples broke.

    A sample counts once, however often it comes. Lines of an earlier attempt of the same run count too.
    """

    def __init__(self, path: Path, *, max_broken: float, total: int) -> None:
        if total < 1:
            raise ValueError(f"a ledger needs the number of samples, got {total}")
        self.path = path
        self.max_broken = max_broken
        self.total = total
        self._ids: set[str] = set()
        self._offset = 0
        self._lock = threading.Lock()
        with self._lock:
            self._read_new_lines()

    @property
    def broken(self) -> frozenset[str]:
        """Ids of all broken samples known so far."""
        with self._lock:
            return frozenset(self._ids)

    def add(self, reasons: Mapping[str, str], step: int) -> None:
        """Record samples that turned out broken in ``step``. QuarantineLimitError over the limit."""
        with self._lock:
            self._read_new_lines()
            new = {name: reason for name, reason in reasons.items() if name not in self._ids}
            if new:
                self._append(
                    "".join(json.dumps({"id": i, "step": step, "reason": reason}) + "\n" for i, reason in new.items())
                )
                self._read_new_lines()
                self._ids.update(new)
            self._check(next(iter(new.values()), ""))

    def _check(self, example: str) -> None:
        share = len(self._ids) / self.total
        if share > self.max_broken:
            raise QuarantineLimitError(
                f"{len(self._ids)} of {self.total} samples are broken ({share:.2%}), data.max_broken allows "
                f"{self.max_broken:.2%}"
                + (f"; the last one: {example}" if example else "")
                + f". All are listed in {self.path}: repair the data, leave them out with "
                f"data.quarantine={self.path}, or raise data.max_broken"
            )

    def _append(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size > self._offset:
            # What a killed process left of its last line must not swallow ours.
            text = "\n" + text
        # One write on a file opened for appending: lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def _read_new_lines(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        # A last line without its end is still being written, or is what a killed process left behind.
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                self._ids.add(entry["id"])


def read_quarantine(path: str | Path) -> frozenset[str]:
    """Ids to leave out, from a file with one a line: plain text, or JSON objects with an ``id`` as in a ledger.

    Empty lines and lines that start with ``#`` are skipped. An empty ``path`` gives the empty set. DataError names
    the file and the line that cannot be read.
    """
    if not str(path):
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} (data.quarantine) cannot be read: {error}; give a file with one id a line, or ''"
        ) from error
    ids = set()
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        ids.add(_id_of_object(line, path, number) if line.startswith("{") else line)
    return frozenset(ids)


def _id_of_object(line: str, path: str | Path, number: int) -> str:
    try:
        found = json.loads(line).get("id")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: no JSON object: {error.msg}; give one id a line") from error
    if not isinstance(found, str):
        raise DataError(f"{path}:{number}: the object has no 'id' that is a string, it has {line[:80]}")
    return found
