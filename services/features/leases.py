"""Leases: a live user of the store pins the fingerprints that it rereads.

A lease is a small file that its holder rewrites every third of its life. Whether it still counts is decided
without trusting the clock where possible: on the machine of the holder by whether that very process still lives,
elsewhere by the age of the last renewal, where an age in the future beyond the lease's life counts as expired.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import xxhash

from services.features.commits import write_durable

log = logging.getLogger(__name__)

LEASE_S = 120.0


@cache
def machine() -> str:
    """8 digits that are equal for processes that can see each other's process ids, and change at a reboot."""
    parts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        with contextlib.suppress(OSError):
            parts.append(Path(path).read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    parts.append(os.uname().nodename)
    return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())[:8]


def process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, or None when there is none: ids are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name may hold spaces and brackets; the state (Z: dead, not yet collected) follows the last one.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else fields[19]


def owner_tag() -> str:
    """``<machine>-<pid>-<start>`` of this process, for names of temporary files."""
    return f"{machine()}-{os.getpid()}-{process_start(os.getpid())}"


def owner_alive(tag: str) -> bool | None:
    """Whether the process of a tag lives; None when this machine cannot know."""
    parts = tag.split("-")
    if len(parts) != 3 or parts[0] != machine() or not parts[1].isdigit():
        return None
    return process_start(int(parts[1])) == parts[2]


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """What a lease file says."""

    fingerprints: frozenset[str]
    owner: str
    renewed: float
    lasts_s: float

    def live(self, now: float) -> bool:
        """Whether the lease still pins at Unix time ``now``."""
        alive = owner_alive(self.owner)
        return abs(now - self.renewed) <= self.lasts_s if alive is None else alive


class Lease:
    """A held lease; renewed by a daemon thread until :meth:`release`. A context manager."""

    def __init__(self, root: Path, fingerprints: Iterable[str], lasts_s: float = LEASE_S) -> None:
        self.fingerprints = frozenset(fingerprints)
        self._folder = root / "leases"
        self._lasts_s = lasts_s
        self._path = self._folder / f"{uuid.uuid4().hex}.json"
        self._stop = threading.Event()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._renew, name="loom3d-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing and remove the file. Safe to call twice; does nothing in a forked child."""
        if os.getpid() != self._process:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _renew(self) -> None:
        failing = False
        while not self._stop.wait(self._lasts_s / 3):
            try:
                self._write()
                failing = False
            except OSError as error:
                # On this machine the living process pins all the same; elsewhere the lease may lapse.
                if not failing:
                    log.warning("the lease %s was not renewed: %s", self._path, error)
                failing = True

    def _write(self) -> None:
        line = {
            "fingerprints": sorted(self.fingerprints),
            "owner": owner_tag(),
            "renewed": time.time(),
            "lasts_s": self._lasts_s,
        }
        write_durable(self._path, json.dumps(line).encode(), self._path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp"))


def read_leases(root: Path) -> dict[Path, LeaseRecord]:
    """All lease files that can be read; a torn or foreign one is left out (and swept with the expired)."""
    leases = {}
    for path in (root / "leases").glob("*.json"):
        try:
            line = json.loads(path.read_text())
            leases[path] = LeaseRecord(
                frozenset(line["fingerprints"]), str(line["owner"]), float(line["renewed"]), float(line["lasts_s"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return leases


def pinned(root: Path, now: float | None = None) -> frozenset[str]:
    """Fingerprints that a live lease pins. Files of expired leases are removed on the way."""
    now = time.time() if now is None else now
    result: set[str] = set()
    for path, lease in read_leases(root).items():
        if lease.live(now):
            result |= lease.fingerprints
        elif owner_alive(lease.owner) is False or abs(now - lease.renewed) > 10 * lease.lasts_s:
            with contextlib.suppress(OSError):
                path.unlink()
    return frozenset(result)
