"""From a configuration to its plan. Pure arithmetic over the parts of this package; see :func:`plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from actors.preflight import checks
from actors.preflight.encoders import EncoderCost, encoder_cost
from actors.preflight.memory import PROCESS_BYTES, StepCost
from actors.preflight.plan import CachePlan, NodePlan, Plan, RolePlan, Schedule
from actors.preflight.rates import Rates, measured_rates
from actors.preflight.roles import role_cost
from actors.preflight.sizes import DataSize, data_sizes
from configs.schema import NodeConfig, RunConfig
from services.errors import PlacementError
from services.runtime import placement
from services.runtime.placement import Node

#: Share of a training step's FLOPs that its forward pass takes (backward costs two forward passes).
FORWARD = 1 / 3


def plan(config: RunConfig, *, rates: Path | None = None, address: str = "", nodes: Sequence[Node] = ()) -> Plan:
    """What a run of ``config`` needs, without starting it.

    Args:
        config: The run.
        rates: Run folder whose measured step and encode times replace FLOPs over given TFLOP/s.
        address: A running cluster whose nodes are used instead of ``cluster.nodes``.
        nodes: The nodes, where they are known already.

    Raises:
        LoomError, ModelError, ConfigError: what is asked for cannot be described (an unknown model, weights whose
            architecture is not known, data that are not there). What merely does not fit is in ``problems``.
    """
    machines = list(nodes) or _machines(config, address)
    features = encoder_cost(config.recipe.features, config)
    data = data_sizes(config)
    role = next(iter(config.cluster.roles))
    workers = min(config.cluster.roles[role].workers)
    step = role_cost(config, features, max(size.classes for size in data) or 1, workers)
    peak = step.peak(config.trainer.accumulation)
    cache = _cache(config, features, data)
    bundles = placement.bundles_from_config(config)
    placed, problems = _place(config, bundles, machines)
    roles = tuple(_role(config, bundle, placed.get(bundle.role, ()), peak, step, features) for bundle in bundles)
    node_plans = tuple(_node(node, roles) for node in machines)
    gpu_memory = max((spec.gpu_memory_gb for spec in config.cluster.nodes.values()), default=0.0)
    problems += [
        *checks.storage_problems(config, node_plans),
        *checks.memory_problems(roles, node_plans, gpu_memory),
        *checks.disk_problems(config, cache),
    ]
    return Plan(
        name=config.name or f"{config.recipe.name}-{config.size}",
        model=config.model.name,
        roles=roles,
        nodes=node_plans,
        steps={role: step},
        samples={role: config.trainer.micro_batch // workers},
        peaks={role: peak},
        encoders=(features,),
        data=tuple(data),
        cache=cache,
        schedule=_schedule(config, step, features, data, cache, measured_rates(rates) if rates else Rates()),
        problems=tuple(problems),
        notes=tuple(_notes(config, data, features)),
    )


def check(config: RunConfig, nodes: Sequence[Node] = ()) -> Plan:
    """:func:`plan`, for the driver: PlacementError with every reason why the run cannot start.

    Weights that are missing count here; a plan may be made before they are fetched.
    """
    found = plan(config, nodes=nodes)
    problems = [*found.problems, *(p for e in found.encoders for p in checks.weights_problems(config, e))]
    if problems:
        raise PlacementError("the run cannot start:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return found


def _machines(config: RunConfig, address: str) -> list[Node]:
    if not address:
        return placement.nodes_from_config(config.cluster)
    from services.runtime.nodes import running_nodes

    cluster = dataclasses.replace(config.cluster, mode="attach", address=address)
    return running_nodes(dataclasses.replace(config, cluster=cluster))


def _place(
    config: RunConfig, bundles: Sequence[placement.Bundle], machines: Sequence[Node]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Role -> node of each worker; and why not, if they do not fit. Without Ray all is in one process."""
    if config.cluster.mode == "inline":
        return {bundle.role: (machines[0].name,) * bundle.count for bundle in bundles}, []
    try:
        return dict(placement.place(bundles, machines).nodes), []
    except PlacementError as error:
        return {}, [str(error)]


def _role(
    config: RunConfig,
    bundle: placement.Bundle,
    nodes: tuple[str, ...],
    peak: int,
    step: StepCost,
    features: EncoderCost,
) -> RolePlan:
    """Memory of one worker: tensors on its GPU if it has one, else in host memory beside the process itself."""
    buffers = config.trainer.prefetch_steps * config.trainer.accumulation * step.batch
    if bundle.role == "feature":
        peak, buffers = features.memory(config.encoders[features.name].batch_size), config.cache.shard_bytes
    on_gpu = bundle.asks.get("GPU", 0.0) > 0
    return RolePlan(
        role=bundle.role,
        workers=bundle.count,
        asks=dict(bundle.asks),
        nodes=nodes,
        host_bytes=PROCESS_BYTES + buffers + (0 if on_gpu else peak),
        device_bytes=peak if on_gpu else 0,
    )


def _node(node: Node, roles: Sequence[RolePlan]) -> NodePlan:
    return NodePlan(
        name=node.name,
        offers=dict(node.offers),
        host_bytes=sum(role.host_bytes * role.nodes.count(node.name) for role in roles),
        device_bytes=sum(role.device_bytes * role.nodes.count(node.name) for role in roles),
    )


def _cache(config: RunConfig, features: EncoderCost, data: Sequence[DataSize]) -> CachePlan:
    """One record a view, of all splits. Admission keeps what is there, so a budget gives its share of hits."""
    cache = config.cache
    records = sum(size.total_views for size in data)
    total = records * features.record_bytes
    share = 1.0 if not cache.budget_bytes or not total else min(1.0, cache.budget_bytes / total)
    share = 0.0 if cache.mode == "never" else share
    return CachePlan(
        mode=cache.mode,
        records=records,
        record_bytes=features.record_bytes,
        budget_bytes=cache.budget_bytes,
        hit_rates=(0.0, share, share),
    )


def _schedule(
    config: RunConfig,
    step: StepCost,
    features: EncoderCost,
    data: Sequence[DataSize],
    cache: CachePlan,
    rates: Rates,
) -> Schedule:
    trainer = config.trainer
    samples = trainer.micro_batch * trainer.accumulation
    train_views = sum(size.views.get("train", 0) for size in data)
    steps_per_epoch = train_views // samples
    epochs = trainer.steps / steps_per_epoch if steps_per_epoch else 0.0
    step_s = rates.step_s or trainer.accumulation * step.flops / _rate(config, next(iter(config.cluster.roles)))
    encode_one = rates.encode_s or features.flops / _rate(config, "feature")
    encode_one /= max(1, config.service.replicas)
    # A measured step includes its reading.
    read_s = 0.0 if rates.step_s else samples * features.record_bytes / _reading_rate(config)
    views = {split: sum(size.views.get(split, 0) for size in data) for split in ("train", "val", "test")}
    first = {
        "encoding": encode_one * views["train"],
        "reading": read_s * steps_per_epoch,
        "training": step_s * steps_per_epoch,
    }
    later = first | {"encoding": (1 - cache.hit_rates[1]) * first["encoding"]}
    streaming = min(1.0, epochs) * max(first.values()) + max(0.0, epochs - 1) * max(later.values())
    validations = trainer.steps // trainer.validate_every if trainer.validate_every else 0
    judged = validations * views["val"] + sum(views.values())
    validate_s = judged / samples * max(step_s * FORWARD, read_s)
    train_s = trainer.steps * step_s
    return Schedule(
        steps=trainer.steps,
        samples_per_step=samples,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        encode_s=encode_one * cache.records,
        train_s=train_s,
        read_s=read_s * trainer.steps,
        validate_s=validate_s,
        total_s=(streaming or train_s) + validate_s,
        bottlenecks=(max(first, key=first.__getitem__), max(later, key=later.__getitem__)),
        rates=rates.source,
    )


def _rate(config: RunConfig, role: str) -> float:
    """FLOP/s of one worker of ``role``."""
    return min(node.tflops for node in _holders(config, role)) * 1e12


def _reading_rate(config: RunConfig) -> float:
    """Bytes/s at which all workers of the trained role read together."""
    role = next(iter(config.cluster.roles))
    slowest = min(node.read_gb_s for node in _holders(config, role))
    return slowest * 1e9 * min(config.cluster.roles[role].workers)


def _holders(config: RunConfig, role: str) -> list[NodeConfig]:
    """Kinds of node that hold the resource of ``role``; all of them, where none names it."""
    nodes = list(config.cluster.nodes.values())
    return [node for node in nodes if placement.role_resource(role) in node.resources] or nodes


def _notes(config: RunConfig, data: Sequence[DataSize], features: EncoderCost) -> list[str]:
    notes = [
        f"source {size.source} is not indexed yet ({size.scenes} scenes): bytes and epochs leave it out; "
        "run `loom3d data index` first"
        for size in data
        if not size.known
    ]
    if config.cluster.mode == "inline":
        notes.append("cluster.mode=inline: one process, so memory adds up and encoding waits for training")
    notes += checks.weights_problems(config, features)
    if not features.flops:
        notes.append(f"the work of encoder {features.name} was not counted; its time is left out")
    return notes
