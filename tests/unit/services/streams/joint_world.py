"""A small run with several encoders and roles, for tests of what each role reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import RunConfig
from configs.schema import EncoderConfig, RoleConfig, UniuggConfig
from services.contracts import (
    Item,
    MicroBatch,
    PlanSample,
    Role,
    StepPlan,
    Turn,
    View,
    ViewRole,
)
from services.features.client import FeatureClient
from services.features.encode import Encoder, to_torch
from services.features.requests import feature_requests
from services.features.store import FeatureStore
from services.streams import inputs as declared
from services.streams import rows
from services.streams.collate import Collate
from services.streams.columns import column_specs, open_texts
from services.streams.inputs import (
    CONTEXT,
    TARGET,
    FeatureInput,
    KindInputs,
    augmented_kinds,
    kind_inputs,
)
from services.streams.loader import LoadedStep, Loader
from services.streams.requests import sample_requests
from services.streams.rows import PlannedStep
from services.streams.targets import Targets
from tests.unit.services.streams.small_world import SmallManifest, small_config, write_scenes

SIZE = (28, 28)
POSE = tuple(tuple(float(x) for x in row) for row in np.eye(4))
VIT = FeatureInput(encoder="vit", columns={"tokens": "tokens"})


def two_roles(config: RunConfig, role: str) -> dict[str, KindInputs]:
    """Like UniUGG's joint stage: the target view's chained record for one role, all else for the other."""
    context = dataclasses.replace(VIT, views=CONTEXT, stacked=False)
    target = FeatureInput(encoder="vae", columns={"tokens": "latent"}, views=TARGET, stacked=False)
    share = config.recipe.uniugg.reconstruction_share
    both = dataclasses.replace(VIT, instead="reconstruction", share=share)
    if role == "diffusion":
        return {"generation": KindInputs(features=(target,), size=SIZE)}
    return {
        "generation": KindInputs(features=(context, target), targets=("camera",), size=SIZE, text=True),
        "conversation": KindInputs(features=(both,), size=SIZE, text=True),
        "pair": KindInputs(features=(VIT,), targets=("image", "depth", "camera", "matches"), size=SIZE),
    }


class Manifest(SmallManifest):
    """Scenes with poses, and conversations about their pictures."""

    def __init__(self, folder: Path) -> None:
        scenes = [
            dataclasses.replace(s, views=tuple(dataclasses.replace(v, pose=POSE) for v in s.views))
            for s in write_scenes(folder, (4, 3, 5))
        ]
        super().__init__(scenes)
        pictures = [view.image for scene in scenes for view in scene.views]
        self.items = {
            f"talk{n}": Item(
                id=f"talk{n}",
                images=tuple(pictures[:n]),
                turns=(Turn(role="user", text="<image>" * n + "what?"), Turn(role="assistant", text="a" * (n + 1))),
            )
            for n in range(4)
        } | {"mute": Item(id="mute", images=(pictures[0],), turns=(Turn(role="user", text="<image> and?"),))}
        self._known = {view.image: d for s in scenes for view, d in zip(s.views, self.entry(s.id).digests, strict=True)}

    def scene(self, entry_id: str) -> Item:
        return self.items[entry_id]

    def views(self, entry_id: str, places: Sequence[int]) -> list[View]:
        if entry_id in self.items:
            return [View(image=self.items[entry_id].images[place]) for place in places]
        return super().views(entry_id, list(places))

    def digests(self, entry_id: str, places: Sequence[int]) -> list[str]:
        if entry_id in self.items:
            return [self._known[self.items[entry_id].images[place]] for place in places]
        return super().digests(entry_id, list(places))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A recipe of two roles with a chain of encoders; nothing is downloaded."""
    monkeypatch.setitem(declared.INPUTS, "two_roles", two_roles)
    base = small_config(tmp_path, quotas={"generation": 1.0, "conversation": 1.0, "pair": 1.0}, accumulation=3)
    vit = dataclasses.replace(base.encoders["features"], layers=[], dtype="float32")
    record = EncoderConfig(upstream="vit", dtype="float32", family="projection", height=28, width=28)
    encoders = {
        "vit": vit,
        "vae": dataclasses.replace(record, family="pooled", arch={"height": 1, "width": 2}),
        "reconstruction": dataclasses.replace(record, arch={"channels": 32}),
    }
    recipe = dataclasses.replace(
        base.recipe, name="two_roles", uniugg=UniuggConfig(matches=16, reconstruction_share=0.5)
    )
    roles = {"llm": RoleConfig(), "diffusion": RoleConfig()}
    return dataclasses.replace(
        base, recipe=recipe, encoders=encoders, cluster=dataclasses.replace(base.cluster, roles=roles)
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest(tmp_path / "data")


def generation(number: int, context: int = 0, target: int = 1) -> PlanSample:
    views = (ViewRole(index=context), ViewRole(index=target, role=Role.TARGET))
    return PlanSample(
        id=f"small/scene{number}#generation0", source="small", item=f"scene{number}", kind="generation",
        views=views, seed=number,
    )  # fmt: skip


def pair(number: int) -> PlanSample:
    return dataclasses.replace(
        generation(number), id=f"small/scene{number}#pair0", kind="pair", views=(ViewRole(index=0), ViewRole(index=1))
    )


def talk(name: str, images: int, seed: int = 1) -> PlanSample:
    return PlanSample(
        id=f"small/{name}#conversation{seed}", source="small", item=name, kind="conversation",
        views=tuple(ViewRole(index=i) for i in range(images)), seed=seed,
    )  # fmt: skip


def micro(index: int, *samples: PlanSample) -> MicroBatch:
    return MicroBatch(index=index, kind=samples[0].kind, samples=samples)


DEFAULT = (
    micro(0, generation(0), generation(1, 2, 0)),
    micro(1, talk("talk0", 0), talk("talk2", 2), talk("talk1", 1)),
    micro(2, pair(0), pair(2)),
)


class Plan:
    """As much of a plan as a loader reads."""

    micro_batch, seed, complete = 2, 7, False


class Steps:
    """Planned steps as a stream delivers them."""

    def __init__(self, steps: Sequence[PlannedStep]) -> None:
        self._new, self._steps = list(steps), iter(steps)

    def __next__(self) -> PlannedStep:
        return next(self._steps)

    def arrived(self) -> list[PlannedStep]:
        new, self._new = self._new, []
        return new


class World:
    """A role's loaders over hand-made steps."""

    def __init__(self, config: RunConfig, manifest: Manifest, role: str = "llm") -> None:
        self.config, self.manifests = config, {"small": manifest}
        self.inputs = kind_inputs(config, role)

    def load(
        self,
        client: Any,
        batches: Sequence[MicroBatch] = DEFAULT,
        *,
        steps: range = range(1),
        plan: Any = Plan,
        store: FeatureStore | None = None,
    ) -> list[LoadedStep]:
        targets = Targets(self.config, self.manifests, store=store, inputs=self.inputs)
        outputs = FeatureClient(self.config, None).outputs
        texts = open_texts(self.config, self.inputs, outputs, self.manifests)
        specs = column_specs(self.config, self.inputs, outputs, targets=targets, texts=texts)
        planned = [StepPlan(step=step, epoch=0, micro_batches=tuple(batches)) for step in steps]
        keyed = [
            rows.to_table(
                p,
                {
                    s.id: tuple(r.key for r in sample_requests(s, self.manifests["small"], self.config, self.inputs))
                    for b in p.micro_batches
                    for s in b.samples
                    if b.kind not in augmented_kinds(self.config, self.inputs) and not s.id.endswith("!")
                },
            )
            for p in planned
        ]
        with Loader(
            plan,
            rank=0,
            world_size=1,
            client=client,
            manifests=self.manifests,
            config=self.config,
            start_step=steps.start,
            stop_step=steps.stop,
            collate=Collate(specs),
            steps=Steps([step for table in keyed for step in rows.from_table(table)]),
            targets=targets,
            inputs=self.inputs,
            texts=texts,
            reuse=False,
        ) as loader:
            loaded = list(loader)
        targets.close()
        return loaded


@pytest.fixture
def world(config: RunConfig, manifest: Manifest) -> World:
    return World(config, manifest)


@pytest.fixture
def client(config: RunConfig) -> Iterator[FeatureClient]:
    made = FeatureClient(config, None)
    yield made
    made.close()


def encoded(config: RunConfig, name: str, manifest: Manifest, sample: PlanSample) -> list[torch.Tensor]:
    """Tokens of the sample's views, straight from the encoder."""
    encoder = Encoder(name, config)
    answers = encoder.encode(feature_requests(sample, manifest, name, config))
    encoder.close()
    return [to_torch(answer["tokens"]) for answer in answers if isinstance(answer, dict)]
