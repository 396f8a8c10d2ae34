"""From a configuration to its plan. Pure arithmetic over the parts of this package; see :func:`plan`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.preflight import checks
from actors.preflight.batches import ANSWERED, Lengths
from actors.preflight.cached import cache_plan
from actors.preflight.encoders import EncoderCost, encoder_costs
from actors.preflight.missing import missing
from actors.preflight.plan import EdgePlan, Plan
from actors.preflight.rates import Rates, measured_rates
from actors.preflight.roles import RoleCost, role_costs
from actors.preflight.schedule import schedule
from actors.preflight.sizes import DataSize, data_sizes, most_pictures
from actors.preflight.strategies import strategies
from actors.preflight.view_sets import Drawn, describe_choices, drawn
from actors.preflight.workers import node_plan, role_plan
from actors.recipes import open_recipe
from configs.schema import RunConfig
from services.errors import PlacementError
from services.runtime import placement
from services.runtime.placement import Node
from services.streams.sampling import PAIR_KINDS

LEAST_TEXT = 64
"""Tokens of a conversation that are not its pictures', at least."""


def plan(
    config: RunConfig,
    *,
    rates: Path | None = None,
    address: str = "",
    nodes: Sequence[Node] = (),
    fetch: bool = False,
    compare: bool = False,
) -> Plan:
    """What a run of ``config`` needs, without starting it.

    Args:
        config: The run.
        rates: Run folder whose measured step and encode times replace FLOPs over given TFLOP/s.
        address: A running cluster whose nodes are used instead of ``cluster.nodes``.
        nodes: The nodes, where they are known already.
        compare: Say what every backend would need, with and without low-rank updates.
        fetch: Try to have weights and tokenizers with hub names, as the run would, before they count as missing.

    Raises:
        LoomError, ModelError, ConfigError: what is asked for cannot be described (an unknown model, weights whose
            architecture is not known, data that are not there). What merely does not fit is in ``problems``.
    """
    machines = list(nodes) or _machines(config, address)
    encoders = encoder_costs(config)
    absent = missing(config, encoders, fetch=fetch)
    data = data_sizes(config)
    sizes = ragged_lengths(config, encoders, data)
    classes = max(size.classes for size in data) or 1
    costs = role_costs(config, encoders, classes, sizes)
    sets = drawn(config, data)
    cache = cache_plan(config, encoders, data, sets)
    bundles = placement.bundles_from_config(config)
    placed, problems = _place(config, bundles, machines)
    roles = tuple(role_plan(config, bundle, placed.get(bundle.role, ()), costs, encoders) for bundle in bundles)
    node_plans = tuple(node_plan(node, roles) for node in machines)
    problems += [
        *checks.storage_problems(config, node_plans),
        *checks.memory_problems(roles, node_plans, checks.gpu_memory_gb(config)),
        *checks.disk_problems(config, cache),
        *checks.data_problems(config, data),
        *checks.leak_problems(config),
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
        edges=_edges(config, costs),
        encoders=tuple(encoders.values()),
        data=tuple(data),
        cache=cache,
        schedule=schedule(config, costs, encoders, data, cache, found, sets),
        problems=tuple(problems),
        missing=tuple(absent),
        strategies=strategies(config, encoders, classes, sizes, roles, machines, costs) if compare else (),
        notes=(
            *_notes(config, data, encoders, costs, sizes),
            *_set_notes(config, sets, encoders),
            *_beside_notes(config),
        ),
    )


def check(config: RunConfig, nodes: Sequence[Node] = ()) -> Plan:
    """:func:`plan`, for the driver: PlacementError with every reason why the run cannot start.

    What is missing counts here; a plan may be made before it was trained or fetched.
    """
    found = plan(config, nodes=nodes, fetch=True)
    problems = [*found.problems, *found.missing]
    if problems:
        raise PlacementError("the run cannot start:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return found


def _edges(config: RunConfig, costs: Mapping[str, RoleCost]) -> tuple[EdgePlan, ...]:
    """What crosses in a step between the roles that the recipe trains."""
    found = []
    for edge in open_recipe(config).edges:
        workers = min(config.cluster.roles[edge.source].workers)
        found.append(
            EdgePlan(
                source=edge.source,
                target=edge.target,
                tensors=tuple(tensor.name for tensor in edge.tensors),
                kinds=edge.kinds,
                forward_bytes=workers * costs[edge.source].sends.get(edge.target, 0),
                backward_bytes=workers * costs[edge.source].receives.get(edge.target, 0),
            )
        )
    return tuple(found)


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


def _set_notes(config: RunConfig, sets: Drawn | None, encoders: Mapping[str, EncoderCost]) -> list[str]:
    if sets is None:
        return []
    return [describe_choices(config, sets, {name: encoder.record_bytes for name, encoder in encoders.items()})]


def _beside_notes(config: RunConfig) -> list[str]:
    """That the recipe trains another run first, to compare with."""
    baseline = open_recipe(config).baseline(config.name or f"{config.recipe.name}-{config.size}")
    if baseline is None or baseline.config is None:
        return []
    return [
        f"two trainings run: first {baseline.name} ({baseline.title}), which this run is compared with, unless it is "
        "there; what stands here is of one of them"
    ]


def ragged_lengths(config: RunConfig, encoders: Mapping[str, EncoderCost], data: Sequence[DataSize]) -> Lengths:
    """A conversation is taken to be as long as it may be, with as many pictures as fit beside some text; sets too."""
    grids = [
        math.prod(int(axis or 1) for axis in e.outputs["tokens"].shape[-3:-1])
        for e in encoders.values()
        if "tokens" in e.outputs
    ]
    room = (config.data.text.max_length - LEAST_TEXT) // max(grids, default=1)
    sets = config.recipe.view_set
    most = sets.views[-1]
    pictures, frame, geometry = max(1, min(most_pictures(data), room)), (0, 0), 0
    if config.recipe.name == "spa3_vlm":
        frame, geometry = _grid(encoders["visual"]), math.prod(_grid(encoders["views"])) if "views" in encoders else 0
        room = (config.data.text.max_length - LEAST_TEXT) // math.prod(frame)
        pictures = max(1, min(most_pictures(data), room))
    return Lengths(
        views=pictures,
        tokens=config.data.text.max_length,
        set_views=most,
        set_contexts=max(1, int(most * (1 - sets.target_ratio) + 1e-9)),
        frame=frame,
        set_tokens=pictures * geometry,
        packed=config.recipe.spa3_vlm.questions_per_sample,
    )


def _grid(encoder: EncoderCost) -> tuple[int, int]:
    """Rows and columns of an encoder's tokens."""
    rows, columns = (int(axis or 1) for axis in encoder.outputs["tokens"].shape[-3:-1])
    return rows, columns


def _notes(
    config: RunConfig,
    data: Sequence[DataSize],
    encoders: Mapping[str, EncoderCost],
    costs: Mapping[str, RoleCost],
    sizes: Lengths,
) -> list[str]:
    notes = []
    for size in (size for size in data if not size.known):
        if size.of:
            notes.append(
                f"source {size.source} is made of the scenes of {size.of} when the run starts: epochs leave it out"
            )
        else:
            notes.append(
                f"source {size.source} is not indexed yet ({size.scenes} scenes): bytes and epochs leave it out; "
                "run `loom3d data index` first"
            )
    kinds = {kind for cost in costs.values() for kind in cost.kinds}
    if kinds & PAIR_KINDS.keys() and any(size.pairs is None and size.views for size in data):
        notes.append("pairs are not measured yet: an epoch is taken to have as many as views; see `loom3d data pairs`")
    if "conversation" in kinds:
        notes.append(
            f"a conversation is taken to be as long as it may be: {sizes.tokens} tokens (data.text.max_length), "
            f"{sizes.views} picture{'s' if sizes.views > 1 else ''} among them, {ANSWERED:.0%} of the text answers"
        )
    if config.cluster.mode == "inline":
        notes.append("cluster.mode=inline: one process, so memory adds up and encoding waits for training")
    for name, encoder in encoders.items():
        if not encoder.flops:
            notes.append(f"the work of encoder {name} was not counted; its time is left out")
    return notes
