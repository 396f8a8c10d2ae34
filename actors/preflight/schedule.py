"""Steps and time of a run: what its roles compute, its encoders encode and its readers read, beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from actors.preflight.encoders import EncoderCost
from actors.preflight.plan import CachePlan, Schedule
from actors.preflight.rates import Rates
from actors.preflight.roles import RoleCost
from actors.preflight.sizes import DataSize
from actors.preflight.view_sets import KIND as VIEW_SET
from actors.preflight.view_sets import Drawn
from configs.schema import NodeConfig, RunConfig
from services.features.encode import ragged_length
from services.runtime import placement
from services.streams.inputs import ALL, FeatureInput, kind_inputs, view_axes
from services.streams.plan import micro_batch_kinds
from services.streams.requests import reads_one_by_one

#: Share of a training step's FLOPs that its forward pass takes (backward costs two forward passes).
FORWARD = 1 / 3

SPLITS = ("train", "val", "test")


def schedule(
    config: RunConfig,
    costs: Mapping[str, RoleCost],
    encoders: Mapping[str, EncoderCost],
    data: Sequence[DataSize],
    cache: CachePlan,
    rates: Rates,
    sets: Drawn | None = None,
) -> Schedule:
    """Steps, epochs and seconds; ``sets`` says what drawing view sets gave.

    Roles work beside each other, so a step lasts as long as the slowest of them; in one process, as long as all
    together.
    """
    trainer = config.trainer
    samples = trainer.micro_batch * trainer.accumulation
    counts = Counter(micro_batch_kinds(config.recipe.quotas, trainer.accumulation))
    units = {split: {kind: sum(size.units(kind, split) for size in data) for kind in counts} for split in SPLITS}
    steps_per_epoch = min(units["train"][kind] // (trainer.micro_batch * count) for kind, count in counts.items())
    if sets is not None:
        units = {split: {VIEW_SET: count} for split, count in sets.sets.items()}
        steps_per_epoch = sets.steps_per_epoch
    epochs = trainer.steps / steps_per_epoch if steps_per_epoch else 0.0
    seconds = {role: cost.flops / _rate(config, role) for role, cost in costs.items()}
    slowest = max(seconds, key=seconds.__getitem__)
    computed = sum(seconds.values()) if config.cluster.mode == "inline" else seconds[slowest]
    step_s = rates.step_s or computed
    # A measured step includes its reading.
    read_s = 0.0 if rates.step_s else max(_read_seconds(config, role, encoders, counts) for role in costs)
    encode_s = sum(_encode_seconds(config, encoder, rates) * cache.inputs[name] for name, encoder in encoders.items())
    total = sum(sum(by_kind.values()) for by_kind in units.values())
    train_share = sum(units["train"].values()) / total if total else 0.0
    training = "training" if len(costs) == 1 else f"training {slowest}"
    compared = steps_per_epoch or trainer.steps  # an epoch; or the whole run, where epochs are not known
    first = {
        "encoding": encode_s * (train_share if steps_per_epoch else 1),
        "reading": read_s * compared,
        training: step_s * compared,
    }
    later = first | {"encoding": (1 - cache.hit_rates[1]) * first["encoding"]}
    if sets is not None:
        first["encoding"], later["encoding"] = (
            sum(_encode_seconds(config, encoders[name], rates) * count for name, count in epoch.items())
            for epoch in sets.encodings[:2]
        )
    streaming = min(1.0, epochs) * max(first.values()) + max(0.0, epochs - 1) * max(later.values())
    if not steps_per_epoch:
        streaming = max(first.values())
    validations = trainer.steps // trainer.validate_every if trainer.validate_every else 0
    judged = validations * sum(units["val"].values()) + total
    validate_s = judged / samples * max(step_s * FORWARD, read_s)
    train_s = trainer.steps * step_s
    return Schedule(
        steps=trainer.steps,
        samples_per_step=samples,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        encode_s=encode_s,
        train_s=train_s,
        role_s={role: trainer.steps * each for role, each in seconds.items()},
        read_s=read_s * trainer.steps,
        validate_s=validate_s,
        total_s=streaming + validate_s,
        bottlenecks=(max(first, key=first.__getitem__), max(later, key=later.__getitem__)),
        rates=rates.source,
    )


def _encode_seconds(config: RunConfig, encoder: EncoderCost, rates: Rates) -> float:
    """Seconds of one input on all replicas together."""
    return (rates.encode_s or encoder.flops / _rate(config, "feature")) / max(1, config.service.replicas)


def _read_seconds(
    config: RunConfig, role: str, encoders: Mapping[str, EncoderCost], counts: Mapping[str, int]
) -> float:
    """Seconds in which all workers of a role together read the features of a step."""
    inputs, read = kind_inputs(config, role), 0
    for kind, count in counts.items():
        for feature in inputs[kind].features if kind in inputs else ():
            views = views_of(kind, feature)
            if kind == VIEW_SET and reads_one_by_one(feature.encoder, config):
                views = ragged_length(feature.encoder, config, sets=True)
            read += count * config.trainer.micro_batch * views * encoders[feature.encoder].record_bytes
    slowest = min(node.read_gb_s for node in _holders(config, role))
    return read / (slowest * 1e9 * min(config.cluster.roles[role].workers))


def views_of(kind: str, feature: FeatureInput) -> int:
    """Records of an encoder that a sample reads; of a ragged number of views, one is counted."""
    axes = view_axes(kind)
    return (axes[0] or 1) if axes and feature.views == ALL else 1


def _rate(config: RunConfig, role: str) -> float:
    """FLOP/s of one worker of ``role``."""
    return min(node.tflops for node in _holders(config, role)) * 1e12


def _holders(config: RunConfig, role: str) -> list[NodeConfig]:
    """Kinds of node that hold the resource of ``role``; all of them, where none names it."""
    nodes = list(config.cluster.nodes.values())
    return [node for node in nodes if placement.role_resource(role) in node.resources] or nodes
