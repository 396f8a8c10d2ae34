"""One role of a run on one rank: data, model, loop, checkpoints and hooks. The same inline and in a worker."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.trainers import representation
from actors.trainers.backends.base import Backend
from actors.trainers.checkpoint import Checkpoints, Identity, resume
from actors.trainers.feed import Feed as Feed  # where others look for it
from actors.trainers.loop import Hooks, Metrics, TrainLoop, to_device
from actors.trainers.recompute import checkpoint_activations
from configs.schema import RunConfig
from models.spec import RoleSpec
from services.contracts import Split
from services.streams.ledger import Ledger
from services.streams.loader import Steps
from services.streams.plan import EpochPlan
from services.telemetry.loggers import Loggers

_log = logging.getLogger("loom3d")

Stream = Callable[[EpochPlan, int, int], Steps]
"""(plan, first step, one past the last) -> this rank's planned steps, as Ray Data delivers them."""

_TRAINER_FREE = {
    "log_every", "checkpoint_every", "keep_checkpoints", "validate_every", "threads", "prefetch_steps", "resume",
    "max_skipped_steps", "best_metric", "best_mode", "activation_checkpointing",
}  # fmt: skip
"""Settings of the trainer that do not change the weights, so a run may be resumed with others."""


@dataclass(frozen=True, kw_only=True)
class RoleResult:
    """What training a role came to."""

    steps: int
    skipped: int
    samples: int
    resumed_from: int
    best_step: int | None
    validation: Metrics
    """Numbers of the last validation of this process; empty if none was due."""


def train_role(
    config: RunConfig, folder: Path, feed: Feed, backend: Backend, *, stream: Stream | None = None
) -> RoleResult:
    """Train the role of a probe run on this rank, resuming from the newest valid checkpoint of ``folder``.

    Args:
        config: the run.
        folder: the run folder, reachable from every rank.
        feed: where samples come from.
        backend: this rank's place among the others.
        stream: gives this rank's planned steps; None reads the plan directly.
    """
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    plan = feed.plan(Split.TRAIN)
    module, role, settings = _build(config, feed, plan)
    if config.trainer.activation_checkpointing:
        checkpoint_activations(module, role)
    loop = TrainLoop(
        module=module,
        role=role,
        config=config.trainer,
        backend=backend,
        loss_weights=representation.loss_weights(config),
        seed=config.seed,
    )
    checkpoints = open_checkpoints(config, folder, plan)
    found = checkpoints.newest()
    if found is not None:
        resume(loop, found)
        _log.info("resumed from %s", found.folder)
    elif backend.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").write_text(json.dumps({"name": config.model.name, "settings": settings}, indent=1))
    began_at = loop.state.step
    loggers = Loggers(folder, config.logger) if backend.rank == 0 else None
    validation = _Validation(feed, role, backend)
    loop.hooks = Hooks(
        metrics=loggers.log if loggers is not None else lambda *_: None,
        broken=_report_broken if backend.rank == 0 else lambda _: None,
        validate=validation if validation.possible else None,
        save=lambda _, best: checkpoints.save(loop, best=best),
    )
    ledger = Ledger(folder / "quarantine.jsonl", max_broken=config.data.max_broken, total=plan.samples)
    planned = stream(plan, began_at, config.trainer.steps) if stream is not None else None
    with closing(
        feed.load(
            plan,
            start=began_at,
            stop=config.trainer.steps,
            rank=backend.rank,
            world_size=backend.world_size,
            steps=planned,
            ledger=ledger,
        )
    ) as loader:
        state = loop.run(loader)
    if loggers is not None:
        loggers.close()
    return RoleResult(
        steps=state.step,
        skipped=state.skipped,
        samples=state.samples,
        resumed_from=began_at,
        best_step=state.best_step,
        validation=validation.last,
    )


def open_checkpoints(config: RunConfig, folder: Path, plan: EpochPlan) -> Checkpoints:
    """The checkpoints of a run folder, bound to the run's settings and data."""
    identity = Identity(settings=deciding_settings(config), plan=plan.digest)
    return Checkpoints(folder / "checkpoints", identity, keep=config.trainer.keep_checkpoints)


def deciding_settings(config: RunConfig) -> dict[str, Any]:
    """Flat settings that decide what is trained. The data are named by the plan's digest, not by their place."""
    chosen: dict[str, Any] = {
        "seed": config.seed,
        "recipe": dataclasses.asdict(config.recipe),
        "model": dataclasses.asdict(config.model),
        "encoders": {
            name: {k: v for k, v in dataclasses.asdict(encoder).items() if k != "batch_size"}
            for name, encoder in config.encoders.items()
        },
        "cache.codec": config.cache.codec,
        "peft": dataclasses.asdict(config.peft),
        "trainer": {k: v for k, v in dataclasses.asdict(config.trainer).items() if k not in _TRAINER_FREE},
    }
    return dict(_flatten("", chosen))


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value


def _build(config: RunConfig, feed: Feed, plan: EpochPlan) -> tuple[nn.Module, RoleSpec, dict[str, Any]]:
    """The model for this run's features and classes, its standardisation measured on the plan's first samples.

    Every rank reads the same global samples, so the statistics do not depend on the number of ranks.
    """
    per_step = plan.micro_batch * len(plan.kinds)
    steps = max(1, min(plan.steps_per_epoch, representation.CALIBRATION_SAMPLES // per_step))
    with closing(feed.load(plan, stop=steps)) as loader:
        batches = [_kept(micro.batch) for step in loader for micro in step.micro_batches]
    settings = representation.model_settings(config, batches[0], len(feed.targets.classes))
    module, role = representation.build_probe(config.model.name, settings, config.seed)
    representation.calibrate(module, batches)
    return module, role, settings


def _kept(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of its own memory: the loader uses its buffers again."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _report_broken(broken: Mapping[str, str]) -> None:
    for sample, reason in broken.items():
        _log.warning("%s is left out: %s", sample, reason)


class _Validation:
    """The validation hook: every rank takes its share of the split, the tallies are added up."""

    def __init__(self, feed: Feed, role: RoleSpec, backend: Backend) -> None:
        self._feed, self._role, self._backend = feed, role, backend
        self._weights = representation.loss_weights(feed.config)
        self.possible = any(manifest.of_split(Split.VAL) for manifest in feed.manifests.values())
        self.last: Metrics = {}

    def __call__(self, module: nn.Module) -> Metrics:
        tally = representation.Tally(len(self._feed.targets.classes), self._weights)
        backend = self._backend
        plan = self._feed.plan(Split.VAL)
        with closing(self._feed.load(plan, rank=backend.rank, world_size=backend.world_size)) as loader:
            for step in loader:
                for micro in step.micro_batches:
                    tally.update(module, self._role, to_device(micro.batch, backend.device))
        mine, *others = backend.exchange(tally)
        for other in others:
            mine.merge(other)
        self.last = mine.compute()
        return self.last
