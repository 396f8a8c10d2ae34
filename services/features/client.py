"""What a consumer of features holds: cache-through reads, misses to the service or encoded here, look-ahead.

A hit comes from the store. A miss is answered with the tensors themselves as soon as they are computed, never by
waiting for a commit; the encoder side writes them to the store. Within a process a key is fetched once at a time.
A service that does not answer is replaced by encoding here, which gives the same records, and is said once.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any, Protocol

from configs.schema import RunConfig
from models.spec import TensorSpec
from services.contracts import CacheStats, FeatureRequest, Lookups
from services.errors import CacheError, DeadlineError, ServiceError
from services.features.encode import Answer, Encoder, as_stored, ragged_length, record_bytes
from services.features.rule import MeasuredRule
from services.features.sink import StoreSink
from services.runtime import supervise
from services.telemetry import events

_log = logging.getLogger(__name__)

Name = tuple[str, bytes]
_REPORT_EVERY = 64
_SERVICE_AGAIN_S = 30.0


class FeaturePool(Protocol):
    """The feature service as a client sees it; see pool.py."""

    def encode(self, requests: Sequence[FeatureRequest], step: int, *, keep: bool) -> list[Answer]:
        """One answer a request: a record, the error of the input, or a ServiceError if nobody could answer."""

    def report(self, hits: int, misses: int) -> None:
        """Tell the service how the cache does, without waiting."""


@dataclass(eq=False)
class _Flight:
    """One fetch of a key. ``ahead`` ones stay after they landed until somebody takes them."""

    request: FeatureRequest
    step: int
    ahead: bool
    nbytes: int = 0
    hit: bool = False
    answer: Future[Answer] = field(default_factory=Future)


class FeatureClient:
    """Features for one consumer. ``store`` None reads and keeps nothing; ``pool`` None encodes in this process.

    Threads may call :meth:`get` and :meth:`prefetch` at the same time.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Any,
        *,
        pool: FeaturePool | None = None,
        make_encoder: Callable[..., Any] = Encoder,
    ) -> None:
        self.config = config
        self.sink = StoreSink(config, store)
        self._caching = store is not None and config.cache.mode != "never"
        measured = config.encoders if config.cache.mode == "auto" and self._caching else ()
        self._rules = {name: MeasuredRule() for name in measured}
        self._dear: set[str] = set()
        """Encoders whose records take longer to read than to make."""
        self._pool, self._pool_again_at, self._pool_gone = pool, 0.0, False
        self._make, self._encoders = make_encoder, dict[str, Any]()
        self._bytes_of: dict[str, int] = {}
        self._changed = threading.Condition()
        self._make_lock = threading.Lock()
        self._flights: dict[Name, _Flight] = {}
        self._queued: dict[Name, tuple[int, int, FeatureRequest]] = {}
        self._order = self._ahead_bytes = 0
        self._hits = self._misses = self._encoded = self._refused = 0
        self._reported = (0, 0)
        self._closed = False
        self._thread: threading.Thread | None = None

    # --- reading -----------------------------------------------------------------------------------------------------

    def pin(self, name: str) -> None:
        """Hold on to what is stored of encoder ``name`` and of those it reads from, until this client is closed.

        They are held from their first use on in any case. A run calls this before it starts, so that a budget of
        others does not evict what it will read later.
        """
        while name and self._caching:
            self.sink.namespace(name)
            name = self.config.encoders[name].upstream

    def outputs(self, name: str) -> Mapping[str, TensorSpec]:
        """Shapes and dtypes of the records of encoder ``name``."""
        return self.sink.model(name).outputs()

    def get(self, requests: Sequence[FeatureRequest], step: int, lookups: Lookups | None = None) -> list[Answer]:
        """The record of each request, in order; a broken input gives its DataError in its place.

        Hits and misses are added to ``lookups``, for those who share this client with others.

        Raises what stops everything: WeightsError, ModelError or ConfigError of the encoder.
        """
        flights, mine = self._claim(requests, step)
        try:
            self._fetch(mine, step)
        finally:
            self._settle(mine)
        answers = [self._await(flight) for flight in flights]
        self._land(flights, lookups)
        return answers

    def prefetch(self, requests: Sequence[FeatureRequest], step: int) -> None:
        """Have the features of ``requests`` made before ``get`` asks; returns at once.

        The smallest step goes first. At most ``cache.lookahead_bytes`` are under way or waiting to be taken; the
        rest queues until some are taken or :meth:`passed`.
        """
        with self._changed:
            if self._closed:
                return
            for request in requests:
                name = _name(request)
                if name not in self._flights and name not in self._queued:
                    self._queued[name] = (step, self._order, request)
                    self._order += 1
            if self._thread is None and self._queued:
                self._thread = supervise.thread("prefetch", self._look_ahead, self._stop_ahead)
            self._changed.notify_all()

    def passed(self, step: int) -> None:
        """Drop what was asked for ahead and not taken before ``step``: its consumer will not come for it any more.

        Only the consumer that looks ahead says so. Another one of this client, such as a validation, counts its
        steps from 0 again.
        """
        with self._changed:
            for flight in [f for f in self._flights.values() if f.ahead and f.step < step and f.answer.done()]:
                self._free(flight)
            for name in [name for name, (wanted, _, _) in self._queued.items() if wanted < step]:
                del self._queued[name]
            self._changed.notify_all()

    @property
    def stats(self) -> CacheStats:
        """Counters since this client was made; a record that was fetched ahead by encoding it is a miss."""
        of_store = self.sink.stats()
        with self._changed:
            return dataclasses.replace(
                of_store,
                hits=self._hits,
                misses=self._misses,
                encoded=self._encoded,
                refused=of_store.refused + self._refused,
            )

    @property
    def caching(self) -> bool:
        """False where nothing is cached, or where the measured rule found that reading some encoder's records is slower
        than encoding.
        """
        return self._caching and not self._dear

    @property
    def fell_back(self) -> bool:
        """Whether this process has encoded something itself."""
        return bool(self._encoders)

    def close(self) -> None:
        """Stop looking ahead, commit what this process encoded, let go of the store."""
        with self._changed:
            self._closed = True
            self._queued.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=self.config.service.deadline_s)
        self._report(force=True)
        self.sink.close()
        for encoder in self._encoders.values():
            encoder.close()

    # --- flights -----------------------------------------------------------------------------------------------------

    def _claim(self, requests: Sequence[FeatureRequest], step: int) -> tuple[list[_Flight], list[_Flight]]:
        """The flight of each request, and those among them that the caller has to fetch."""
        flights, mine = [], []
        with self._changed:
            for request in requests:
                name = _name(request)
                self._queued.pop(name, None)
                flight = self._flights.get(name)
                if flight is None:
                    flight = self._flights[name] = _Flight(request, step, ahead=False)
                    mine.append(flight)
                flights.append(flight)
        return flights, mine

    def _await(self, flight: _Flight) -> Answer:
        # The holder of the flight keeps its own deadlines; this one only guards against a holder that hangs.
        patience = 4 * self.config.service.deadline_s
        try:
            return flight.answer.result(patience)
        except FutureTimeout:
            raise DeadlineError(
                f"sample {flight.request.sample_id!r} waits for encoder {flight.request.encoder!r}, which another "
                f"thread of this process asked for: no answer in {patience:g} s"
            ) from None

    def _settle(self, flights: Sequence[_Flight]) -> None:
        """No flight stays open when its holder leaves, whatever happened: others may wait for it."""
        with self._changed:
            for flight in flights:
                if not flight.answer.done():
                    flight.answer.set_result(ServiceError("the thread that fetched this feature gave up"))
                if not flight.ahead:
                    self._flights.pop(_name(flight.request), None)

    def _land(self, flights: Sequence[_Flight], lookups: Lookups | None) -> None:
        """Count, and give back the bytes of what was taken."""
        hits = sum(flight.hit for flight in flights)
        if lookups is not None:
            lookups.hits += hits
            lookups.misses += len(flights) - hits
        with self._changed:
            self._hits += hits
            self._misses += len(flights) - hits
            for flight in flights:
                if flight.ahead:
                    self._free(flight)
            self._changed.notify_all()
        self._report()

    def _free(self, flight: _Flight) -> None:
        if self._flights.get(_name(flight.request)) is flight:
            del self._flights[_name(flight.request)]
            self._ahead_bytes -= flight.nbytes

    # --- fetching ----------------------------------------------------------------------------------------------------

    def _fetch(self, flights: Sequence[_Flight], step: int, *, look: bool = True) -> None:
        groups: dict[tuple[str, bool], list[_Flight]] = {}
        for flight in flights:
            groups.setdefault((flight.request.encoder, flight.request.passing), []).append(flight)
        # Encoders of pictures before those that read them: making a record of the latter waits for records of the
        # former, which may be among these very flights, or among those of a thread that does likewise.
        for name, passing in sorted(groups, key=lambda group: self._depth(group[0])):
            group = groups[name, passing]
            keep = self._keeps(name) and not passing
            missing = self._read(name, group) if look and keep else group
            if missing:
                answers = self._produce(name, [flight.request for flight in missing], step, keep)
                for flight, answer in zip(missing, answers, strict=True):
                    flight.answer.set_result(answer)

    def _read(self, name: str, flights: list[_Flight]) -> list[_Flight]:
        """Answer from the store what it has; returns the rest."""
        started = time.perf_counter()
        records = self.sink.get_many(name, [flight.request for flight in flights])
        missing = []
        for flight, record in zip(flights, records, strict=True):
            if record is None:
                missing.append(flight)
            else:
                flight.hit = True
                flight.answer.set_result(record)
        rule = self._rules.get(name)
        if rule is not None and not missing:
            # Touch every page: a mapped record that nobody read costs nothing.
            for record in filter(None, records):
                for tensor in record.values():
                    tensor.data.sum(dtype="int64" if tensor.data.dtype.kind in "iu" else None)
            self._judge(name, rule.read(time.perf_counter() - started, len(flights)))
        return missing

    def _produce(self, name: str, requests: Sequence[FeatureRequest], step: int, keep: bool) -> list[Answer]:
        started = time.perf_counter()
        answers = self._ask_service(requests, step, keep)
        left = [i for i, answer in enumerate(answers) if isinstance(answer, ServiceError)]
        if left:
            for i, answer in zip(left, self._encode_here(name, [requests[i] for i in left], step, keep), strict=True):
                answers[i] = answer
        if keep:
            self.sink.remember(requests, answers)
        with self._changed:
            self._encoded += sum(isinstance(answer, dict) for answer in answers)
        rule = self._rules.get(name)
        if rule is not None and keep:
            self._judge(name, rule.encoded(time.perf_counter() - started, len(requests)))
        return answers

    def _keeps(self, name: str) -> bool:
        """Whether records of encoder ``name`` are read from the store and kept there."""
        return self._caching and name not in self._dear

    def _depth(self, name: str) -> int:
        """How many encoders stand before ``name``."""
        upstream = self.config.encoders[name].upstream
        return 1 + self._depth(upstream) if upstream else 0

    def _ask_service(self, requests: Sequence[FeatureRequest], step: int, keep: bool) -> list[Answer]:
        nobody: list[Answer] = [ServiceError("there is no feature service")] * len(requests)
        if self._pool is None or time.monotonic() < self._pool_again_at:
            return nobody
        answers = self._pool.encode(requests, step, keep=keep)
        unanswered = [answer for answer in answers if isinstance(answer, ServiceError)]
        if unanswered:
            self._pool_again_at = time.monotonic() + _SERVICE_AGAIN_S
            if not self._pool_gone:
                now = time.time()
                events.emit("service_gone", now, now, step=step, reason=str(unanswered[0]))
                _log.warning("the feature service does not answer, this process encodes itself: %s", unanswered[0])
        elif self._pool_gone:
            events.emit("service_back", time.time(), time.time(), step=step)
            _log.warning("the feature service answers again")
        self._pool_gone = bool(unanswered)
        return answers

    def _encode_here(self, name: str, requests: Sequence[FeatureRequest], step: int, keep: bool) -> list[Answer]:
        with self._make_lock:
            if name not in self._encoders:
                upstream = (lambda r: self.get(r, step)) if self.config.encoders[name].upstream else None
                self._encoders[name] = self._make(name, self.config, upstream=upstream)
        # No lock of ours from here on: a chain calls `get` again, which may wait for another thread's encoding.
        with events.span("encode", encoder=name, inputs=len(requests), step=step, where="here"):
            answers = self._encoders[name].encode(requests)
        if keep:
            kept = [(r, a) for r, a in zip(requests, answers, strict=True) if isinstance(a, dict)]
            try:
                self.sink.put([request for request, _ in kept], [record for _, record in kept])
            except CacheError as error:
                # The features are here and the run goes on.
                if not self._refused:
                    events.emit("cache_refused", time.time(), time.time(), error=str(error))
                self._refused += len(kept)
        return as_stored(answers, self.config, self._encoders[name])

    def _judge(self, name: str, verdict: str) -> None:
        if verdict:
            self._dear.add(name)
            self._rules.pop(name, None)
            events.emit("do_not_cache", time.time(), time.time(), encoder=name, reason=verdict)
            _log.warning("encoder %s: %s", name, verdict)

    def _report(self, *, force: bool = False) -> None:
        with self._changed:
            hits, misses = self._hits - self._reported[0], self._misses - self._reported[1]
            if not (hits + misses) or (hits + misses < _REPORT_EVERY and not force):
                return
            self._reported = (self._hits, self._misses)
        if self._pool is not None and not self._pool_gone:
            self._pool.report(hits, misses)

    # --- look-ahead --------------------------------------------------------------------------------------------------

    def _look_ahead(self) -> None:
        while (flights := self._next_ahead()) is not None:
            try:
                self._fetch(flights, flights[0].step if flights else 0, look=False)
            finally:
                self._settle(flights)

    def _next_ahead(self) -> list[_Flight] | None:
        """The most urgent queued requests of one encoder that fit the bound and are not cached; None at the end."""
        with self._changed:
            while not self._closed and not self._room():
                self._changed.wait()
            if self._closed:
                return None
            first = min(self._queued.values(), key=lambda entry: entry[:2])[2].encoder
            size = max(1, self.config.encoders[first].batch_size)
            batch = sorted((e for e in self._queued.values() if e[2].encoder == first), key=lambda e: e[:2])[:size]
            nbytes = self._bytes_of[first]
            fitting = max(1, (self.config.cache.lookahead_bytes - self._ahead_bytes) // nbytes)
            batch = batch[:fitting]
            wanted = [request for _, _, request in batch]
            cached = self.sink.contains(first, wanted) if self._keeps(first) else [False] * len(batch)
            flights = []
            for (step, _, request), there in zip(batch, cached, strict=True):
                del self._queued[_name(request)]
                if not there:
                    flight = self._flights[_name(request)] = _Flight(request, step, ahead=True, nbytes=nbytes)
                    self._ahead_bytes += nbytes
                    flights.append(flight)
            return flights

    def _room(self) -> bool:
        """Whether the most urgent queued request fits; the first always does, or a small bound would stop all."""
        if not self._queued:
            return False
        name = min(self._queued.values(), key=lambda entry: entry[:2])[2].encoder
        if name not in self._bytes_of:
            outputs = self.sink.model(name).outputs()
            self._bytes_of[name] = max(1, record_bytes(outputs, ragged_length(name, self.config)))
        return not self._ahead_bytes or self._ahead_bytes + self._bytes_of[name] <= self.config.cache.lookahead_bytes

    def _stop_ahead(self, failure: supervise.Failure) -> None:
        """Look-ahead failed: ``get`` meets the same error where somebody can see it."""
        _log.warning("looking ahead stopped: %s", failure)
        with self._changed:
            self._queued.clear()
            for flight in [f for f in self._flights.values() if f.ahead]:
                self._free(flight)


def _name(request: FeatureRequest) -> Name:
    return request.encoder, request.key.digest
