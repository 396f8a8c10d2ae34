"""Records that turned out bad: one line each in ``quarantine.jsonl``, for all processes and for people.

A quarantined record is a miss for everybody from then on; compaction leaves it out.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)

WHOLE_SHARD = -1
"""Row that stands for all records of a shard (truncated, torn commit record)."""


class Quarantine:
    """The quarantine list of one namespace. ``bad`` is a set of (shard, row)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "quarantine.jsonl"
        self.bad: set[tuple[str, int]] = set()
        self._read = 0

    def refresh(self) -> bool:
        """Take in what other processes appended; True when there was something new."""
        try:
            size = self.path.stat().st_size
            if size <= self._read:
                return False
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return False
        before = len(self.bad)
        whole = data[: data.rfind(b"\n") + 1]  # a line that is just being written is read next time
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                item = json.loads(line)
                self.bad.add((str(item["shard"]), int(item["row"])))
            except (ValueError, KeyError, TypeError):
                continue
        return len(self.bad) > before

    def add(self, shard: str, row: int, key: str, reason: str) -> None:
        """Quarantine a record, here at once and for other processes by the file.

        A folder that cannot be written does not stop the caller: the record stays a miss in this process.
        """
        self.bad.add((shard, row))
        log.warning("a bad cached record became a miss: %s", reason)
        line = {"shard": shard, "row": row, "key": key, "reason": reason, "time": round(time.time(), 3)}
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                # One write on a file opened for appending: lines of several processes do not mix.
                os.write(descriptor, (json.dumps(line) + "\n").encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.path, error)

    def __contains__(self, place: tuple[str, int]) -> bool:
        return place in self.bad or (place[0], WHOLE_SHARD) in self.bad

    def __len__(self) -> int:
        return len(self.bad)
