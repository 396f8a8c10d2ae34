"""The feature service on Ray: thin shells around EncoderWorker and PoolRouter, and the client's way to them.

Actors are named, live in the namespace ``loom3d``, ask for no CPU but for their role's resource, and restart when
they die. The router only hands out leases; records travel from the replica to the client through Ray's object store
and are mapped, not copied, on the same machine.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from services.contracts import FeatureRequest
from services.errors import DeadlineError, ServiceError
from services.features.encode import Answer
from services.features.router import PoolRouter, RouterStats
from services.features.sink import StoredUpstream, StoreSink, open_store
from services.features.worker import EncoderWorker, QueueFullError, WorkerStats
from services.runtime import calls, supervise
from services.telemetry import logs

NAMESPACE = "loom3d"
RESOURCE = "role_feature"
_ATTEMPTS = 2
_FULL_PAUSE_S = 0.05
_CONTROL_S = 30.0
"""Seconds for a call that only touches tables."""


@dataclass(frozen=True, kw_only=True)
class PoolAddress:
    """Where a service is; travels to any process of the cluster."""

    name: str
    namespace: str = NAMESPACE


class ReplicaShell:
    """Actor around an EncoderWorker."""

    def __init__(self, config: RunConfig, name: str, events_folder: str) -> None:
        import torch

        # Ray sets one thread for an actor that asks for no CPU; "torch's default" means the machine's.
        torch.set_num_threads(config.service.threads or len(os.sched_getaffinity(0)))
        if events_folder:
            logs.record(Path(events_folder), name)
        store = open_store(config)
        self._config, self._sink = config, StoreSink(config, store) if store is not None else None
        self._worker = EncoderWorker(config, self._sink, upstream=self._upstream)

    def encode(self, requests: Sequence[FeatureRequest], step: int, keep: bool) -> list[Answer]:
        """See EncoderWorker.encode."""
        return self._worker.encode(requests, step, keep=keep)

    def _upstream(self, name: str) -> StoredUpstream | None:
        """What a chained encoder reads; the weights of the encoder before it are those that serve requests."""
        if not self._config.encoders[name].upstream:
            return None
        return StoredUpstream(name, self._config, self._sink, encoders=self._worker.encoder)

    def stats(self) -> WorkerStats:
        """See EncoderWorker.stats."""
        return self._worker.stats()

    def pid(self) -> int:
        """Process id, for the report and for tests that kill."""
        return os.getpid()

    def close(self) -> None:
        """Commit what was encoded; the actor ends afterwards."""
        self._worker.close()


class RouterShell:
    """Actor around a PoolRouter; owns the replicas, which end with it."""

    def __init__(self, config: RunConfig, name: str, events_folder: str) -> None:
        self._config, self._name, self._events = config, name, events_folder
        self._actors: dict[int, tuple[str, Any]] = {}
        service = config.service
        sizes = [encoder.batch_size for encoder in config.encoders.values()]
        self._router = PoolRouter(
            service.replicas,
            lease_s=service.lease_s,
            release_at=service.release_at,
            batch_size=max([1, *sizes]),
            start=self._start,
            stop=self._stop,
        )

    def assign(self, keys: Sequence[bytes]) -> list[tuple[int, str]]:
        """Index and actor name of the replica for each key."""
        return [(index, self._actors[index][0]) for index in self._router.assign(keys)]

    def done(self, keys: Sequence[bytes], replica: int) -> None:
        """See PoolRouter.done."""
        self._router.done(keys, replica)

    def failed(self, replica: int) -> None:
        """See PoolRouter.failed."""
        self._router.failed(replica)

    def report(self, hits: int, misses: int) -> None:
        """See PoolRouter.report."""
        self._router.report(hits, misses)

    def state(self) -> tuple[RouterStats, list[str]]:
        """Counters, and the names of the replicas that live."""
        return self._router.stats(), [self._actors[index][0] for index in self._router.live()]

    def close(self) -> None:
        """Have every replica commit and end."""
        for index in self._router.live():
            _end(self._actors[index][1])

    def _start(self, index: int) -> None:
        import ray

        # A new name each time: that of a replica which is still ending is taken.
        name = f"{self._name}-{index}-{uuid.uuid4().hex[:6]}"
        service = self._config.service
        actor = (
            ray.remote(ReplicaShell)
            .options(
                name=name,
                namespace=NAMESPACE,
                num_cpus=0,
                num_gpus=service.num_gpus,
                resources={RESOURCE: 1},
                max_restarts=-1,
                max_task_retries=0,  # the client retries elsewhere
                max_concurrency=64,
            )
            .remote(self._config, f"encoder-{index}", self._events)
        )
        self._actors[index] = (name, actor)

    def _stop(self, index: int) -> None:
        actor = self._actors.pop(index)[1]
        # Committing takes a while, and nobody should wait for an assignment meanwhile.
        supervise.thread(f"release encoder {index}", lambda: _end(actor), lambda _failure: None)


def _end(actor: Any) -> None:
    import ray

    try:
        calls.call(actor.close.remote(), "an encoder replica that is released", _CONTROL_S)
    except ServiceError:
        pass  # it is gone or hangs: what it committed stays, the rest is encoded again
    finally:
        ray.kill(actor, no_restart=True)


class PoolClient:
    """A consumer's side of the service: asks the router whom to ask, then that replica; another if that one fails."""

    def __init__(self, address: PoolAddress, config: RunConfig) -> None:
        self.address, self._config = address, config
        self._router: Any = None
        self._replicas: dict[str, Any] = {}

    def encode(self, requests: Sequence[FeatureRequest], step: int, *, keep: bool) -> list[Answer]:
        """One answer a request: a record, the error of the input, or a ServiceError where nobody could answer.

        A replica gets ``service.deadline_s`` seconds; its requests then go to another one, once.
        """
        answers: list[Answer] = []
        for start in range(0, len(requests), self._config.service.queue):
            answers += self._encode(requests[start : start + self._config.service.queue], step, keep)
        return answers

    def report(self, hits: int, misses: int) -> None:
        """Tell the router how the cache does; nobody waits for it."""
        try:
            self._the_router().report.remote(hits, misses)
        except ServiceError:
            self._router = None

    def state(self) -> tuple[RouterStats, list[str]]:
        """Counters of the router and the names of the live replicas. ServiceError when it is gone."""
        return calls.call(self._the_router().state.remote(), self._who(), _CONTROL_S)

    def replica(self, name: str) -> Any:
        """The actor handle of a replica. ServiceError when there is none of that name."""
        if name not in self._replicas:
            self._replicas[name] = _actor(name, self.address.namespace)
        return self._replicas[name]

    def _encode(self, requests: Sequence[FeatureRequest], step: int, keep: bool) -> list[Answer]:
        answers: dict[int, Answer] = {}
        attempts, patience = 0, time.monotonic() + self._config.service.deadline_s
        problem: ServiceError = ServiceError("the feature service was not asked")
        while attempts < _ATTEMPTS and len(answers) < len(requests):
            left = [i for i in range(len(requests)) if i not in answers]
            try:
                full, said = self._ask([requests[i] for i in left], left, step, keep, answers)
                problem = said or problem
            except ServiceError as error:
                self._router = None
                full, problem = False, error
            if full and time.monotonic() < patience:
                time.sleep(_FULL_PAUSE_S)
            else:
                attempts += 1
        return [answers.get(i, problem) for i in range(len(requests))]

    def _ask(
        self, requests: Sequence[FeatureRequest], indices: Sequence[int], step: int, keep: bool, answers: dict
    ) -> tuple[bool, ServiceError | None]:
        """One round. Fills ``answers``; returns whether the only problem was a full queue, and the last problem."""
        keys = [request.encoder.encode() + b"\0" + request.key.digest for request in requests]
        router = self._the_router()
        assigned = calls.call(router.assign.remote(keys), self._who(), _CONTROL_S)
        groups: dict[tuple[int, str], list[int]] = {}
        for position, replica in enumerate(assigned):
            groups.setdefault(replica, []).append(position)
        refs, what = [], []
        for (_, name), group in groups.items():
            refs.append(self.replica(name).encode.remote([requests[p] for p in group], step, keep))
            what.append(f"{len(group)} inputs of step {step} from encoder replica {name}")
        results = calls.gather(refs, what, self._config.service.deadline_s)
        full = False
        problem: ServiceError | None = None
        for ((index, name), group), result in zip(groups.items(), results, strict=True):
            if isinstance(result, QueueFullError):
                full, problem = True, result
            elif isinstance(result, BaseException):
                full, problem = False, _service_error(result)
                self._replicas.pop(name, None)
                router.failed.remote(index)
            else:
                answers.update((indices[p], answer) for p, answer in zip(group, result, strict=True))
                router.done.remote([keys[p] for p in group], index)
        # The encoder itself failed over there: another replica, then this process, may tell more.
        for position in [i for i in indices if isinstance(answers.get(i), ServiceError)]:
            problem = answers.pop(position)
            full = False
        return full, problem

    def _the_router(self) -> Any:
        if self._router is None:
            self._router = _actor(self.address.name, self.address.namespace)
        return self._router

    def _who(self) -> str:
        return f"the feature service {self.address.name!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        return PoolClient, (self.address, self._config)


def _service_error(error: BaseException) -> ServiceError:
    return error if isinstance(error, ServiceError) else ServiceError(f"an encoder replica failed: {error}")


def _actor(name: str, namespace: str) -> Any:
    import ray

    if not ray.is_initialized():
        raise ServiceError(f"the feature service {name!r} cannot be reached: this process is in no Ray cluster")
    try:
        return ray.get_actor(name, namespace)
    except ValueError:
        raise ServiceError(
            f"there is no actor {name!r} in namespace {namespace!r}: it ended or never started"
        ) from None


def start_pool(config: RunConfig, *, events_folder: Path | None = None) -> PoolAddress:
    """Start the feature service of a run and return where it is. It ends with this process, or by :func:`stop_pool`.

    ServiceError when the router does not come up within ``cluster.start_timeout_s``. Replicas load their encoders
    at the first request.
    """
    import ray

    address = PoolAddress(name=f"features-{uuid.uuid4().hex[:8]}")
    folder = str(events_folder) if events_folder else ""
    router: Any = (
        ray.remote(RouterShell)
        .options(name=address.name, namespace=NAMESPACE, num_cpus=0, max_restarts=-1)
        .remote(config, address.name, folder)
    )
    try:
        calls.call(router.state.remote(), f"the feature service {address.name!r}", config.cluster.start_timeout_s)
    except DeadlineError as error:
        raise ServiceError(f"{error} (cluster.start_timeout_s); has a node the memory for one more process?") from error
    _ROUTERS[address.name] = router
    return address


def stop_pool(address: PoolAddress) -> None:
    """Have the replicas commit, and end the service that this process started. Does nothing when it is gone."""
    import ray

    router = _ROUTERS.pop(address.name, None)
    if router is None:
        return
    try:
        calls.call(router.close.remote(), f"the feature service {address.name!r}", 2 * _CONTROL_S)
    except ServiceError:
        pass  # gone already
    finally:
        ray.kill(router, no_restart=True)


def connect_pool(address: PoolAddress, config: RunConfig) -> PoolClient:
    """A client of the service at ``address``, for any process of its cluster; connects at the first request."""
    return PoolClient(address, config)


_ROUTERS: dict[str, Any] = {}
"""Handles of the services that this process started: an actor ends with its last handle."""
