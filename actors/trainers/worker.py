"""The thin shell that runs a role inside Ray Train workers. What it runs is ``roles.train_role``, as inline runs do."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from actors.bridge.mailbox import start_mailbox
from actors.bridge.rendezvous import Rendezvous, connect
from actors.trainers import refusal
from actors.trainers.joint import next_generation
from actors.trainers.lives import Meeting, Outcomes, live, root_cause, together
from configs.roles import ROLES, role_config
from configs.schema import RoleConfig, RunConfig
from services.errors import USER_ERRORS, PeerLostError, PlacementError, ServiceError
from services.runtime import cluster, supervise
from services.runtime.placement import largest_sizes, nodes_from_ray

if TYPE_CHECKING:
    from actors.bridge.link import Link
    from actors.trainers.backends.base import Backend
    from actors.trainers.roles import RoleResult
    from services.features.pool import PoolAddress

_log = logging.getLogger("loom3d")
_END_S = 60.0
"""How long a group may take to end, beside the time that it may take to start."""


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
    restarts = config.cluster.max_failures
    if len(roles) == 1:
        alone = functools.partial(_life_alone, config, folder, pool, roles[0])
        return live(alone, folder, first=roles[0], restarts=restarts)
    with Rendezvous(cluster.driver_host(config)) as rendezvous:
        life = functools.partial(_life_together, config, folder, pool, roles, rendezvous)
        return live(life, folder, first=roles[0], restarts=restarts)


def _life_alone(config: RunConfig, folder: Path, pool: PoolAddress | None, role: str, number: int) -> Outcomes:
    """One life of a run of one role. In this thread, so that Ray Train sees an interrupt."""
    fit = functools.partial(_fit, config, folder, pool, role, name=f"{role}-{number}" if number else role)
    return {role: supervise.attempt(f"role {role}", fit)}


def _life_together(
    config: RunConfig,
    folder: Path,
    pool: PoolAddress | None,
    roles: Sequence[str],
    rendezvous: Rendezvous,
    number: int,
) -> Outcomes:
    """One life of a run of several roles, that exchange activations and gradients.

    When one fails, the store where they meet is opened for the next generation, so that the others end as well.
    """
    generation = next_generation(folder / "checkpoints")
    rendezvous.open(generation)
    mailbox = (
        start_mailbox(f"{folder.name}-{os.getpid()}", generation) if config.bridge.transport == "objects" else None
    )
    meeting = Meeting(address=rendezvous.address, generation=generation, roles=_sizes(config, roles), mailbox=mailbox)
    if number or any(len(config.cluster.roles[role].workers) > 1 for role in roles):
        sizes = ", ".join(f"{role} {count}" for role, count in meeting.roles.items())
        _log.info("generation %d; workers: %s", generation, sizes)
    groups = {
        role: functools.partial(_fit, config, folder, pool, role, name=f"{role}-{generation}", meeting=meeting)
        for role in roles
    }
    return together(
        groups,
        end=functools.partial(rendezvous.open, generation + 1),
        folder=folder,
        patience_s=config.cluster.start_timeout_s + _END_S,
    )


def _sizes(config: RunConfig, roles: Sequence[str]) -> dict[str, int]:
    """How many workers each role gets this time: the most that its range and the living nodes allow."""
    import ray

    try:
        return largest_sizes(config, nodes_from_ray(ray.nodes()))
    except PlacementError as error:
        # Asking for them anyway is what makes a cluster grow that can.
        _log.warning("%s; waiting %g s (cluster.start_timeout_s) for it", error, config.cluster.start_timeout_s)
        return {role: min(config.cluster.roles[role].workers) for role in roles}


def _fit(
    config: RunConfig, folder: Path, pool: PoolAddress | None, role: str, *, name: str, meeting: Meeting | None = None
) -> RoleResult:
    """Train one role in a worker group, once."""
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
            name=name,
            storage_path=str(folder / "ray"),
            # Starting again is ours to decide; Ray Train's default for a group that cannot be placed is for ever.
            failure_config=api.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        with _interrupts_kept():
            result: Any = trainer.fit()
    except api.TrainingFailedError as error:
        raise _cause(role, error) from error
    refused = refusal.read(folder)
    if refused is not None:
        raise refused
    return RoleResult(**result.return_value)


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Ray Train takes Ctrl-C over in the main thread, for its controller, and does not give it back at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
    """What each worker runs: the role, unless a rank of another one has found that it cannot be done."""
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
    from services.telemetry import events, logs

    backend = make_backend(role_config(config, role).backend, train.torch.get_device())
    logs.record(folder / "events", f"{role}-{backend.rank}")
    now = time.time()
    events.emit("joined", now, now, pid=os.getpid(), generation=meeting.generation if meeting else 0)
    manifests = open_sources(config, revalidate=False)
    store = open_store(config)
    connected = connect_pool(pool, config) if pool is not None else None
    with ExitStack() as running:
        client = running.enter_context(closing(FeatureClient(config, store, pool=connected)))
        feed = running.enter_context(closing(Feed.open(config, manifests, client, store, role=role)))
        link = None if meeting is None else running.enter_context(_meet(config, role, backend, meeting))
        # Ray sets OMP_NUM_THREADS to 1 for a worker that asks for no CPU; "torch's default" means the machine's.
        torch.set_num_threads(share_of_cores(*_neighbours(link, train.get_context())))
        stream = functools.partial(_stream, config, backend, role)
        result = train_role(config, folder, feed, backend, role=role, stream=stream, link=link)
    backend.close()  # not after an error: what a lost peer did not answer would be waited for
    return dataclasses.asdict(result)


def share_of_cores(here: str, nodes: Sequence[str]) -> int:
    """Threads of a worker on node ``here``, when ``nodes`` are those of all workers of all roles."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, list(nodes).count(here)))


def _neighbours(link: Link | None, context: Any) -> tuple[str, list[str]]:
    """The node of this rank, and those of all ranks of the run."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    if link is None:
        return here, [here] * context.get_local_world_size()
    return here, link.exchange("node", -1, here)


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
    """The user error that a worker raised, without Ray's wrappers; otherwise a ServiceError with every rank's failure.

    That a peer was lost counts only where no rank of this role failed by itself.
    """
    failures: Mapping[int, Any] = getattr(error, "worker_failures", None) or {}
    if not failures:
        reason = getattr(error, "controller_failure", error)
        return ServiceError(f"the worker group of role {role} could not run: {_line(reason)}\n{error}")
    inner = {rank: getattr(failure, "cause", None) or failure for rank, failure in failures.items()}
    known = {str(rank): found for rank, found in inner.items() if isinstance(found, USER_ERRORS)}
    if known and (not isinstance(root_cause(known)[1], PeerLostError) or len(known) == len(inner)):
        return root_cause(known)[1]
    told = "; ".join(f"rank {rank}: {_line(found)}" for rank, found in inner.items() if str(rank) not in known)
    return ServiceError(f"the worker group of role {role} failed: {told}\n{error}")


def _line(error: BaseException) -> str:
    """An error in one line: of a worker that is gone, how its process ended; of others, type and first line."""
    gone = getattr(error, "health_check_failure", None)
    lines = [line.strip() for line in str(gone or error).splitlines() if line.strip()] or [""]
    if gone is not None:
        return "its process is gone. " + next((line for line in lines if "exit" in line), lines[0])
    return f"{type(error).__name__}: {lines[0]}"
