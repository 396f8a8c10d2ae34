"""What a micro-batch of each kind is made of: features of which encoders under which columns, targets, text.

Every recipe declares it here, for each of its roles; the loader, prefetch, `features warm` and preflight read nothing
else to know what a sample needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from configs import ConfigError, RunConfig

ALL, CONTEXT, TARGET = "all", "context", "target"


@dataclass(frozen=True, kw_only=True)
class FeatureInput:
    """Outputs of one encoder for some views of a sample, as columns."""

    encoder: str
    """Key under ``encoders``."""
    columns: Mapping[str, str]
    """Output of the encoder -> name of the column; outputs that are not named are left out."""
    views: str = ALL
    """all | context | target: the views, by role, that are encoded."""
    stacked: bool = True
    """The column has the views as its first axis (after the samples); False for exactly one view without that axis."""
    instead: str = ""
    """Another encoder with the same outputs that takes this one's place for a share of the samples; "" for none."""
    share: float = 0.0
    """That share; which samples it meets follows from the sample's seed."""


@dataclass(frozen=True, kw_only=True)
class KindInputs:
    """A kind of sample as one role of a recipe reads it."""

    features: tuple[FeatureInput, ...] = ()
    targets: tuple[str, ...] = ()
    """Readers of ``services.streams.targets``: depth | labels | scene_type | image | camera | matches."""
    size: tuple[int, int] = (0, 0)
    """(height, width) at which pictures and targets are cut and resized."""
    text: bool = False
    """Token columns of the conversation: input_ids, labels."""


Inputs = Mapping[str, KindInputs]
"""Kind -> what it is made of."""


def _probe(config: RunConfig, role: str) -> dict[str, KindInputs]:  # noqa: ARG001
    name = config.recipe.features
    encoder = config.encoders[name]
    feature = FeatureInput(encoder=name, columns={"tokens": "tokens", "summary": "summary"}, stacked=False)
    view = KindInputs(
        features=(feature,), targets=("depth", "labels", "scene_type"), size=(encoder.height, encoder.width)
    )
    return {"view": view}


#: Recipe -> (config, role) -> inputs by kind.
INPUTS: dict[str, Callable[[RunConfig, str], dict[str, KindInputs]]] = {"probe": _probe}


def kind_inputs(config: RunConfig, role: str) -> Inputs:
    """What every kind of the recipe is made of for ``role``. ConfigError for a recipe without a declaration."""
    if config.recipe.name not in INPUTS:
        raise ConfigError(f"recipe.name={config.recipe.name!r} declares no inputs; there are {sorted(INPUTS)}")
    return INPUTS[config.recipe.name](config, role)
