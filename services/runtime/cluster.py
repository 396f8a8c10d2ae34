"""Ray for a run: a local one of our own on loopback, or a running cluster. We stop only what we started.

Three facts decide how a local Ray is started. Its listeners lie on the network card's address unless a variable is
set before ray is imported; a "current cluster" file is shared by all runs of a machine unless each has its own
temporary folder, whose path must be short (Unix sockets); and token authentication writes to the home folder unless
told where.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import services
from configs.schema import ClusterConfig, RunConfig
from services.errors import ServiceError
from services.runtime import threads
from services.runtime.placement import role_resource
from services.telemetry import logs

_log = logging.getLogger(__name__)

SETUP_HOOK = "services.runtime.cluster.setup_worker"
THREADS = "LOOM3D_THREADS"
_PLACEMENT_CLEANER = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
"""Logger that repeats every second, where there is no dashboard, that it cannot see the controller's state."""

_NOT_OURS = "worker processes have been started on node"
"""What raylet says of every group of roles; it reaches the driver as an error of the cluster, not by the workers' logs,
and only Ray's filter of repeated lines, which reads its variable when ray is imported, keeps it off the terminal."""

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray that this process is part of; ``started`` where it is ours to stop."""

    address: str
    started: bool
    folder: Path | None = None
    """Temporary folder of a Ray of our own."""


def setup_worker() -> None:
    """Runs once in every Ray worker process before anything else (``worker_process_setup_hook``).

    ``models`` first: it declares what ``import torchvision`` needs beside a CPU build of torch. Then threads: Ray
    gives one to a worker that asks for no CPU; LOOM3D_THREADS says how many are meant. And one logger that would
    fill the worker's log file is made quiet.
    """
    import models  # noqa: F401

    logging.getLogger(_PLACEMENT_CLEANER).setLevel(logging.ERROR)
    if os.environ.get(THREADS, "").isdigit() and int(os.environ[THREADS]) > 0:
        import torch

        torch.set_num_threads(int(os.environ[THREADS]))


def local_environment(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Variables of a local Ray with its files in ``folder``, beside those in ``environment``, which win.

    A user who has chosen an authentication mode keeps it; otherwise a token of this run alone guards the cluster.
    """
    wanted = {
        _LOOPBACK: "0",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DEDUP_LOGS_SKIP_REGEX": _NOT_OURS,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    if "RAY_AUTH_MODE" not in environment:
        wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    return {name: value for name, value in wanted.items() if name not in environment}


def local_resources(config: RunConfig) -> tuple[float, float, dict[str, float]]:
    """CPUs, GPUs and custom resources that a local Ray pretends to have, so that every role of the run fits."""
    cluster: ClusterConfig = config.cluster
    nodes = [(spec.count, spec) for spec in cluster.nodes.values()]
    custom: dict[str, float] = {}
    for count, spec in nodes:
        for name, amount in spec.resources.items():
            custom[name] = custom.get(name, 0.0) + count * amount
    for role, role_spec in cluster.roles.items():
        custom.setdefault(role_resource(role), float(max(role_spec.workers)))
    custom.setdefault(role_resource("feature"), float(max(1, config.service.replicas)))
    cpus = sum(count * spec.num_cpus for count, spec in nodes)
    return cpus, sum(count * spec.num_gpus for count, spec in nodes), custom


def worker_environment() -> dict[str, Any]:
    """Runtime environment of the workers: the setup hook, and the packages importable as they are here."""
    root = str(Path(services.__file__).resolve().parents[1])
    path = os.pathsep.join(dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    variables = {
        "PYTHONPATH": path,
        **{name: os.environ.get(name, value) for name, value in threads.ENVIRONMENT.items()},
    }
    return {"worker_process_setup_hook": SETUP_HOOK, "env_vars": variables}


def start(config: RunConfig) -> Cluster:
    """Ray for this run as ``cluster.mode`` says. A Ray that this process is in already is used and left alone.

    ServiceError when it does not start, or the cluster at ``cluster.address`` cannot be reached.
    """
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            return Cluster(address=ray.get_runtime_context().gcs_address, started=False)
    if config.cluster.mode == "attach":
        return attach(config.cluster.address or "auto")
    if config.cluster.mode != "local":
        raise ServiceError(f"cluster.mode={config.cluster.mode!r} starts no Ray; local and attach do")
    return _start_local(config)


def attach(address: str) -> Cluster:
    """Join the running cluster at ``address`` ("auto": the one of this machine or job). It is never stopped by us."""
    import ray

    # A job has its runtime environment from `ray job submit`, and Ray refuses two hooks.
    submitted = "worker_process_setup_hook" in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    environment = {} if submitted else {"worker_process_setup_hook": SETUP_HOOK}
    try:
        # What our code says in a worker comes as events of the run (services/telemetry/logs.py).
        ray.init(address=address, runtime_env=environment, log_to_driver=logs.debugging(), configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ServiceError(
            f"there is no Ray cluster to attach to at cluster.address={address!r}: {error}. Start one with "
            "`ray start --head`, or use cluster.mode=local"
        ) from error
    return Cluster(address=ray.get_runtime_context().gcs_address, started=True)


def driver_host(config: RunConfig) -> str:
    """Where this process can be reached by the workers of the run: loopback, or its address in a cluster of several."""
    if config.cluster.mode != "attach":
        return "127.0.0.1"
    import ray

    return str(ray.util.get_node_ip_address())


def stop(cluster: Cluster, *, keep_logs: bool = False) -> None:
    """Leave the cluster; end it where we started it. Safe to call twice. ``keep_logs`` leaves Ray's session logs."""
    if not cluster.started or "ray" not in sys.modules:
        return
    import ray

    ray.shutdown()
    if cluster.folder is not None:
        if keep_logs and cluster.folder.exists():
            _log.warning("Ray's own logs of this run are kept in %s", cluster.folder / "session_latest" / "logs")
        else:
            shutil.rmtree(cluster.folder, ignore_errors=True)
        for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH"):
            # They point into a folder that is gone; a next run in this process makes its own.
            if os.environ.get(name, "").startswith(str(cluster.folder)):
                del os.environ[name]
                if name == "RAY_AUTH_TOKEN_PATH":
                    os.environ.pop("RAY_AUTH_MODE", None)


@contextlib.contextmanager
def running(config: RunConfig) -> Iterator[Cluster]:
    """:func:`start` for a block, then :func:`stop`. Ray's logs are kept where a service failed, or for ``--debug``."""
    cluster, keep = start(config), logs.debugging()
    try:
        yield cluster
    except ServiceError:
        keep = True
        raise
    finally:
        stop(cluster, keep_logs=keep)


def _start_local(config: RunConfig) -> Cluster:
    folder = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp" if Path("/tmp").is_dir() else None))  # noqa: S108  short
    added = local_environment(folder, dict(os.environ))
    if "ray" in sys.modules and _LOOPBACK in added:
        _log.warning("ray was imported before %s was set: its ports will not be on loopback alone", _LOOPBACK)
    os.environ.update(added)
    if os.environ.get("RAY_AUTH_TOKEN_PATH", "").startswith(str(folder)):
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    import ray

    cpus, gpus, custom = local_resources(config)
    try:
        ray.init(
            address="local",
            num_cpus=int(cpus),
            num_gpus=int(gpus),
            resources=custom,
            object_store_memory=config.cluster.object_store_bytes,
            include_dashboard=False,
            runtime_env=worker_environment(),
            log_to_driver=logs.debugging(),
            configure_logging=False,
            _temp_dir=str(folder),
        )
    except (RuntimeError, ValueError, OSError, TimeoutError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ServiceError(f"a local Ray did not start: {error}. cluster.mode=inline runs without Ray") from error
    return Cluster(address=ray.get_runtime_context().gcs_address, started=True, folder=folder)
