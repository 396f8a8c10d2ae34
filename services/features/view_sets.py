"""The view sets of a source as requests, outside any run: for `features warm` and `features why`.

Sets of a scene are those that are planned; of an item (a conversation, whose pictures the encoder reads together) there
is one, all of its pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.schema import RunConfig
from services.contracts import FeatureRequest, PlanSample, Role
from services.errors import ConfigError, DataError
from services.features.requests import encoder_config, feature_requests
from services.streams.inputs import ALL, ITEM_KINDS, behind, kind_inputs, wanted_features
from services.streams.requests import column_requests, reads_one_by_one
from services.streams.sampler import Sampler, Unit
from services.streams.sampling import sample_id, sampler

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
    if not made.planned or not config.recipe.view_set.partitions:
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


def item_requests(
    config: RunConfig, encoder: str, source: str, manifest: Any, splits: Sequence[str] = ()
) -> list[FeatureRequest]:
    """What a run asks ``encoder``, or the one behind it that it declares, of all items of a source: a set of views an
    item, each once however many conversations are about it.

    ConfigError where the recipe reads only some of an item's views with it, which is no work for ahead.
    """
    found: dict[bytes, FeatureRequest] = {}
    for kind, plain in _item_kinds(encoder, config):
        made = sampler(kind, config, source=source)
        for entry in manifest.entries:
            if not made.units(entry) or not entry.n_views or (splits and str(entry.split) not in splits):
                continue
            views = made.draw(Unit(n_views=entry.n_views, item=entry.id), np.random.default_rng(0)).views
            if plain:
                views = tuple(dataclasses.replace(view, role=Role.CONTEXT) for view in views)
            name = sample_id(source, entry.id, kind, 0)
            sample = PlanSample(id=name, source=source, item=entry.id, kind=kind, views=views, seed=0)
            found |= {request.key.digest: request for request in feature_requests(sample, manifest, encoder, config)}
    return list(found.values())


def _item_kinds(encoder: str, config: RunConfig) -> list[tuple[str, bool]]:
    """Kinds made of items that the run reads with ``encoder`` or one behind it, and whether every view is context."""
    found = set()
    for kind, feature in wanted_features(config):
        if kind not in ITEM_KINDS or not any(encoder in behind(name, config) for name in feature.encoders):
            continue
        if feature.views != ALL:
            raise ConfigError(
                f"recipe {config.recipe.name} reads the views of role {feature.views} of a {kind} with encoder "
                f"{encoder!r}: they are cached by running"
            )
        found.add((kind, feature.plain))
    return sorted(found)


def _samples(
    made: Sampler, source: str, manifest: Any, splits: Sequence[str], item: str, unit: int | None
) -> list[PlanSample]:
    samples = []
    for entry in manifest.entries:
        if (item and entry.id != item) or (splits and str(entry.split) not in splits):
            continue
        for number in range(made.units(entry)):
            if unit is not None and number != unit:
                continue
            for drawn in made.every_draw(Unit(n_views=entry.n_views, number=number, item=entry.id)):
                name = sample_id(source, entry.id, KIND, number)
                samples.append(PlanSample(id=name, source=source, item=entry.id, kind=KIND, views=drawn.views, seed=0))
    return samples
