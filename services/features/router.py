"""Who encodes what: leases on keys, balance over replicas, replicas released and started again. No Ray, no payload.

Features never pass through the router: a client asks it which replica to ask, then talks to that replica.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class _Replica:
    index: int
    leases: set[bytes] = field(default_factory=set)
    shunned_until: float = 0.0


@dataclass
class _Lease:
    replica: int
    expires: float


@dataclass(frozen=True, kw_only=True)
class RouterStats:
    """State of the service."""

    live: int
    leases: int
    hit_rate: float
    lookups: int
    started: int
    released: int


class PoolRouter:
    """Assigns keys to replicas so that a key has at most one live encode, and decides how many replicas live.

    ``start(index)`` and ``stop(index)`` begin and end a replica. A lease ends when its replica reports the key
    done, is reported failed, or ``lease_s`` passed; after such a loss a second encode is allowed.
    """

    SHUN_S = 5.0
    """Seconds that a replica which failed is passed over while another lives; Ray restarts it meanwhile."""

    def __init__(
        self,
        replicas: int,
        *,
        lease_s: float,
        release_at: float,
        batch_size: int,
        start: Callable[[int], None],
        stop: Callable[[int], None],
        window: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.maximum, self.lease_s, self.release_at, self.batch_size = replicas, lease_s, release_at, batch_size
        self._start, self._stop, self._clock = start, stop, clock
        self._window = window
        self._live: dict[int, _Replica] = {}
        self._leases: dict[bytes, _Lease] = {}
        self._reports: deque[tuple[int, int]] = deque()
        self._started = self._released = 0
        for _ in range(replicas):
            self._scale_up()

    def assign(self, keys: Sequence[bytes]) -> list[int]:
        """The replica that holds or now gets the lease of each key. Starts replicas when misses pile up."""
        now = self._clock()
        self._expire(now)
        fresh = len({key for key in keys if key not in self._leases})
        wanted = min(self.maximum, max(1, math.ceil((len(self._leases) + fresh) / self.batch_size)))
        while len(self._live) < wanted:
            self._scale_up()
        return [self._lease(key, now) for key in keys]

    def done(self, keys: Sequence[bytes], replica: int) -> None:
        """``replica`` answered ``keys``."""
        for key in keys:
            lease = self._leases.get(key)
            if lease is not None and lease.replica == replica:
                self._end(key)

    def failed(self, replica: int) -> None:
        """``replica`` died or does not answer: its keys are free, and others are preferred for a while."""
        holder = self._live.get(replica)
        if holder is not None:
            for key in list(holder.leases):
                self._end(key)
            holder.shunned_until = self._clock() + self.SHUN_S

    def report(self, hits: int, misses: int) -> int:
        """A client's lookups since its last report. Returns the number of replicas released because of it.

        Idle replicas go once at least ``window`` lookups hit at ``release_at`` or better.
        """
        self._reports.append((hits, misses))
        while len(self._reports) > 1 and self._lookups() - sum(self._reports[0]) >= self._window:
            self._reports.popleft()
        if self._lookups() < self._window or self._hit_rate() < self.release_at:
            return 0
        self._expire(self._clock())
        idle = [replica.index for replica in self._live.values() if not replica.leases]
        for index in idle:
            del self._live[index]
            self._stop(index)
        self._released += len(idle)
        return len(idle)

    def stats(self) -> RouterStats:
        """State now."""
        return RouterStats(
            live=len(self._live),
            leases=len(self._leases),
            hit_rate=self._hit_rate(),
            lookups=self._lookups(),
            started=self._started,
            released=self._released,
        )

    def live(self) -> list[int]:
        """Indices of the replicas that live."""
        return sorted(self._live)

    def _lease(self, key: bytes, now: float) -> int:
        lease = self._leases.get(key)
        if lease is None:
            replica = min(self._live.values(), key=lambda r: (r.shunned_until > now, len(r.leases), r.index))
            replica.leases.add(key)
            lease = self._leases[key] = _Lease(replica.index, now + self.lease_s)
        return lease.replica

    def _end(self, key: bytes) -> None:
        lease = self._leases.pop(key)
        holder = self._live.get(lease.replica)
        if holder is not None:
            holder.leases.discard(key)

    def _expire(self, now: float) -> None:
        # Leases are made in order of time and never renewed, so the expired ones come first.
        while self._leases:
            key, lease = next(iter(self._leases.items()))
            if lease.expires > now:
                return
            self._end(key)

    def _scale_up(self) -> None:
        index = next(i for i in range(self.maximum) if i not in self._live)
        self._start(index)
        self._live[index] = _Replica(index)
        self._started += 1

    def _lookups(self) -> int:
        return sum(hits + misses for hits, misses in self._reports)

    def _hit_rate(self) -> float:
        lookups = self._lookups()
        return sum(hits for hits, _ in self._reports) / lookups if lookups else 0.0
