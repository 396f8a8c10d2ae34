"""From a configuration to its plan. Pure arithmetic over the parts of this package; see :func:`plan`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.preflight import checks
from actors.preflight.batches import Lengths
from actors.preflight.encoders import EncoderCost, encoder_costs, with_upstreams
from actors.preflight.memory import PROCESS_BYTES
from actors.preflight.plan import CachePlan, NodePlan, Plan, RolePlan
from actors.preflight.rates import Rates, measured_rates
from actors.preflight.roles import RoleCost, role_costs
from actors.preflight.schedule import schedule
from actors.preflight.sizes import DataSize, data_sizes, most_pictures
from configs.schema import RunConfig
from services.errors import PlacementError
from services.runtime import placement
from services.runtime.placement import Node
from services.streams.inputs import entry_kinds, used_encoders

LEAST_TEXT = 64
"""Tokens of a conversation that are not its pictures', at least."""


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
    encoders = encoder_costs(config)
    data = data_sizes(config)
    costs = role_costs(config, encoders, max(size.classes for size in data) or 1, _lengths(config, encoders, data))
    records = _records(config, encoders, data)
    cache = _cache(config, encoders, records)
    bundles = placement.bundles_from_config(config)
    placed, problems = _place(config, bundles, machines)
    roles = tuple(_role(config, bundle, placed.get(bundle.role, ()), costs, encoders) for bundle in bundles)
    node_plans = tuple(_node(node, roles) for node in machines)
    gpu_memory = max((spec.gpu_memory_gb for spec in config.cluster.nodes.values()), default=0.0)
    problems += [
        *checks.storage_problems(config, node_plans),
        *checks.memory_problems(roles, node_plans, gpu_memory),
        *checks.disk_problems(config, cache),
    ]
    found = measured_rates(rates) if rates else Rates()
    return Plan(
        name=config.name or f"{config.recipe.name}-{config.size}",
        model=config.model.name,
        roles=roles,
        nodes=node_plans,
        steps=costs,
        samples={role: cost.samples for role, cost in costs.items()},
        peaks={role: cost.peak for role, cost in costs.items()},
        encoders=tuple(encoders.values()),
        data=tuple(data),
        cache=cache,
        schedule=schedule(config, costs, encoders, data, cache, found),
        problems=tuple(problems),
        notes=tuple(_notes(config, data, encoders)),
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
    costs: Mapping[str, RoleCost],
    encoders: Mapping[str, EncoderCost],
) -> RolePlan:
    """Memory of one worker: tensors on its GPU if it has one, else in host memory beside the process itself."""
    if bundle.role == "feature":
        # A replica runs all encoders that are asked for; one of them works at a time.
        working = max(e.memory(config.encoders[name].batch_size) - e.weight_bytes for name, e in encoders.items())
        peak = sum(encoder.weight_bytes for encoder in encoders.values()) + working
        buffers = config.cache.shard_bytes
    else:
        peak, buffers = costs[bundle.role].peak, config.trainer.prefetch_steps * costs[bundle.role].batch
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


def _records(config: RunConfig, encoders: Mapping[str, EncoderCost], data: Sequence[DataSize]) -> dict[str, int]:
    """Encoder -> records of all splits: one a picture that a kind of the run reads with it, or with one behind it."""
    kinds: dict[str, set[str]] = {name: set() for name in encoders}
    for name in used_encoders(config):
        for needed in with_upstreams(name, config):
            kinds[needed] |= entry_kinds(config, name)
    found = {}
    for name, wanted in kinds.items():
        entries = {"scene"} if "item" in wanted and all(size.of for size in data if size.most_pictures) else set()
        found[name] = sum(size.pictures_of(entry) for size in data for entry in wanted | entries)
    return found


def _cache(config: RunConfig, encoders: Mapping[str, EncoderCost], records: dict[str, int]) -> CachePlan:
    """Admission keeps what is there, so a budget gives its share of hits."""
    cache = config.cache
    total = sum(records[name] * encoder.record_bytes for name, encoder in encoders.items())
    share = 1.0 if not cache.budget_bytes or not total else min(1.0, cache.budget_bytes / total)
    share = 0.0 if cache.mode == "never" else share
    return CachePlan(
        mode=cache.mode,
        encoders=records,
        bytes=total,
        budget_bytes=cache.budget_bytes,
        hit_rates=(0.0, share, share),
    )


def _lengths(config: RunConfig, encoders: Mapping[str, EncoderCost], data: Sequence[DataSize]) -> Lengths:
    """A conversation is taken to be as long as it may be, with as many pictures as fit beside some text."""
    grids = [
        math.prod(int(axis or 1) for axis in e.outputs["tokens"].shape[1:3])
        for e in encoders.values()
        if "tokens" in e.outputs
    ]
    room = (config.data.text.max_length - LEAST_TEXT) // max(grids, default=1)
    return Lengths(views=max(1, min(most_pictures(data), room)), tokens=config.data.text.max_length)


def _notes(config: RunConfig, data: Sequence[DataSize], encoders: Mapping[str, EncoderCost]) -> list[str]:
    notes = [
        f"source {size.source} is not indexed yet ({size.scenes} scenes): bytes and epochs leave it out; "
        "run `loom3d data index` first"
        for size in data
        if not size.known
    ]
    if config.cluster.mode == "inline":
        notes.append("cluster.mode=inline: one process, so memory adds up and encoding waits for training")
    for name, encoder in encoders.items():
        notes += checks.weights_problems(config, encoder)
        if not encoder.flops:
            notes.append(f"the work of encoder {name} was not counted; its time is left out")
    return notes
