"""One role of a run on one rank: data, model, loop, checkpoints and hooks. The same inline and in a worker."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.bridge.link import Link, Links
from actors.bridge.transport import Transport
from actors.recipes import Built, Recipe, open_recipe
from actors.recipes.base import select_trained
from actors.trainers.backends.base import Backend
from actors.trainers.checkpoint import Checkpoints, Found, Identity, resume
from actors.trainers.feed import Feed as Feed  # where others look for it
from actors.trainers.joint import JointCheckpoints, joint_best, next_generation
from actors.trainers.loop import Hooks, Metrics, TrainLoop
from actors.trainers.recompute import checkpoint_activations
from configs.paths import as_run
from configs.roles import role_config
from configs.schema import EncoderConfig, RunConfig
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
    config: RunConfig,
    folder: Path,
    feed: Feed,
    backend: Backend,
    *,
    role: str = "",
    stream: Stream | None = None,
    link: Links | None = None,
) -> RoleResult:
    """Train one role on this rank, resuming from the newest valid checkpoint of ``folder``.

    Args:
        config: the run.
        folder: the run folder, reachable from every rank.
        feed: where samples of the role come from.
        backend: this rank's place among those of its role.
        role: which role of the recipe; "" is its first.
        stream: gives this rank's planned steps; None reads the plan directly.
        link: joins this rank with those of the other roles; None where there are none.
    """
    recipe = open_recipe(config)
    role = role or recipe.roles[0]
    config = role_config(config, role)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    plan = feed.plan(Split.TRAIN)
    built = recipe.build(role, feed, plan)
    loop = make_loop(config, recipe, built, backend, link)
    checkpoints = _joined(open_checkpoints(config, folder, plan, role), folder, loop)
    found = checkpoints.newest()
    if found is not None:
        resume(loop, found)
        _log.info("resumed from %s", found.folder)
    elif backend.rank == 0:
        write_settings(folder, role, built)
    began_at = loop.state.step
    whose = role if len(recipe.roles) > 1 else ""
    loggers = Loggers(folder, config.logger, role=whose, after=began_at) if backend.rank == 0 else None
    validation = _Validation(feed, recipe, loop)
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


def make_loop(config: RunConfig, recipe: Recipe, built: Built, backend: Backend, link: Links | None) -> TrainLoop:
    """The loop of a role at step 0, what it trains of its module adapted as the run asks."""
    role = built.spec.name
    module = adapt(config, role, built, base=base_dtype(recipe, role, accelerated=backend.device.type == "cuda"))
    if config.trainer.activation_checkpointing:
        checkpoint_activations(module, built.spec)
    return TrainLoop(
        module=module,
        role=built.spec,
        config=config.trainer,
        backend=backend,
        loss_weights=recipe.loss_weights(role),
        seed=config.seed,
        link=link,
        weights=built.weights,
    )


def adapt(config: RunConfig, role: str, built: Built, *, base: torch.dtype | None = None) -> nn.Module:
    """The module of ``role`` with what the run trains of it: all, or the parameters that ``recipe.train`` names.

    With low-rank updates these are trained beside the network, which is frozen, and kept in ``base`` (None: as it is
    built); where ``recipe.train`` says nothing, the role's heads are. ConfigError for names that match nothing.
    """
    settings = role_config(config, role)
    globs = config.recipe.train.get(role, [])
    if settings.peft.method == "lora":
        from actors.trainers.lora import apply_lora, cast_base

        apply_lora(built.module, built.spec, settings.peft, keep=globs, seed=config.seed, weights=built.weights)
        return built.module if base is None else cast_base(built.module, base)
    if globs:
        select_trained(built.module, globs, role)
    return built.module


def base_dtype(recipe: Recipe, role: str, *, accelerated: bool) -> torch.dtype:
    """In what a role's frozen network is kept beside low-rank updates while it trains (``peft.base_dtype``).

    ``accelerated``: it trains on a GPU.
    """
    settings = role_config(recipe.config, role)
    kept = settings.peft.base_dtype
    if kept == "auto":
        kept = "bfloat16" if accelerated and settings.trainer.precision == "bfloat16" else "stored"
    return recipe.stored_dtype(role) if kept == "stored" else getattr(torch, kept)


def _joined(own: Checkpoints, folder: Path, loop: TrainLoop) -> Checkpoints | JointCheckpoints:
    """The role's checkpoints, which count only with those of the other roles where there are some."""
    if isinstance(loop.link, Link):
        return JointCheckpoints(folder / "checkpoints", own, loop.link, keep=own.keep)
    return own


def best_checkpoint(config: RunConfig, folder: Path, plan: EpochPlan, role: str) -> Found | None:
    """The checkpoint of ``role`` to evaluate: the best one, of a step that every role has; None without any."""
    own = open_checkpoints(config, folder, plan, role)
    if len(open_recipe(config).roles) == 1:
        return own.best()
    step = joint_best(folder / "checkpoints")
    return None if step is None else own.at(step)


def open_checkpoints(config: RunConfig, folder: Path, plan: EpochPlan, role: str = "") -> Checkpoints:
    """The checkpoints of one role of a run folder ("": its first), bound to the run's settings and data."""
    roles = open_recipe(config).roles
    own = role_config(config, role or roles[0])
    unset = RunConfig(encoders={name: EncoderConfig() for name in own.encoders})
    identity = Identity(settings=deciding_settings(own), plan=plan.digest, defaults=deciding_settings(unset))
    below = folder / "checkpoints" if len(roles) == 1 else folder / "checkpoints" / (role or roles[0])
    return Checkpoints(below, identity, keep=config.trainer.keep_checkpoints)


def write_settings(folder: Path, role: str, built: Built) -> None:
    """Keep what the role's module is made from, for evaluation."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    (folder / "models" / f"{role}.json").write_text(json.dumps(dict(built.settings), indent=1))


def read_settings(folder: Path, role: str) -> dict[str, Any] | None:
    """What :func:`write_settings` kept; None where nothing was trained."""
    path = folder / "models" / f"{role}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def deciding_settings(config: RunConfig) -> dict[str, Any]:
    """Flat settings that decide what is trained. The data are named by the plan's digest, not by their place."""
    recipe = dataclasses.asdict(config.recipe)
    recipe["spa3_vlm"].pop("baseline")  # what a run is compared with
    chosen: dict[str, Any] = {
        "seed": config.seed,
        "recipe": recipe,
        "model": dataclasses.asdict(config.model),
        "encoders": {
            name: {k: v for k, v in dataclasses.asdict(encoder).items() if k != "batch_size"}
            for name, encoder in config.encoders.items()
        },
        "cache.codec": config.cache.codec,
        "peft": dataclasses.asdict(config.peft),
        "roles": {name: dataclasses.asdict(role) for name, role in config.roles.items()},
        "data.augment": dataclasses.asdict(config.data.augment),
        "data.text": dataclasses.asdict(config.data.text),
        "trainer": {k: v for k, v in dataclasses.asdict(config.trainer).items() if k not in _TRAINER_FREE},
    }
    return {key: as_run(value) if isinstance(value, str) else value for key, value in _flatten("", chosen)}


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value


def _report_broken(broken: Mapping[str, str]) -> None:
    for sample, reason in broken.items():
        _log.warning("%s is left out: %s", sample, reason)


class _Validation:
    """The validation hook: every rank takes its share of the split, the tallies are added up."""

    def __init__(self, feed: Feed, recipe: Recipe, loop: TrainLoop) -> None:
        self._feed, self._recipe, self._loop = feed, recipe, loop
        self.possible = any(manifest.of_split(Split.VAL) for manifest in feed.manifests.values())
        self.last: Metrics = {}

    def __call__(self, module: nn.Module) -> Metrics:
        role, backend = self._loop.role, self._loop.backend
        tally = self._recipe.tally(role.name, self._feed)
        plan = self._feed.plan(Split.VAL)
        with closing(self._feed.load(plan, rank=backend.rank, world_size=backend.world_size)) as loader:
            for step in loader:
                self._loop.forward_only(step, functools.partial(tally.update, module, role))
        mine, *others = backend.exchange(tally)
        for other in others:
            mine.merge(other)
        self.last = mine.compute()
        return self.last


def train_roles_inline(config: RunConfig, folder: Path, feed: Feed, device: str) -> RoleResult:
    """Train all roles in this process, without Ray: what a split run computes, and what one debugs.

    ``feed`` is that of the recipe's first role. Returns what the first role came to.
    """
    from actors.bridge.local import run_roles
    from actors.trainers.backends.single import SingleBackend

    recipe = open_recipe(config)
    if len(recipe.roles) == 1:
        return train_role(config, folder, feed, SingleBackend(device))
    with ExitStack() as open_feeds:
        feeds = {recipe.roles[0]: feed}
        for role in recipe.roles[1:]:
            feeds[role] = open_feeds.enter_context(closing(feed.for_role(role)))

        generation = next_generation(folder / "checkpoints")

        def task(role: str, transport: Transport) -> RoleResult:
            link = Link(
                transport,
                role=role,
                rank=0,
                roles=dict.fromkeys(recipe.roles, 1),
                edges=recipe.edges,
                window=config.bridge.window,
                generation=generation,
                device=device,
            )
            with link:
                return train_role(config, folder, feeds[role], SingleBackend(device), role=role, link=link)

        results = run_roles({role: functools.partial(task, role) for role in recipe.roles})
    return results[recipe.roles[0]]
