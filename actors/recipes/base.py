"""What a recipe adds to the story of a run: its roles, how each is built and validated, how the whole is judged.

The driver, the training loop, checkpoints and reports know recipes only through :class:`Recipe`.
"""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from configs import ConfigError
from configs.roles import ROLES
from configs.schema import RunConfig
from models.registry import spec
from models.spec import EdgeSpec, RoleSpec, TensorSpec
from services.contracts import PlanSample, Split

if TYPE_CHECKING:
    from actors.trainers.feed import Feed
    from services.streams.plan import EpochPlan


@dataclass(frozen=True, kw_only=True)
class Built:
    """A role's module as its recipe makes it, before anything was trained."""

    module: nn.Module
    spec: RoleSpec
    """With the recipe's settings bound to ``step`` and ``counts``."""
    settings: Mapping[str, Any]
    """JSON values from which :meth:`Recipe.rebuild` makes the module again; kept in the run folder."""
    weights: Mapping[str, Tensor] | None = None
    """Of a module that was built without memory (models.pretrained.empty_weights): where its values are read, one by
    one, once the backend knows which part of each a rank keeps (models.pretrained.StoredTensors)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A trained part that other runs can use: ``<run>/weights/<name>``, as models.pretrained writes it."""

    module: nn.Module
    model: str
    """Name in the registry that builds the part alone."""
    settings: Mapping[str, Any]
    reads: str = ""
    """Digest of the weights of the frozen encoder whose outputs it was trained on; "" for none. Whoever puts the part
    behind another encoder is told."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What its config.json says beside, JSON values."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model's settings follow from beside the config: shapes of features, classes of the data. No sample."""

    outputs: Callable[[str], Mapping[str, TensorSpec]]
    """Encoder (key under ``encoders``) -> shapes and dtypes of its records."""
    classes: int = 0
    """Semantic classes of the data."""
    assume: bool = False
    """Before weights and tokenizers are there: what follows from them is what the model's size is meant for."""

    @classmethod
    def of(cls, feed: Feed) -> Facts:
        """Those of a run whose data are open."""
        return cls(outputs=feed.client.outputs, classes=len(feed.targets.classes))


class Tally(Protocol):
    """What validation collects, as sums that add up over ranks."""

    def update(
        self, module: nn.Module, role: RoleSpec, batch: Mapping[str, Any], received: Mapping[str, Tensor]
    ) -> Any:
        """Add a micro-batch. Returns the tensors that leave on edges, by name; what else is up to the tally."""
        ...

    def merge(self, other: Any) -> None:
        """Add what another rank saw."""
        ...

    def compute(self) -> dict[str, float]:
        """Metrics by name; ``loss`` and ``loss/<term>`` among them."""
        ...


@dataclass(kw_only=True)
class LossTally:
    """The loss terms of a split: sums over counts."""

    weights: Mapping[str, float]
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def update(
        self, module: nn.Module, role: RoleSpec, batch: Mapping[str, Any], received: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Add a micro-batch; returns what leaves on edges."""
        output = role.step(module, batch, received)
        for term, value in output.sums.items():
            self.sums[term] = self.sums.get(term, 0.0) + float(value)
        for term, count in role.counts(batch).items():
            self.counts[term] = self.counts.get(term, 0.0) + count
        return output.outputs

    def merge(self, other: LossTally) -> None:
        """Add what another rank saw."""
        for mine, theirs in ((self.sums, other.sums), (self.counts, other.counts)):
            for term, value in theirs.items():
                mine[term] = mine.get(term, 0.0) + value

    def compute(self) -> dict[str, float]:
        """``loss`` and ``loss/<term>``."""
        terms = {term: value / self.counts[term] for term, value in self.sums.items() if self.counts.get(term)}
        total = math.fsum(self.weights[term] * value for term, value in terms.items())
        return {"loss": total, **{f"loss/{term}": value for term, value in terms.items()}}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Another run whose scores stand beside those of a run, under its name."""

    name: str
    title: str
    """What it is, in a few words."""
    config: RunConfig | None = None
    """How it is trained where it is not there yet; None for one that somebody named, which must be there."""
    keys: tuple[str, ...] = ()
    """Settings in which it differs from the run: no override of these is for both."""


class Recipe(ABC):
    """One way to train. Subclasses are listed in :data:`actors.recipes.RECIPES`."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that are trained, each by a worker group; the first one coordinates."""
        return ROLES[self.config.recipe.name]

    @property
    def edges(self) -> tuple[EdgeSpec, ...]:
        """Edges of the model between roles that this recipe trains."""
        return tuple(
            edge
            for edge in spec(self.config.model.name).edges
            if edge.source in self.roles and edge.target in self.roles
        )

    @abstractmethod
    def terms(self, role: str) -> tuple[str, ...]:
        """Names of the loss terms of a role."""

    def loss_weights(self, role: str) -> dict[str, float]:
        """Weight of each loss term of ``role``: ``recipe.losses``, 1 where it says nothing.

        ConfigError for a term that no role has.
        """
        known = [term for name in self.roles for term in self.terms(name)]
        unknown = sorted(set(self.config.recipe.losses) - set(known))
        if unknown:
            raise ConfigError(
                f"recipe.losses has {unknown[0]!r}; the terms of recipe {self.config.recipe.name} are "
                f"{', '.join(known)}"
            )
        return {term: self.config.recipe.losses.get(term, 1.0) for term in self.terms(role)}

    def describe(self, role: str, facts: Facts) -> dict[str, Any]:  # noqa: ARG002
        """Settings from which :meth:`rebuild` makes the module of ``role``, before anything was read or trained."""
        return {**spec(self.config.model.name).defaults, **self.config.model.overrides}

    def build(self, role: str, feed: Feed, plan: EpochPlan) -> Built:  # noqa: ARG002
        """The module of ``role`` for this run's data, with weights that depend on the seed and ``model.init`` alone."""
        return self.rebuild(role, self.describe(role, Facts.of(feed)))

    @abstractmethod
    def rebuild(self, role: str, settings: Mapping[str, Any]) -> Built:
        """The module as it was before training, from its settings and ``model.init``.

        The caller loads what was trained; a checkpoint does not hold what stayed frozen.
        """

    def stored_dtype(self, role: str) -> torch.dtype:  # noqa: ARG002
        """In what the weights that :meth:`rebuild` leaves to be read by parts are stored; float32 where there are none.

        Known before they are there, by what is published.
        """
        return torch.float32

    def tally(self, role: str, feed: Feed) -> Tally:  # noqa: ARG002
        """What validation computes for ``role``; by default its loss terms."""
        return LossTally(weights=self.loss_weights(role))

    def parts(self, role: str, module: nn.Module, settings: Mapping[str, Any]) -> Mapping[str, Part]:  # noqa: ARG002
        """Parts of a trained role that are saved for other runs, by name."""
        return {}

    def baseline(self, name: str) -> Baseline | None:  # noqa: ARG002
        """The run that a run called ``name`` is always compared with; by default there is none."""
        return None

    def complete(self, trained: Mapping[str, Built], feed: Feed) -> None:  # noqa: B027
        """Measure what trained modules carry beside their weights, before they are saved and judged."""

    @abstractmethod
    def evaluate(
        self, trained: Mapping[str, Built], feed: Feed, folder: Path, *, split: Split, device: str
    ) -> dict[str, Any]:
        """Judge the trained roles on ``split``: ``{"samples": n, "metrics": {name: row}}`` (see :func:`row`).

        May write pictures and examples for the report into ``folder``.
        """


def row(value: float, baseline: float | None, name: str, better: str, **also: float) -> dict[str, Any]:
    """One metric of an evaluation beside its trivial baseline; ``better`` is "lower" or "higher"."""
    entry = {"value": value, "baseline": baseline, "baseline_name": name, "better": better}
    return {**entry, "also": also} if also else entry


def kept_rows(batch: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
    """The columns of a batch at the samples where ``keep`` (B,) is true; lists are cut too, the rest stays."""
    chosen = keep.tolist()
    cut: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim:
            cut[name] = value[keep]
        elif isinstance(value, list) and len(value) == len(chosen):
            cut[name] = [entry for entry, wanted in zip(value, chosen, strict=True) if wanted]
        else:
            cut[name] = value
    return cut


def to_kept(batch: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The samples of weight above 0, on ``device``."""
    kept = kept_rows(batch, batch["weight"] > 0)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kept.items()}


def every_batch(
    feed: Feed, split: Split, kind: str | None = None
) -> Iterator[tuple[dict[str, Any], Sequence[PlanSample]]]:
    """Every sample of a split once, in order, in micro-batches of ``kind`` (None: all kinds).

    The tensors are the loader's: clone what is kept beyond the next batch. Fillers have weight 0.
    """
    with closing(feed.load(feed.plan(split, complete=True))) as loader:
        for step in loader:
            for micro in step.micro_batches:
                if kind is None or micro.kind == kind:
                    yield micro.batch, micro.samples


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator seeded within the block, and as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def select_trained(module: nn.Module, globs: Sequence[str], role: str) -> None:
    """Train the parameters that match one of ``globs`` (of those that are trainable at all) and freeze the others.

    ConfigError when a glob matches nothing.
    """
    names = [name for name, _ in module.named_parameters()]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            heads = sorted({name.split(".")[0] for name in names})
            raise ConfigError(
                f"recipe.train.{role} has {glob!r}, which matches no parameter; names begin with {', '.join(heads)}"
            )
    for name, parameter in module.named_parameters():
        if not any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            parameter.requires_grad_(False)
