"""The thin shell that runs a role inside Ray Train workers. What it runs is ``roles.train_role``, as inline runs do."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from actors.bridge.mailbox import start_mailbox
from actors.bridge.rendezvous import Rendezvous, connect
from actors.trainers import refusal
from actors.trainers.joint import next_generation
from configs.roles import role_config
from configs.schema import RoleConfig, RunConfig
from configs.validate import ROLES
from services.errors import USER_ERRORS, ServiceError
from services.runtime import cluster

if TYPE_CHECKING:
    from actors.bridge.link import Link
    from actors.trainers.backends.base import Backend
    from actors.trainers.roles import RoleResult
    from services.features.pool import PoolAddress

_log = logging.getLogger("loom3d")
_CONTROLLER_FAILURES = 3
"""Ray Train's default is to retry a group that cannot be placed for ever, without a word."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the ranks of a run of several roles meet, for one life of the run."""

    address: str
    generation: int
    roles: Mapping[str, int]
    """Ranks of every role."""
    mailbox: Any = None
    """Handle of the mailbox actor, for ``bridge.transport=objects``."""


def train_in_workers(config: RunConfig, folder: Path, pool: PoolAddress | None) -> RoleResult:
    """Train every role of the recipe in its own worker group and wait for the end.

    A group that fails is started again, at most ``cluster.max_failures`` times, and resumes from the newest valid
    checkpoint of ``folder``; of several roles all start again together. Returns what the first role came to. Raises
    the user error that a worker raised last, or ServiceError with its message.
    """
    # The controller looks after its workers this often; the default of 2 s would be added to every start and end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.cluster.start_timeout_s))
    roles = ROLES[config.recipe.name]
    refusal.clear(folder)
    if len(roles) > 1:
        return _train_together(config, folder, pool, roles)
    return _fit(config, folder, pool, roles[0], restarts=config.cluster.max_failures)


def _fit(
    config: RunConfig,
    folder: Path,
    pool: PoolAddress | None,
    role: str,
    *,
    restarts: int,
    meeting: Meeting | None = None,
) -> RoleResult:
    """Train one role in a worker group, restarted by Ray Train up to ``restarts`` times."""
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    from actors.trainers.roles import RoleResult

    # Ray Train swaps these classes for its second version at import, which a type checker cannot see.
    api: Any = train
    spec = config.cluster.roles[role]
    trainer = TorchTrainer(
        cast(Any, _work),
        train_loop_config={"config": config, "folder": str(folder), "pool": pool, "role": role, "meeting": meeting},
        torch_config=TorchConfig(backend="nccl" if spec.num_gpus else "gloo"),
        scaling_config=api.ScalingConfig(**_scaling(role, spec, fixed=meeting.roles[role] if meeting else 0)),
        run_config=api.RunConfig(
            name=role if meeting is None else f"{role}-{meeting.generation}",
            storage_path=str(folder / "ray"),
            failure_config=api.FailureConfig(max_failures=restarts, controller_failure_limit=_CONTROLLER_FAILURES),
        ),
    )
    try:
        result: Any = trainer.fit()
    except api.TrainingFailedError as error:
        raise refusal.read(folder) or _cause(role, error) from error
    refused = refusal.read(folder)
    if refused is not None:
        raise refused
    return RoleResult(**result.return_value)


def _train_together(config: RunConfig, folder: Path, pool: PoolAddress | None, roles: Sequence[str]) -> RoleResult:
    """Train several roles, a worker group each, that exchange activations and gradients.

    When one fails, the store where they meet is opened for the next generation, so that the others end as well; then
    all start again from the newest step that all have saved.
    """
    sizes = {role: config.cluster.roles[role].workers[0] for role in roles}
    with Rendezvous(cluster.driver_host(config)) as rendezvous:
        for restart in range(config.cluster.max_failures + 1):
            generation = next_generation(folder / "checkpoints")
            rendezvous.open(generation)
            mailbox = start_mailbox(folder.name, generation) if config.bridge.transport == "objects" else None
            meeting = Meeting(address=rendezvous.address, generation=generation, roles=sizes, mailbox=mailbox)
            results, errors = _fit_all(config, folder, pool, meeting, rendezvous)
            if not errors:
                return results[roles[0]]
            first = next(iter(errors.values()))
            if refusal.read(folder) is not None or isinstance(first, refusal.FINAL):
                raise first
            _log.warning(
                "role %s failed (%s); %s",
                next(iter(errors)),
                str(first).splitlines()[0],
                "all roles start again from their last joint step"
                if restart < config.cluster.max_failures
                else f"cluster.max_failures={config.cluster.max_failures} restarts are used up",
            )
    raise first


def _fit_all(
    config: RunConfig, folder: Path, pool: PoolAddress | None, meeting: Meeting, rendezvous: Rendezvous
) -> tuple[dict[str, RoleResult], dict[str, Exception]]:
    """Fit every role in a thread of its own. Results and errors by role, the first error first."""
    results: dict[str, RoleResult] = {}
    errors: dict[str, Exception] = {}
    with ThreadPoolExecutor(len(meeting.roles), thread_name_prefix="fit") as threads:
        waiting = {
            threads.submit(_fit, config, folder, pool, role, restarts=0, meeting=meeting): role
            for role in meeting.roles
        }
        for future in as_completed(waiting):
            error = future.exception()
            if error is None:
                results[waiting[future]] = future.result()
            elif isinstance(error, USER_ERRORS):
                errors[waiting[future]] = error
                rendezvous.open(meeting.generation + 1)  # the other roles find out, and end
            else:
                raise error
    return results, errors


def _scaling(role: str, spec: RoleConfig, fixed: int = 0) -> dict[str, Any]:
    """Arguments of Ray Train's ScalingConfig. No CPU by default: the role's own resource decides the placement.

    ``fixed`` is the number of workers where it must not change; 0 lets an elastic group be elastic.
    """
    resources = {"CPU": spec.num_cpus, f"role_{role}": 1.0}
    if spec.num_gpus:
        resources["GPU"] = spec.num_gpus
    if spec.memory_gb:
        resources["memory"] = spec.memory_gb * 2**30
    elastic = len(spec.workers) > 1 and not fixed
    scaling: dict[str, Any] = {
        "num_workers": (spec.workers[0], spec.workers[-1]) if elastic else fixed or spec.workers[0],
        "use_gpu": spec.num_gpus > 0,
        "resources_per_worker": resources,
    }
    if spec.accelerator:
        scaling["accelerator_type"] = spec.accelerator
    return scaling


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs: the role, unless an earlier group has found that it cannot be done."""
    folder = Path(settings["folder"])
    if refusal.read(folder) is not None:
        return {}
    try:
        return _run_role(settings["config"], folder, settings["pool"], settings["role"], settings["meeting"])
    except refusal.FINAL as error:
        refusal.note(folder, error)
        raise


def _run_role(
    config: RunConfig, folder: Path, pool: PoolAddress | None, role: str, meeting: Meeting | None
) -> dict[str, Any]:
    """Train the role on this rank."""
    import torch
    from ray import train

    from actors.trainers.backends import make_backend
    from actors.trainers.roles import Feed, train_role
    from services.data.sources import open_sources
    from services.features.client import FeatureClient
    from services.features.pool import connect_pool
    from services.features.sink import open_store
    from services.telemetry import logs

    backend = make_backend(role_config(config, role).backend, train.torch.get_device())
    logs.record(folder / "events", f"{role}-{backend.rank}")
    if not config.trainer.threads:
        # Ray sets OMP_NUM_THREADS to 1 for a worker that asks for no CPU; "torch's default" means the machine's.
        beside = sum(meeting.roles.values()) if meeting else train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))
    manifests = open_sources(config, revalidate=False)
    store = open_store(config)
    connected = connect_pool(pool, config) if pool is not None else None
    with ExitStack() as running:
        client = running.enter_context(closing(FeatureClient(config, store, pool=connected)))
        feed = running.enter_context(closing(Feed.open(config, manifests, client, store, role=role)))
        link = None if meeting is None else running.enter_context(_meet(config, role, backend, meeting))
        stream = functools.partial(_stream, config, backend, role)
        result = train_role(config, folder, feed, backend, role=role, stream=stream, link=link)
    return dataclasses.asdict(result)


def _meet(config: RunConfig, role: str, backend: Backend, meeting: Meeting) -> Link:
    """Join the ranks of all roles."""
    from actors.recipes import open_recipe

    return connect(
        config,
        role=role,
        rank=backend.rank,
        world_size=backend.world_size,
        roles=meeting.roles,
        edges=open_recipe(config).edges,
        address=meeting.address,
        generation=meeting.generation,
        backend=backend,
        mailbox=meeting.mailbox,
    )


def _stream(config: RunConfig, backend: Any, role: str, plan: Any, start: int, stop: int) -> Any:
    """The planned steps of this rank through Ray Data; rank 0 starts the pipeline for all."""
    from ray.train.collective import broadcast_from_rank_zero

    from services.streams.pipeline import PlanStream, start_feed

    mine = None
    if backend.rank == 0 and start < stop:
        mine = start_feed(config, plan, role=role, start_step=start, stop_step=stop, world_size=backend.world_size)
    feed = broadcast_from_rank_zero(mine)
    if start >= stop:
        return None
    return PlanStream(config, feed, rank=backend.rank, start_step=start, stop_step=stop)


def _cause(role: str, error: BaseException) -> Exception:
    """The user error that a worker raised, without Ray's wrappers; otherwise a ServiceError with the first failure."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    for candidate in (*failures.values(), error):
        inner = getattr(candidate, "cause", None) or candidate
        if isinstance(inner, USER_ERRORS):
            return inner
    return ServiceError(f"the worker group of role {role} failed: {first}")
