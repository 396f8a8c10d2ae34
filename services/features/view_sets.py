"""The planned view sets of a source as requests, outside any run: for `features warm` and `features why`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from configs.schema import RunConfig
from services.contracts import FeatureRequest, PlanSample
from services.errors import ConfigError, DataError
from services.features.requests import encoder_config
from services.streams.inputs import kind_inputs
from services.streams.requests import column_requests, reads_one_by_one
from services.streams.sampling import sample_id, sampler
from services.streams.view_walks import WalkSampler

KIND = "view_set"


def reads_sets(name: str, config: RunConfig) -> bool:
    """Whether a record of encoder ``name`` is of a set of views."""
    from models.encoders.base import InputKind
    from models.encoders.families import input_kind

    while name:
        settings = encoder_config(name, config)
        if input_kind(settings.family) is InputKind.VIEWS:
            return True
        name = settings.upstream
    return False


def set_requests(
    config: RunConfig,
    encoder: str,
    source: str,
    manifest: Any,
    splits: Sequence[str] = (),
    *,
    item: str = "",
    unit: int | None = None,
) -> list[FeatureRequest]:
    """What a run asks ``encoder`` for, of every planned set in every partition; each input once.

    ``item`` and ``unit`` choose one set. ConfigError when the run plans no sets, or divides them anew in every epoch;
    DataError for a set that there is not.
    """
    made = sampler(KIND, config, source=source)
    if not isinstance(made, WalkSampler) or not made.planned or not config.recipe.view_set.partitions:
        raise ConfigError(
            f"encoder {encoder!r} reads view sets, which are drawn while a run goes on: they are cached by running, or "
            "planned with recipe.view_set.scheme=walks, plans_per_scene and partitions of 1 or more"
        )
    inputs = kind_inputs(config).get(KIND)
    features = [feature for feature in inputs.features if encoder in feature.encoders] if inputs else []
    if inputs is None or not features:
        raise ConfigError(f"recipe {config.recipe.name} reads no view sets with encoder {encoder!r}")
    declared = {KIND: dataclasses.replace(inputs, features=tuple(features))}
    found: dict[bytes, FeatureRequest] = {}
    for sample in _samples(made, source, manifest, splits, item, unit):
        for columns in column_requests(sample, manifest, config, declared):
            assert not reads_one_by_one(columns.feature.encoder, config), "only encoders of view sets come here"
            found |= {request.key.digest: request for request in columns.requests}
    if item and not found:
        raise DataError(
            f"{source}/{item} has no view set {unit}: it has sets 0 to {config.recipe.view_set.plans_per_scene - 1} "
            f"where it has at least {made.sizes[-1]} views (recipe.view_set)"
        )
    return list(found.values())


def _samples(
    made: WalkSampler, source: str, manifest: Any, splits: Sequence[str], item: str, unit: int | None
) -> list[PlanSample]:
    samples = []
    for entry in manifest.entries:
        if (item and entry.id != item) or (splits and str(entry.split) not in splits):
            continue
        for number in range(made.units(entry)):
            if unit is not None and number != unit:
                continue
            for partition in range(made.config.partitions):
                drawn = made.planned_set(entry.n_views, number, partition, entry.id)
                name = sample_id(source, entry.id, KIND, number)
                samples.append(PlanSample(id=name, source=source, item=entry.id, kind=KIND, views=drawn.views, seed=0))
    return samples
