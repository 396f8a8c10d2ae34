"""Bin-packs the workers of all roles onto nodes, before any actor exists. Pure functions over lists: no Ray.

Ray leaves a group that fits nowhere pending for ever; here it is an error that names the role and what is short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from configs.schema import ClusterConfig, RunConfig
from services.errors import PlacementError

_SEARCH_LIMIT = 50_000
_EPSILON = 1e-6
MEMORY = "memory_gb"
ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine: what it offers (``CPU``, ``GPU``, ``memory_gb``, custom resources) and its labels."""

    name: str
    offers: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What ``count`` workers of a role ask for each; every worker lies on one node."""

    role: str
    count: int
    asks: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where every worker goes, and what is left on each node."""

    nodes: Mapping[str, tuple[str, ...]]
    """Role -> the node of each worker."""
    free: Mapping[str, Mapping[str, float]]
    """Node -> what it still offers."""


def role_resource(role: str) -> str:
    """Custom resource that holds the workers of a role on the nodes meant for it."""
    return f"role_{role}"


def nodes_from_config(cluster: ClusterConfig) -> list[Node]:
    """The nodes that ``cluster.nodes`` describes. A kind without role resources may hold every role."""
    nodes = []
    for kind, spec in cluster.nodes.items():
        offers = {"CPU": spec.num_cpus, "GPU": spec.num_gpus, MEMORY: spec.memory_gb, **spec.resources}
        if spec.accelerator:
            offers[ACCELERATOR + spec.accelerator] = 1.0
        if not any(name.startswith(role_resource("")) for name in spec.resources):
            offers |= {role_resource(role): float("inf") for role in (*cluster.roles, "feature")}
        nodes += [Node(name=f"{kind}-{i}" if spec.count > 1 else kind, offers=offers) for i in range(spec.count)]
    return nodes


def nodes_from_ray(listing: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The living nodes of ``ray.nodes()``; memory in GB."""
    nodes = []
    for entry in listing:
        if not entry.get("Alive", True):
            continue
        offers = dict(entry["Resources"])
        offers[MEMORY] = offers.pop("memory", 0.0) / 1e9
        nodes.append(Node(name=entry.get("NodeName") or entry["NodeID"], offers=offers, labels=entry.get("Labels", {})))
    return nodes


def bundles_from_config(config: RunConfig) -> list[Bundle]:
    """What the roles of a run ask for at their smallest size, the feature service with them."""
    bundles = []
    for role, spec in config.cluster.roles.items():
        asks = {"CPU": spec.num_cpus, "GPU": spec.num_gpus, MEMORY: spec.memory_gb, role_resource(role): 1.0}
        if spec.accelerator:
            asks[ACCELERATOR + spec.accelerator] = 0.001
        bundles.append(Bundle(role=role, count=min(spec.workers), asks=_positive(asks)))
    service = config.service
    if service.replicas and config.cluster.mode != "inline":
        asks = {"GPU": service.num_gpus, role_resource("feature"): 1.0}
        bundles.append(Bundle(role="feature", count=service.replicas, asks=_positive(asks)))
    return bundles


def largest_sizes(config: RunConfig, nodes: Sequence[Node]) -> dict[str, int]:
    """Workers of every role, for a run that starts now: the most that the role's range and ``nodes`` allow.

    A size divides ``trainer.micro_batch``. Earlier roles choose first; all get their smallest size in any case.
    PlacementError when even those do not fit.
    """
    batch = config.trainer.micro_batch
    bundles = bundles_from_config(config)
    place(bundles, nodes)
    sizes = {role: min(spec.workers) for role, spec in config.cluster.roles.items()}
    for role, spec in config.cluster.roles.items():
        for size in range(max(spec.workers), sizes[role], -1):
            if batch % size == 0 and _placeable(
                [replace(b, count=size) if b.role == role else b for b in bundles], nodes
            ):
                sizes[role] = size
                bundles = [replace(b, count=size) if b.role == role else b for b in bundles]
                break
    return sizes


def _placeable(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> bool:
    try:
        place(bundles, nodes)
    except PlacementError:
        return False
    return True


def place(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> Placement:
    """A node for every worker. PlacementError names the role that does not fit and what is short.

    Workers that ask for more go first, each to the fitting node with least room, and the search steps back where
    that fails, so that what fits is found for the sizes of real clusters.
    """
    total = Counter[str]()
    for node in nodes:
        total.update(node.offers)
    workers = [bundle for bundle in bundles for _ in range(bundle.count)]
    workers.sort(key=lambda bundle: (-_share(bundle, total), bundle.role))
    free = {node.name: dict(node.offers) for node in nodes}
    labels = {node.name: node.labels for node in nodes}
    if len(free) != len(nodes):
        raise PlacementError(f"two nodes have one name: {sorted(node.name for node in nodes)}")
    for bundle in bundles:
        _check_alone(bundle, nodes)
    chosen: list[str] = []
    budget = [_SEARCH_LIMIT]
    deepest: list[int] = [0]
    if not _search(workers, 0, free, labels, chosen, budget, deepest):
        raise PlacementError(_shortfall(workers, deepest[0], nodes))
    assigned: dict[str, list[str]] = {bundle.role: [] for bundle in bundles}
    for bundle, name in zip(workers, chosen, strict=True):
        assigned[bundle.role].append(name)
    return Placement(nodes={role: tuple(names) for role, names in assigned.items()}, free=free)


def _positive(asks: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in asks.items() if amount > 0}


def _share(bundle: Bundle, total: Mapping[str, float]) -> float:
    """The largest share of the cluster that one worker takes; without any on offer, all of it."""
    return max((amount / total[name] if total.get(name) else 1.0 for name, amount in bundle.asks.items()), default=0.0)


def _fits(bundle: Bundle, offers: Mapping[str, float], labels: Mapping[str, str]) -> bool:
    enough = all(offers.get(name, 0.0) + _EPSILON >= amount for name, amount in bundle.asks.items())
    return enough and all(labels.get(name) == value for name, value in bundle.labels.items())


def _search(
    workers: Sequence[Bundle],
    position: int,
    free: dict[str, dict[str, float]],
    labels: Mapping[str, Mapping[str, str]],
    chosen: list[str],
    budget: list[int],
    deepest: list[int],
) -> bool:
    deepest[0] = max(deepest[0], position)
    if position == len(workers):
        return True
    worker, tried = workers[position], set()
    candidates = [name for name in free if _fits(worker, free[name], labels[name])]
    for name in sorted(candidates, key=lambda n: (sum(min(v, 1e9) for v in free[n].values()), n)):
        # Nodes in the same state lead to the same end.
        state = (tuple(sorted(free[name].items())), tuple(sorted(labels[name].items())))
        if state in tried:
            continue
        tried.add(state)
        budget[0] -= 1
        if budget[0] < 0:
            return False
        before = dict(free[name])
        for resource, amount in worker.asks.items():
            free[name][resource] -= amount
        chosen.append(name)
        if _search(workers, position + 1, free, labels, chosen, budget, deepest):
            return True
        chosen.pop()
        free[name] = before
    return False


def _check_alone(bundle: Bundle, nodes: Sequence[Node]) -> None:
    """A worker that no empty node could hold."""
    if not bundle.count or any(_fits(bundle, node.offers, node.labels) for node in nodes):
        return
    lines = []
    for node in nodes:
        short = [
            f"{name} {amount:g} of {node.offers.get(name, 0.0):g}"
            for name, amount in bundle.asks.items()
            if node.offers.get(name, 0.0) + _EPSILON < amount
        ]
        short += [f"label {k}={v}" for k, v in bundle.labels.items() if node.labels.get(k) != v]
        lines.append(f"{node.name}: asks for {', '.join(short)}")
    raise PlacementError(
        f"one worker of role {bundle.role!r} fits no node ({'; '.join(lines) or 'there are no nodes'}); "
        "change cluster.roles or cluster.nodes"
    )


def _shortfall(workers: Sequence[Bundle], placed: int, nodes: Sequence[Node]) -> str:
    stuck = workers[placed]
    asked, offered = Counter[str](), Counter[str]()
    for worker in workers:
        asked.update(worker.asks)
    for node in nodes:
        offered.update(node.offers)
    short = {name: asked[name] - offered[name] for name in asked if asked[name] > offered[name] + _EPSILON}
    why = (
        "short of " + ", ".join(f"{amount:g} {name}" for name, amount in sorted(short.items()))
        if short
        else "the sums would do, but no way to cut them into nodes was found"
    )
    done = sum(worker.role == stuck.role for worker in workers[:placed])
    wanted = sum(worker.role == stuck.role for worker in workers)
    return (
        f"role {stuck.role!r} gets {done} of {wanted} workers, each asking for "
        f"{', '.join(f'{v:g} {k}' for k, v in stuck.asks.items())}: {why}; "
        "lower cluster.roles.<role>.workers or service.replicas, or add nodes"
    )
