"""Who is alive, and who waits for whom: heartbeats of every rank through a board that all can read.

The transport's own time-out is of no use for this (a process group does not survive one), so a wait asks here.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.errors import PeerLostError

_log = logging.getLogger("loom3d")

ENDED = "ended"
_END_POLL_S = 0.02
_CAUSE_WAIT_S = 1.0
"""A peer whose connection broke may still be about to say why."""


class Board(Protocol):
    """Short texts by name that every rank can write and read; :class:`actors.bridge.rendezvous.StoreBoard` is one."""

    def write(self, name: str, text: str) -> None:
        """Set a text. OSError or RuntimeError when the board cannot be reached."""

    def read(self, names: Sequence[str]) -> list[str]:
        """Texts that were written before, "" where there is none. OSError or RuntimeError as for :meth:`write`."""
        ...


class Generation(Protocol):
    """Which generation is the current one."""

    def __call__(self) -> int:
        """The newest generation that was opened."""
        ...


@dataclass(kw_only=True)
class _Peer:
    """What is known of another rank, in this process's own time."""

    beat: Mapping[str, Any]
    seen_at: float
    """When its heartbeat last changed."""
    phase_at: float
    """When it entered its phase."""


class Liveness:
    """Says what this rank does, and watches what the others do; a thread of its own until :meth:`close`."""

    def __init__(
        self,
        board: Board,
        place: int,
        names: Sequence[str],
        *,
        heartbeat_s: float,
        silence_s: float,
        phase_s: Mapping[str, float],
        generation: int = 0,
        newest: Generation | None = None,
    ) -> None:
        """``names`` says what each place is called in messages; ``phase_s`` is the longest time by phase."""
        self._board, self._place, self._names = board, place, list(names)
        self._heartbeat_s, self._silence_s, self._phase_s = heartbeat_s, silence_s, dict(phase_s)
        self._generation, self._newest = generation, newest
        self._phase: tuple[str, int, int] = ("start", -1, -1)
        self._waiting: int | None = None
        self._waiting_since = 0.0
        self._count = 0
        self._failed = ""
        self._superseded = 0
        now = time.monotonic()
        self._peers = {p: _Peer(beat={}, seen_at=now, phase_at=now) for p in range(len(names)) if p != place}
        self._read_at = now
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{place}", daemon=True)

    def start(self) -> None:
        """Write the first heartbeat and begin."""
        self._beat()
        self._thread.start()

    # -- this rank -------------------------------------------------------------------------------------------

    def phase(self, name: str, step: int = -1, micro: int = -1) -> None:
        """From now on this rank does ``name`` for micro-batch ``micro`` of ``step``. Costs an assignment."""
        self._phase = (name, step, micro)

    def waiting(self, place: int | None) -> None:
        """From now on this rank waits for ``place``; None: it waits no longer."""
        self._waiting, self._waiting_since = place, time.monotonic()

    def fail(self, reason: str) -> None:
        """Tell the others that this rank ends because of ``reason``; they stop waiting for it at once."""
        self._failed = self._failed or reason[:2000]
        self._quietly(self._beat)

    def end(self) -> None:
        """Say that this rank has sent its last, and wait until the others say so too, or are lost.

        Who closes its connections earlier breaks those of a peer that has not yet read the last message.
        """
        self._phase = (ENDED, *self._phase[1:])
        self._quietly(self._beat)
        for place in self._peers:
            while not self._why(place, time.monotonic()):
                time.sleep(_END_POLL_S)
                self._quietly(self._look)

    def close(self) -> None:
        """Say that this rank has ended, and stop."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._heartbeat_s + 5.0)
        self._phase = (ENDED, *self._phase[1:])
        self._quietly(self._beat)

    # -- the others ------------------------------------------------------------------------------------------

    def check(self, place: int) -> None:
        """PeerLostError if ``place`` failed, ended, is silent, or stays in its phase beyond the limit."""
        reason = self._why(place, time.monotonic())
        if reason:
            raise self._error(place, reason)

    def lost(self, place: int, reason: str) -> PeerLostError:
        """The error for a broken connection to ``place``, with what ``place`` said last; waits shortly for that."""
        deadline = time.monotonic() + _CAUSE_WAIT_S
        while time.monotonic() < deadline:
            self._quietly(self._look)
            beat = self._peers[place].beat
            if beat.get("failed") or beat.get("phase") == ENDED:
                return self._error(place, self._why(place, time.monotonic()))
            time.sleep(0.1)
        return self._error(place, f"its connection broke ({reason})")

    def describe(self, place: int) -> str:
        """What ``place`` was last seen doing."""
        peer = self._peers[place]
        if not peer.beat:
            return "it has given no sign of life"
        beat, now = peer.beat, time.monotonic()
        text = f"last seen {now - peer.seen_at:.1f} s ago in phase {beat['phase']}{_where(beat)}"
        text += f" for {now - peer.phase_at:.1f} s"
        return text + (f", waiting for {self._names[beat['waits']]}" if beat.get("waits") is not None else "")

    def _why(self, place: int, now: float) -> str:
        """Why nothing can be expected of ``place``; "" if something can."""
        with self._lock:
            peer, read_at = self._peers[place], self._read_at
        beat = peer.beat
        if self._superseded:
            return f"generation {self._superseded} of this run has begun; this rank is of generation {self._generation}"
        if beat.get("failed"):
            return f"it failed: {beat['failed']}"
        if beat.get("phase") == ENDED:
            return "it has ended"
        if now - read_at > self._silence_s:
            return f"the rendezvous store does not answer for {now - read_at:.1f} s"
        if now - peer.seen_at > self._silence_s:
            return f"no heartbeat for {now - peer.seen_at:.1f} s (bridge.silence_s={self._silence_s:g})"
        phase = beat.get("phase", "start")
        key = phase if phase in self._phase_s else "other"
        limit = self._phase_s.get(key)
        # Who waits is not the one to blame; the rank at the end of the chain has its own watchers.
        if limit is not None and beat.get("waits") is None and now - peer.phase_at > limit:
            return f"it is in phase {phase} for {now - peer.phase_at:.1f} s (bridge.phase_s.{key}={limit:g})"
        return ""

    def _error(self, place: int, reason: str) -> PeerLostError:
        since = time.time() - (time.monotonic() - self._waiting_since) if self._waiting_since else time.time()
        clock = time.strftime("%H:%M:%S", time.localtime(since))
        doing = dict(zip(("phase", "step", "micro"), self._phase, strict=True))
        return PeerLostError(
            f"{self._names[self._place]} (in phase {doing['phase']}{_where(doing)}) waits for {self._names[place]} "
            f"since {clock}: {reason}; {self.describe(place)}"
        )

    # -- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            self._quietly(self._beat)
            self._quietly(self._look)

    def _beat(self) -> None:
        self._count += 1
        phase, step, micro = self._phase
        beat = {"n": self._count, "phase": phase, "step": step, "micro": micro, "waits": self._waiting}
        self._board.write(str(self._place), json.dumps({**beat, "failed": self._failed}))

    def _look(self) -> None:
        """Read every peer's heartbeat."""
        places = list(self._peers)
        texts = self._board.read([str(place) for place in places])
        if self._newest is not None and (newest := self._newest()) > self._generation:
            self._superseded = newest
        now = time.monotonic()
        with self._lock:
            self._read_at = now
            for place, text in zip(places, texts, strict=True):
                beat, peer = json.loads(text) if text else {}, self._peers[place]
                if beat == peer.beat:
                    continue
                same = all(beat.get(key) == peer.beat.get(key) for key in ("phase", "step", "micro", "waits"))
                self._peers[place] = _Peer(beat=beat, seen_at=now, phase_at=peer.phase_at if same else now)

    def _quietly(self, what: Any) -> None:
        """A board that cannot be reached is noticed by its silence, not by an error here."""
        try:
            what()
        except (OSError, RuntimeError) as error:
            _log.debug("heartbeat of %s: %s", self._names[self._place], error)


def _where(beat: Mapping[str, Any]) -> str:
    """Step and micro-batch in words."""
    step, micro = beat["step"], beat["micro"]
    if step < 0:
        return ""
    return f" of step {step}" if micro < 0 else f" of step {step}, micro-batch {micro}"
