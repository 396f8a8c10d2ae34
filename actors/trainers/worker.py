"""The thin shell that runs a role inside Ray Train workers. What it runs is ``roles.train_role``, as inline runs do."""

from __future__ import annotations

import dataclasses
import functools
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from actors.trainers import refusal
from configs.roles import role_config
from configs.schema import RoleConfig, RunConfig
from services.errors import USER_ERRORS, ServiceError

if TYPE_CHECKING:
    from actors.trainers.roles import RoleResult
    from services.features.pool import PoolAddress

ROLE = "trainer"
_CONTROLLER_FAILURES = 3
"""Ray Train's default is to retry a group that cannot be placed for ever, without a word."""


def train_in_workers(config: RunConfig, folder: Path, pool: PoolAddress | None) -> RoleResult:
    """Train the role ``trainer`` in its own worker group and wait for the end.

    A group that fails is started again, at most ``cluster.max_failures`` times, and resumes from the newest valid
    checkpoint of ``folder``. Raises the user error that a worker raised last, or ServiceError with its message.
    """
    # The controller looks after its workers this often; the default of 2 s would be added to every start and end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.cluster.start_timeout_s))
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray Train swaps these classes for its second version at import, which a type checker cannot see.
    api: Any = train

    role = config.cluster.roles[ROLE]
    trainer = TorchTrainer(
        cast(Any, _work),
        train_loop_config={"config": config, "folder": str(folder), "pool": pool},
        torch_config=TorchConfig(backend="nccl" if role.num_gpus else "gloo"),
        scaling_config=api.ScalingConfig(**_scaling(role)),
        run_config=api.RunConfig(
            name=ROLE,
            storage_path=str(folder / "ray"),
            failure_config=api.FailureConfig(
                max_failures=config.cluster.max_failures, controller_failure_limit=_CONTROLLER_FAILURES
            ),
        ),
    )
    refusal.clear(folder)
    try:
        result: Any = trainer.fit()
    except api.TrainingFailedError as error:
        raise refusal.read(folder) or _cause(error) from error
    refused = refusal.read(folder)
    if refused is not None:
        raise refused
    from actors.trainers.roles import RoleResult

    return RoleResult(**result.return_value)


def _scaling(role: RoleConfig) -> dict[str, Any]:
    """Arguments of Ray Train's ScalingConfig. No CPU by default: the role's own resource decides the placement."""
    resources = {"CPU": role.num_cpus, f"role_{ROLE}": 1.0}
    if role.num_gpus:
        resources["GPU"] = role.num_gpus
    if role.memory_gb:
        resources["memory"] = role.memory_gb * 2**30
    fixed = len(role.workers) == 1
    scaling: dict[str, Any] = {
        "num_workers": role.workers[0] if fixed else (role.workers[0], role.workers[-1]),
        "use_gpu": role.num_gpus > 0,
        "resources_per_worker": resources,
    }
    if role.accelerator:
        scaling["accelerator_type"] = role.accelerator
    return scaling


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs: the role, unless an earlier group has found that it cannot be done."""
    folder = Path(settings["folder"])
    if refusal.read(folder) is not None:
        return {}
    try:
        return _run_role(settings["config"], folder, settings["pool"])
    except refusal.FINAL as error:
        refusal.note(folder, error)
        raise


def _run_role(config: RunConfig, folder: Path, pool: PoolAddress | None) -> dict[str, Any]:
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

    backend = make_backend(role_config(config, ROLE).backend, train.torch.get_device())
    logs.record(folder / "events", f"{ROLE}-{backend.rank}")
    if not config.trainer.threads:
        # Ray sets OMP_NUM_THREADS to 1 for a worker that asks for no CPU; "torch's default" means the machine's.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // train.get_context().get_local_world_size()))
    manifests = open_sources(config, revalidate=False)
    store = open_store(config)
    connected = connect_pool(pool, config) if pool is not None else None
    with (
        closing(FeatureClient(config, store, pool=connected)) as client,
        closing(Feed.open(config, manifests, client, store)) as feed,
    ):
        result = train_role(config, folder, feed, backend, stream=functools.partial(_stream, config, backend))
    return dataclasses.asdict(result)


def _stream(config: RunConfig, backend: Any, plan: Any, start: int, stop: int) -> Any:
    """The planned steps of this rank through Ray Data; rank 0 starts the pipeline for all."""
    from ray.train.collective import broadcast_from_rank_zero

    from services.streams.pipeline import PlanStream, start_feed

    mine = None
    if backend.rank == 0 and start < stop:
        mine = start_feed(config, plan, start_step=start, stop_step=stop, world_size=backend.world_size)
    feed = broadcast_from_rank_zero(mine)
    if start >= stop:
        return None
    return PlanStream(config, feed, rank=backend.rank, start_step=start, stop_step=stop)


def _cause(error: BaseException) -> Exception:
    """The user error that a worker raised, without Ray's wrappers; otherwise a ServiceError with the first failure."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    for candidate in (*failures.values(), error):
        inner = getattr(candidate, "cause", None) or candidate
        if isinstance(inner, USER_ERRORS):
            return inner
    return ServiceError(f"the worker group of role {ROLE} failed: {first}")
