"""Where the samples of a role come from in this process: manifests, features, targets, text, and the plan of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from configs.schema import RunConfig
from models.spec import TensorSpec
from services.contracts import Split
from services.data.manifest import Manifest
from services.data.pairs import open_pairs
from services.features.client import FeatureClient
from services.features.store import FeatureStore
from services.streams.collate import Collate
from services.streams.columns import Texts, column_specs, open_texts
from services.streams.inputs import Inputs, kind_inputs, recipe_roles, used_encoders, wanted_kinds
from services.streams.ledger import Ledger, read_quarantine
from services.streams.loader import Loader, Steps
from services.streams.plan import EpochPlan
from services.streams.sampling import needs_pairs
from services.streams.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Where samples come from in this process, as one role of the run reads them."""

    config: RunConfig
    manifests: Mapping[str, Manifest]
    client: FeatureClient
    inputs: Inputs
    """By kind, the encoders, targets and text that this role reads."""
    targets: Targets
    texts: Texts | None
    columns: Mapping[str, Mapping[str, TensorSpec]]
    """By kind, the columns of a batch, so that even a first micro-batch without a good sample has its shapes."""
    quarantine: frozenset[str] = frozenset()
    store: FeatureStore | None = None

    @classmethod
    def open(
        cls,
        config: RunConfig,
        manifests: Mapping[str, Manifest],
        client: FeatureClient,
        store: FeatureStore | None = None,
        *,
        role: str = "",
    ) -> Feed:
        """Read the quarantine list and prepare targets and text; maps are kept in ``store`` where there is one.

        ``role`` is by default the recipe's only, or first, one. Features and targets are pinned from here on: what a
        live run rereads is not evicted by another. Close it.
        """
        quarantine = read_quarantine(config.data.quarantine)
        if needs_pairs(config):
            open_pairs(config, manifests)  # of all processes that start, one makes what is not stored; plans read it
        role = role or recipe_roles(config)[0]
        inputs = {kind: made for kind, made in kind_inputs(config, role).items() if kind in wanted_kinds(config)}
        for name in used_encoders(config, role):
            client.pin(name)
        texts = open_texts(config, inputs, client.outputs, manifests)
        targets = Targets(config, manifests, store=store, inputs=inputs)
        return cls(
            config=config,
            manifests=manifests,
            client=client,
            inputs=inputs,
            targets=targets,
            texts=texts,
            columns=column_specs(config, inputs, client.outputs, targets=targets, texts=texts),
            quarantine=quarantine,
            store=store,
        )

    def for_role(self, role: str) -> Feed:
        """The same data as another role reads them, or as the recipe's judge does. Close it too."""
        return Feed.open(self.config, self.manifests, self.client, self.store, role=role)

    def close(self) -> None:
        """Commit the targets and let go of them; the client is its owner's to close."""
        self.targets.close()

    def plan(self, split: Split | str, *, complete: bool | None = None) -> EpochPlan:
        """The plan of a split; ``complete`` for a pass over all of it."""
        return EpochPlan(self.config, self.manifests, split=split, quarantine=self.quarantine, complete=complete)

    def load(
        self,
        plan: EpochPlan,
        *,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        steps: Steps | None = None,
        ledger: Ledger | None = None,
    ) -> Loader:
        """A loader of steps [start, stop); by default one epoch of the plan. Close it, or use it in a ``with``."""
        return Loader(
            plan,
            rank=rank,
            world_size=world_size,
            client=self.client,
            manifests=self.manifests,
            config=self.config,
            start_step=start,
            stop_step=plan.steps_per_epoch if stop is None else stop,
            collate=Collate(self.columns),
            targets=self.targets,
            inputs=self.inputs,
            texts=self.texts,
            steps=steps,
            ledger=ledger,
        )
