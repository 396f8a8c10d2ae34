"""One replica of the feature service, as a plain class: a bounded queue, the most urgent first, micro-batches.

Any number of threads call :meth:`EncoderWorker.encode` and wait; one thread runs the encoders. A key that is queued
or being encoded is never encoded a second time: later requests for it wait for the same answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from configs.schema import RunConfig
from services.contracts import FeatureRequest, Record
from services.errors import CacheError, DeadlineError, ServiceError
from services.features.encode import Answer, Encoder, Upstream, as_stored
from services.runtime import supervise
from services.telemetry import events


class QueueFullError(ServiceError):
    """A replica has no room; it lives, and will have room."""


class Sink(Protocol):
    """Where a replica keeps what it encoded."""

    def put(self, requests: Sequence[FeatureRequest], records: Sequence[Record]) -> None:
        """Keep the records; may raise CacheError."""

    def close(self) -> None:
        """Commit what is buffered."""


@dataclass(eq=False)
class _Job:
    request: FeatureRequest
    step: int
    order: int
    keep: bool
    answer: Future[Answer] = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True)
class WorkerStats:
    """Counters of a replica since it started."""

    encoded: int
    failed: int
    batches: int
    queued: int


class EncoderWorker:
    """Encodes requests of all encoders of a run. ``sink`` keeps the records (None: nobody does)."""

    def __init__(
        self,
        config: RunConfig,
        sink: Sink | None = None,
        *,
        make_encoder: Callable[..., Any] = Encoder,
        upstream: Callable[[str], Upstream | None] = lambda _name: None,
    ) -> None:
        if config.service.threads:
            torch.set_num_threads(config.service.threads)
        self.config, self.sink = config, sink
        self._make, self._upstream = make_encoder, upstream
        self._encoders: dict[str, Any] = {}
        self._queue: list[_Job] = []
        self._jobs: dict[tuple[str, bytes], _Job] = {}
        self._order = self._encoded = self._failed = self._batches = 0
        self._changed = threading.Condition()
        self._closed = False
        self._sink_refused = False
        self._thread = supervise.thread("encoder", self._run, self._die)

    def encode(
        self, requests: Sequence[FeatureRequest], step: int, *, keep: bool = True, timeout_s: float | None = None
    ) -> list[Answer]:
        """One answer a request: its record, or what was wrong with that input. Blocks until all are there.

        QueueFullError when there is no room (nothing is queued then); ServiceError when closed; DeadlineError
        after ``timeout_s`` (default ``service.deadline_s``), which leaves the work queued for whoever asks again.
        """
        jobs = self._submit(requests, step, keep)
        timeout = self.config.service.deadline_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout
        try:
            return [job.answer.result(max(0.0, deadline - time.monotonic())) for job in jobs]
        except FutureTimeout:
            raise DeadlineError(
                f"step {step} waits for {len(jobs)} inputs of an encoder replica: not all encoded after {timeout:g} s "
                f"({self.stats().queued} are queued)"
            ) from None

    def stats(self) -> WorkerStats:
        """Counters now."""
        with self._changed:
            return WorkerStats(
                encoded=self._encoded, failed=self._failed, batches=self._batches, queued=len(self._queue)
            )

    def close(self) -> None:
        """Refuse new requests, fail the queued ones, commit what was encoded."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=10.0)
        self._fail_queued(ServiceError("the encoder replica was closed"))
        for encoder in self._encoders.values():
            encoder.close()
        if self.sink is not None:
            self.sink.close()

    def _submit(self, requests: Sequence[FeatureRequest], step: int, keep: bool) -> list[_Job]:
        with self._changed:
            if self._closed:
                raise ServiceError("the encoder replica is closed")
            new = {(r.encoder, r.key.digest) for r in requests} - self._jobs.keys()
            if len(self._queue) + len(new) > self.config.service.queue:
                raise QueueFullError(
                    f"the queue of an encoder replica is full: {len(self._queue)} of service.queue="
                    f"{self.config.service.queue} and {len(new)} more asked for"
                )
            jobs = [self._job(request, step, keep) for request in requests]
            self._changed.notify_all()
            return jobs

    def _job(self, request: FeatureRequest, step: int, keep: bool) -> _Job:
        name = (request.encoder, request.key.digest)
        job = self._jobs.get(name)
        if job is None:
            job = self._jobs[name] = _Job(request, step, self._order, keep)
            self._order += 1
            self._queue.append(job)
        # Whoever needs it first sets the urgency; whoever wants it kept has it kept.
        job.step, job.keep = min(job.step, step), job.keep or keep
        return job

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._encode(batch)

    def _next_batch(self) -> list[_Job] | None:
        """The most urgent jobs of one encoder, up to its batch size; None when closed."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            name = min(self._queue, key=_urgency).request.encoder
            size = max(1, self.config.encoders[name].batch_size)
            full_at = time.monotonic() + self.config.service.batch_wait_s
            while self._waiting(name) < size and not self._closed:
                left = full_at - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            batch = sorted((job for job in self._queue if job.request.encoder == name), key=_urgency)[:size]
            taken = set(map(id, batch))
            self._queue = [job for job in self._queue if id(job) not in taken]
            return batch

    def _waiting(self, name: str) -> int:
        return sum(job.request.encoder == name for job in self._queue)

    def _encode(self, batch: list[_Job]) -> None:
        name = batch[0].request.encoder
        started = time.time()
        outcome = supervise.attempt(f"encode {name}", lambda: self.encoder(name).encode([j.request for j in batch]))
        if outcome.failure is None:
            answers: Sequence[Answer] = outcome.unwrap()
            self._keep(batch, answers)
            answers = as_stored(answers, self.config, self.encoder(name))
        else:
            # Of the encoder, not of an input: the client may try another replica.
            answers = [ServiceError(f"encoder {name!r} failed: {outcome.failure}")] * len(batch)
        broken = sum(isinstance(answer, BaseException) for answer in answers)
        events.emit("encode", started, time.time(), encoder=name, inputs=len(batch), step=batch[0].step, broken=broken)
        with self._changed:
            self._batches += 1
            self._encoded += len(batch) - broken
            self._failed += broken
            for job in batch:
                del self._jobs[job.request.encoder, job.request.key.digest]
        for job, answer in zip(batch, answers, strict=True):
            job.answer.set_result(answer)

    def encoder(self, name: str) -> Any:
        """The encoder of that name, made at its first use; only for the thread that runs encoders, as a chain does."""
        if name not in self._encoders:
            self._encoders[name] = self._make(name, self.config, upstream=self._upstream(name))
        return self._encoders[name]

    def _keep(self, batch: list[_Job], answers: Sequence[Answer]) -> None:
        kept = [(j.request, a) for j, a in zip(batch, answers, strict=True) if j.keep and isinstance(a, dict)]
        if self.sink is None or not kept:
            return
        try:
            self.sink.put([request for request, _ in kept], [record for _, record in kept])
        except CacheError as error:
            # A full disk must not stop a run whose features are here; say so once.
            if not self._sink_refused:
                events.emit("cache_refused", time.time(), time.time(), error=str(error))
            self._sink_refused = True

    def _fail_queued(self, error: ServiceError) -> None:
        with self._changed:
            jobs, self._queue = list(self._jobs.values()), []
            self._jobs.clear()
        for job in jobs:
            if not job.answer.done():
                job.answer.set_result(error)

    def _die(self, failure: supervise.Failure) -> None:
        with self._changed:
            self._closed = True
        self._fail_queued(ServiceError(f"the encoder replica's thread ended: {failure}"))


def _urgency(job: _Job) -> tuple[int, int]:
    return job.step, job.order
