"""Every way of spreading a role's training over its workers, by the memory of one of them: `plan --strategies`.

The role is stepped without memory twice, trained whole and with low-rank updates; each backend then divides what that
found (:mod:`actors.preflight.memory`). All else is the run's: workers, micro-batch, precision, checkpointing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from actors.preflight import checks
from actors.preflight.batches import Lengths
from actors.preflight.encoders import EncoderCost
from actors.preflight.plan import RolePlan, Strategy
from actors.preflight.roles import RoleCost, Traced, trace_roles
from actors.preflight.workers import node_plan, role_plan
from configs.roles import role_config
from configs.schema import RunConfig
from models.errors import ModelError
from services.runtime import placement
from services.runtime.placement import Node

BACKENDS: Sequence[tuple[str, str]] = (
    ("ddp", "none"),
    ("fsdp2", "none"),
    ("zero2", "none"),
    ("zero2", "optimizer"),
    ("zero3", "none"),
    ("zero3", "optimizer"),
    ("zero3", "parameters"),
)
"""backend.name, backend.offload."""

METHODS = ("none", "lora")
"""peft.method."""


def strategies(
    config: RunConfig,
    encoders: Mapping[str, EncoderCost],
    classes: int,
    lengths: Lengths,
    roles: Sequence[RolePlan],
    nodes: Sequence[Node],
    costs: Mapping[str, RoleCost],
) -> tuple[Strategy, ...]:
    """Every strategy of every role that the recipe trains.

    Args:
        config: The run.
        encoders: Those that it uses.
        classes: Semantic classes of the data.
        lengths: Of ragged columns.
        roles: As the run has them, with their places.
        nodes: The machines.
        costs: Of the roles as the run has them.
    """
    bundles = {bundle.role: bundle for bundle in placement.bundles_from_config(config)}
    found = []
    for peft, traced in _traced(config, encoders, classes, lengths):
        for role, trace in traced.items():
            own = role_config(config, role)
            workers = min(config.cluster.roles[role].workers)
            for backend, offload in BACKENDS:
                if backend == "zero3" and own.trainer.ema > 0:
                    continue  # refused: no rank holds the weights that would be averaged
                settings = dataclasses.replace(own.backend, name=backend, offload=offload)
                cost = trace.on(settings, workers, accelerated=config.cluster.roles[role].num_gpus > 0)
                placed = next(plan.nodes for plan in roles if plan.role == role)
                mine = role_plan(config, bundles[role], placed, {**costs, role: cost}, encoders)
                changed = [mine if plan.role == role else plan for plan in roles]
                problems = checks.memory_problems(
                    changed, [node_plan(node, changed) for node in nodes], checks.gpu_memory_gb(config)
                )
                found.append(
                    Strategy(
                        role=role,
                        peft=peft,
                        backend=backend,
                        offload=offload,
                        trainable=cost.trainable,
                        device_bytes=mine.device_bytes,
                        host_bytes=mine.host_bytes,
                        room_bytes=int(mine.asks.get("GPU", 0.0) * checks.gpu_memory_gb(config) * checks.GB),
                        problems=tuple(problems),
                        chosen=(peft, backend, offload) == (own.peft.method, own.backend.name, own.backend.offload),
                    )
                )
    return tuple(sorted(found, key=lambda one: (list(costs).index(one.role), METHODS.index(one.peft))))


def _traced(
    config: RunConfig, encoders: Mapping[str, EncoderCost], classes: int, lengths: Lengths
) -> Iterator[tuple[str, dict[str, Traced]]]:
    """The roles trained whole, and with low-rank updates where the model names layers for them."""
    for method in METHODS:
        changed = dataclasses.replace(
            config,
            peft=dataclasses.replace(config.peft, method=method),
            roles={
                name: dataclasses.replace(given, peft=method if given.peft else "")
                for name, given in config.roles.items()
            },
        )
        try:
            yield method, trace_roles(changed, encoders, classes, lengths)
        except ModelError:
            if method == "none":
                raise
