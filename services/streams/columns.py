"""The columns of each kind before any sample was read, and the text columns of planned samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from configs import ConfigError, RunConfig
from models.spec import TensorSpec
from services.contracts import Item, PlanSample, Record
from services.errors import DataError
from services.streams.inputs import ALL, FeatureInput, Inputs, view_axes, wanted_kinds
from services.streams.requests import reads_one_by_one
from services.streams.targets import Targets

Outputs = Callable[[str], Mapping[str, TensorSpec]]
"""Encoder -> shapes and dtypes of its records; ``FeatureClient.outputs`` is one."""

_GENERATION = "generation"


class TokenColumns(Protocol):
    """``services.streams.text.TextColumns``."""

    def conversation(self, item: Item) -> Record:
        """Token columns of a conversation; DataError when it cannot be tokenised."""
        ...

    def generation(self) -> Record:
        """Token columns of a generation sample, the same for all of them."""
        ...


class Texts:
    """Token columns of planned samples: the prompt of a generation, or the turns of a conversation."""

    def __init__(self, columns: TokenColumns, manifests: Mapping[str, Any]) -> None:
        self._columns, self._manifests = columns, manifests
        self._prompt: Record | None = None

    @property
    def prompt(self) -> Record:
        """What every generation sample has."""
        if self._prompt is None:
            self._prompt = self._columns.generation()
        return self._prompt

    def get(self, samples: Sequence[PlanSample], seen: Sequence[Record] = ()) -> list[Record | DataError]:
        """Columns of every sample, in order; a DataError for one that is too long, has no answer, or is no text.

        ``seen``: what is known of each sample already, its pictures' grids for one.
        """
        answers: list[Record | DataError] = []
        for place, sample in enumerate(samples):
            try:
                answers.append(self._of(sample, seen[place] if seen else {}))
            except DataError as error:
                answers.append(error)
        return answers

    def _of(self, sample: PlanSample, seen: Record) -> Record:  # noqa: ARG002
        return self.prompt if sample.kind == _GENERATION else self._columns.conversation(self.item(sample))

    def specs(self, kind: str) -> dict[str, TensorSpec]:
        """Columns of a kind: of fixed length for the prompt, ragged for conversations."""
        if kind == _GENERATION:
            return {
                name: TensorSpec(shape=tensor.data.shape, dtype=tensor.dtype) for name, tensor in self.prompt.items()
            }
        from services.streams.text import SPECS

        return dict(SPECS)

    def item(self, sample: PlanSample, name: str = "") -> Item:
        """The conversation of a sample, or ``name`` of its source. DataError for a scene, which has no turns."""
        item = self._manifests[sample.source].scene(name or sample.item)
        if not isinstance(item, Item):
            raise DataError(
                f"sample {sample.id!r} is a scene and has no turns; the kind {sample.kind!r} takes items with "
                "conversations"
            )
        return item


def open_texts(config: RunConfig, inputs: Inputs, outputs: Outputs, manifests: Mapping[str, Any]) -> Texts | None:
    """The reader of text columns; None where no kind that the run draws has text.

    An image stands for as many tokens as its encoder gives: the grid of the output that becomes ``tokens``, or its own
    where pictures keep their shapes.
    """
    kinds = [inputs[kind] for kind in wanted_kinds(config) if kind in inputs and inputs[kind].text]
    if not kinds:
        return None
    from services.streams.text import TextColumns

    if any(kind.frames for kind in kinds):
        from services.streams.frames import FrameColumns, FrameTexts

        (appended,) = {kind.appended for kind in kinds}
        return FrameTexts(FrameColumns(config), manifests, appended=appended)

    grids = set()
    for feature in (feature for kind in kinds for feature in kind.features):
        for name, column in feature.columns.items():
            if column == "tokens":
                shape = _output(config, feature.encoder, name, outputs).shape
                grids.add((int(shape[-3] or 0), int(shape[-2] or 0)))
    if len(grids) != 1:
        raise ConfigError(
            f"recipe {config.recipe.name}: kinds with text need one grid of image tokens, their encoders give "
            f"{sorted(grids)}"
        )
    ((height, width),) = grids
    return Texts(TextColumns(config, height * width), manifests)


def column_specs(
    config: RunConfig,
    inputs: Inputs,
    outputs: Outputs,
    *,
    targets: Targets | None = None,
    texts: Texts | None = None,
) -> dict[str, dict[str, TensorSpec]]:
    """Columns of each kind that a role reads, for :class:`services.streams.collate.Collate`.

    With them even a first micro-batch that is broken as a whole has its shapes. ConfigError when an encoder lacks an
    output that a column is made of, or two encoders that stand for each other differ.
    """
    specs: dict[str, dict[str, TensorSpec]] = {}
    for kind in wanted_kinds(config):
        if kind not in inputs:
            continue
        columns: dict[str, TensorSpec] = {}
        for feature in inputs[kind].features:
            columns |= _feature_specs(config, kind, feature, outputs)
        if targets is not None:
            columns |= targets.specs(kind)
        if texts is not None and inputs[kind].text:
            columns |= texts.specs(kind)
        specs[kind] = columns
    return specs


def _feature_specs(config: RunConfig, kind: str, feature: FeatureInput, outputs: Outputs) -> dict[str, TensorSpec]:
    views: tuple[int | None, ...] = ()
    if feature.stacked and reads_one_by_one(feature.encoder, config):
        views = view_axes(kind) if feature.views == ALL else (1,) if view_axes(kind) == (2,) else (None,)
    specs = {}
    for name, column in feature.columns.items():
        found = {encoder: _output(config, encoder, name, outputs) for encoder in feature.encoders}
        spec = found[feature.encoder]
        for encoder, other in found.items():
            if other != spec:
                raise ConfigError(
                    f"encoders.{encoder} takes the place of encoders.{feature.encoder} for a share of kind {kind!r}, "
                    f"but gives {name} {other.dtype} {other.shape} instead of {spec.dtype} {spec.shape}"
                )
        if feature.flat:
            specs[column] = TensorSpec(shape=(None, spec.shape[-1]), dtype=spec.dtype)
            if feature.grids:
                specs[feature.grids] = TensorSpec(shape=(None, 2), dtype="int64")
            continue
        specs[column] = TensorSpec(shape=(*views, *spec.shape), dtype=spec.dtype)
    return specs


def _output(config: RunConfig, encoder: str, name: str, outputs: Outputs) -> TensorSpec:
    found = outputs(encoder)
    if name not in found:
        raise ConfigError(
            f"recipe {config.recipe.name} reads {name!r} of encoders.{encoder}, which gives {sorted(found)}: choose "
            f"another encoders.{encoder}.family"
        )
    return found[name]
