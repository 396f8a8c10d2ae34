"""The story of a run: from a configuration to a trained, judged model and a report."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import configs
from configs import RunConfig
from services.telemetry import events, logs
from services.telemetry.progress import counting

if TYPE_CHECKING:
    from actors.trainers.roles import Feed, RoleResult
    from services.contracts import CacheStats
    from services.data.manifest import Manifest
    from services.features.pool import PoolAddress

_log = logging.getLogger("loom3d")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to."""

    folder: Path
    metrics: Mapping[str, Mapping[str, Any]]
    """As in evaluation.json: name -> value, baseline, baseline_name, better."""
    report: Path
    """The page with the pictures."""
    steps: int
    resumed_from: int


def train(config: RunConfig) -> RunResult:
    """Train the recipe of ``config``, evaluate the best checkpoint on the test split, write the report.

    A run that the recipe always compares with is trained first, unless it is there.

    Raises the errors of ``services.errors.USER_ERRORS``; the run folder keeps what was reached, and the same call
    again resumes from the newest valid checkpoint.
    """
    from actors import preflight
    from actors.beside import train_first
    from actors.evaluate import evaluate
    from actors.report import write_report
    from services.data.leakage import refuse_leaks
    from services.data.pairs import open_pairs
    from services.data.sources import open_sources
    from services.features.encode import pin_weights
    from services.streams.sampling import needs_pairs

    preflight.check(config)  # a run that cannot start leaves nothing behind
    train_first(config, run_folder(config), train)
    began = time.time()
    config = pin_weights(config)
    folder = open_run_folder(config)
    _log.info("run %s in %s", folder.name, folder)
    logs.record(folder / "events", "driver")
    with counting("", config.logger.progress) as show:
        manifests = open_sources(config, progress=show)
        if needs_pairs(config):
            open_pairs(config, manifests, progress=show)  # plans, here and in workers, read what is then stored
    refuse_leaks(config, manifests)
    for name, manifest in manifests.items():
        _log.info("data %s: %d entries, %d views", name, len(manifest), manifest.count_views())
    with ExitStack() as running:
        running.callback(events.configure, None, "")  # a next run in this process has a folder of its own
        running.enter_context(logs.relayed(folder / "events"))
        pool = running.enter_context(_services(config, folder))
        feed = running.enter_context(_feed(config, manifests, pool))
        _record(config, folder, feed)
        _log.info("training %d steps; features that are not stored yet are encoded on the way", config.trainer.steps)
        with events.span("train"), _progress(config, folder):
            trained = _train(config, folder, feed, pool)
        _log.info("evaluating on held-out data")
        evaluation = evaluate(feed, folder, device=_device())
        stats = feed.client.stats
    _summarise(config, folder, trained, stats, time.time() - began)
    return RunResult(
        folder=folder,
        metrics=evaluation["metrics"],
        report=write_report(folder),
        steps=trained.steps,
        resumed_from=trained.resumed_from,
    )


def run_folder(config: RunConfig) -> Path:
    """``<storage.root>/runs/<name>``; the name is ``<recipe>-<size>`` where none is given."""
    return Path(config.storage.root) / "runs" / (config.name or f"{config.recipe.name}-{config.size}")


def open_run_folder(config: RunConfig) -> Path:
    """The run folder, made if need be. With ``trainer.resume=never`` an earlier run of that name is moved aside."""
    folder = run_folder(config)
    if config.trainer.resume == "never" and folder.exists():
        aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(aside)
        _log.info("the earlier run was moved to %s", aside)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _services(config: RunConfig, folder: Path) -> Iterator[PoolAddress | None]:
    """The cluster and the feature service, ended in reverse order; yields the service's address, None without one."""
    if config.cluster.mode == "inline":
        yield None
        return
    from services.features.pool import start_pool, stop_pool
    from services.runtime import cluster

    with ExitStack() as running:
        _log.info("starting Ray on this machine" if config.cluster.mode == "local" else "joining the Ray cluster")
        with events.span("cluster"):
            running.enter_context(cluster.running(config))
        pool = None
        if config.service.replicas:
            _log.info("starting %d encoder replica(s)", config.service.replicas)
            with events.span("service"):
                pool = start_pool(config, events_folder=folder / "events")
            running.callback(stop_pool, pool)
        yield pool


@contextmanager
def _feed(config: RunConfig, manifests: Mapping[str, Manifest], pool: PoolAddress | None) -> Iterator[Feed]:
    """Samples for this process: the store, a client of the service, the targets."""
    from actors.trainers.roles import Feed
    from services.features.client import FeatureClient
    from services.features.sink import open_store

    store = open_store(config)
    connected = None
    if pool is not None:
        from services.features.pool import connect_pool

        connected = connect_pool(pool, config)
    with (
        closing(FeatureClient(config, store, pool=connected)) as client,
        closing(Feed.open(config, manifests, client, store)) as feed,
    ):
        yield feed


def _record(config: RunConfig, folder: Path, feed: Feed) -> None:
    """Save the configuration, unless the folder holds checkpoints of another one: ResumeError says what differs."""
    from actors.recipes import open_recipe
    from actors.trainers.roles import open_checkpoints
    from services.contracts import Split

    plan = feed.plan(Split.TRAIN)
    for role in open_recipe(config).roles:
        open_checkpoints(config, folder, plan, role).newest()
    (folder / "config.yaml").write_text(configs.to_yaml(config))


def _train(config: RunConfig, folder: Path, feed: Feed, pool: PoolAddress | None) -> RoleResult:
    """Train the roles: here, or in Ray Train workers."""
    if config.cluster.mode == "inline":
        from actors.trainers.roles import train_roles_inline

        return train_roles_inline(config, folder, feed, _device())
    from actors.trainers.worker import train_in_workers

    return train_in_workers(config, folder, pool)


@contextmanager
def _progress(config: RunConfig, folder: Path) -> Iterator[None]:
    """The progress line, fed from metrics.jsonl wherever the training runs."""
    from configs.roles import ROLES
    from services.telemetry.loggers import METRICS_FILE
    from services.telemetry.progress import Progress, follow

    path, stop = folder / METRICS_FILE, threading.Event()
    start_at = path.stat().st_size if path.exists() else 0
    thread = threading.Thread(
        target=follow,
        args=(folder, Progress(config.trainer.steps, config.logger), stop),
        kwargs={"start_at": start_at, "roles": ROLES[config.recipe.name]},
        name="progress",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _summarise(config: RunConfig, folder: Path, trained: RoleResult, stats: CacheStats, seconds: float) -> None:
    """summary.json: what the report's head says beside the metrics."""
    facts = {
        "steps": trained.steps,
        "samples": trained.samples,
        "best step": trained.best_step if trained.best_step is not None else "-",
        "seconds": f"{seconds:.0f}",
        "cache hits while evaluating": f"{100 * stats.hit_rate:.0f} %",
    }
    if trained.resumed_from:
        facts["resumed from step"] = trained.resumed_from
    if trained.skipped:
        facts["skipped steps"] = trained.skipped
    title = f"{config.recipe.name}, size {config.size}: {config.model.name} on {', '.join(sorted(config.data.sources))}"
    summary = {"title": title, "facts": facts}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
