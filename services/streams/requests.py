"""What a planned sample needs of the recipe's encoders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs import RunConfig
from models.encoders.base import InputKind
from models.encoders.families import input_kind
from services.contracts import FeatureRequest, PlanSample, Record, Role, Tensor, ViewRole
from services.errors import DataError
from services.features.requests import encoder_config, feature_requests
from services.streams.inputs import ALL, FeatureInput, Inputs, kind_inputs, view_axes
from services.streams.permutation import key64


@dataclass(frozen=True, slots=True)
class ColumnRequests:
    """Requests for the columns of one :class:`FeatureInput` of a sample, in the order of the views."""

    feature: FeatureInput
    requests: list[FeatureRequest]
    stacked: bool

    def record(self, answers: list[Record]) -> Record:
        """The columns, from the records of the requests."""
        if self.feature.flat:
            return self._flat(answers)
        if not self.stacked:
            (record,) = answers
            return {column: record[name] for name, column in self.feature.columns.items() if name in record}
        return {
            column: Tensor(data=np.stack([record[name].data for record in answers]), dtype=answers[0][name].dtype)
            for name, column in self.feature.columns.items()
            if name in answers[0]
        }

    def _flat(self, answers: list[Record]) -> Record:
        """The last axis of all tensors one after the other, and the grids that they had."""
        made: Record = {}
        for name, column in self.feature.columns.items():
            parts = [record[name] for record in answers]
            rows = [part.data.reshape(-1, part.data.shape[-1]) for part in parts]
            made[column] = Tensor(data=np.concatenate(rows), dtype=parts[0].dtype)
            if self.feature.grids:
                grids = np.array([part.data.shape[-3:-1] for part in parts], np.int64)
                made[self.feature.grids] = Tensor(data=grids, dtype="int64")
        return made


def column_requests(
    sample: PlanSample,
    manifest: Any,
    config: RunConfig,
    inputs: Inputs,
    *,
    pixels: np.ndarray | None = None,
    drawn: bool = False,
) -> list[ColumnRequests]:
    """What ``sample`` needs of each encoder that its kind reads; nothing for a kind that ``inputs`` does not declare,
    and nothing of an encoder for a sample without pictures.

    ``pixels`` uint8 (V, H, W, 3) are the pictures of its views where they were augmented. ``drawn``: the sample is of a
    training epoch; a view set that was drawn for this epoch alone is then neither looked for nor kept. DataError when
    the sample names views that its scene does not have, or has none of the role that is read.
    """
    found: list[ColumnRequests] = []
    for feature in inputs[sample.kind].features if sample.kind in inputs else ():
        views = role_views(sample, feature.views)
        if not sample.views and view_axes(sample.kind) == (None,):
            continue
        if not views or (not feature.stacked and len(views) != 1):
            allowed = "at least one" if feature.stacked else "exactly one"
            raise DataError(
                f"sample {sample.id!r} has {len(views)} views of role {feature.views!r} where encoder "
                f"{feature.encoder!r} reads {allowed}; its roles are {[view.role.value for view in sample.views]}"
            )
        if feature.plain:
            views = tuple(dataclasses.replace(view, role=Role.CONTEXT) for view in views)
        part = sample if views == sample.views else dataclasses.replace(sample, views=views)
        name = chosen_encoder(feature, sample)
        shown = None
        if pixels is not None:
            shown = [picture for picture, view in zip(pixels, sample.views, strict=True) if view in views]
        requests = feature_requests(part, manifest, name, config, pixels=shown)
        alone = reads_one_by_one(name, config)
        if drawn and not alone and comes_once(feature, config):
            requests = [dataclasses.replace(request, once=True) for request in requests]
        found.append(ColumnRequests(feature, requests, feature.stacked and alone))
    return found


def sample_requests(
    sample: PlanSample, manifest: Any, config: RunConfig, inputs: Inputs | None = None
) -> list[FeatureRequest]:
    """All requests of a sample, in the order of the columns' encoders and then of the views; see
    :func:`column_requests`. ``inputs`` defaults to those of the recipe's first role.
    """
    declared = kind_inputs(config) if inputs is None else inputs
    return [request for found in column_requests(sample, manifest, config, declared) for request in found.requests]


def role_views(sample: PlanSample, views: str) -> tuple[ViewRole, ...]:
    """The views of a sample that have the role ``views`` (all | context | target)."""
    return sample.views if views == ALL else tuple(view for view in sample.views if view.role is Role(views))


def chosen_encoder(feature: FeatureInput, sample: PlanSample) -> str:
    """The encoder that ``sample`` is read with: for the declared share of the samples the one that takes its place.

    The choice is a function of the sample's seed, which differs in every epoch, so it is the same on every rank and
    after a resume, and nobody needs to store it.
    """
    if not feature.instead or feature.share <= 0:
        return feature.encoder
    drawn = key64("instead", sample.seed, feature.encoder) / 2**64
    return feature.instead if drawn < feature.share else feature.encoder


def comes_once(feature: FeatureInput, config: RunConfig) -> bool:
    """Whether view sets of a training epoch are new to an encoder of view sets, and will not come again."""
    sets = config.recipe.view_set
    if sets.scheme != "walks":
        return False  # all sets of a window are few
    return not sets.plans_per_scene or (not sets.partitions and not (feature.plain and feature.views == ALL))


def reads_one_by_one(name: str, config: RunConfig) -> bool:
    """Whether a record of encoder ``name`` is of one view; False where it reads all views of a sample together."""
    settings = encoder_config(name, config)
    while settings.upstream and input_kind(settings.family) is not InputKind.VIEWS:
        settings = encoder_config(settings.upstream, config)
    return input_kind(settings.family) is InputKind.IMAGE
