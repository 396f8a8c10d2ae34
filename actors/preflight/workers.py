"""Memory of the workers of a run, one by one and node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.preflight.encoders import EncoderCost
from actors.preflight.memory import PROCESS_BYTES
from actors.preflight.plan import NodePlan, RolePlan
from actors.preflight.roles import RoleCost
from configs.schema import RunConfig
from services.runtime import placement
from services.runtime.placement import Node


def role_plan(
    config: RunConfig,
    bundle: placement.Bundle,
    nodes: tuple[str, ...],
    costs: Mapping[str, RoleCost],
    encoders: Mapping[str, EncoderCost],
) -> RolePlan:
    """Memory of one worker: tensors on its GPU if it has one, else in host memory beside the process itself."""
    # A replica runs all encoders that are asked for; one of them works at a time.
    working = max(e.memory(config.encoders[name].batch_size) - e.weight_bytes for name, e in encoders.items())
    encoding = sum(encoder.weight_bytes for encoder in encoders.values()) + working
    if bundle.role == "feature":
        peak, buffers = encoding, config.cache.shard_bytes
    else:
        cost = costs[bundle.role]
        peak, buffers = cost.peak, config.trainer.prefetch_steps * cost.batch + cost.host
        if config.cluster.mode == "inline" and bundle.role == next(iter(costs)):
            buffers += encoding  # in the one process that there is
    on_gpu = bundle.asks.get("GPU", 0.0) > 0
    return RolePlan(
        role=bundle.role,
        workers=bundle.count,
        asks=dict(bundle.asks),
        nodes=nodes,
        host_bytes=PROCESS_BYTES + buffers + (0 if on_gpu else peak),
        device_bytes=peak if on_gpu else 0,
    )


def node_plan(node: Node, roles: Sequence[RolePlan]) -> NodePlan:
    """A machine with what the workers placed on it use."""
    return NodePlan(
        name=node.name,
        offers=dict(node.offers),
        host_bytes=sum(role.host_bytes * role.nodes.count(node.name) for role in roles),
        device_bytes=sum(role.device_bytes * role.nodes.count(node.name) for role in roles),
    )
