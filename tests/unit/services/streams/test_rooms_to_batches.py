"""Everything together, without Ray: procedural rooms, their manifest, a tiny DINOv2, the cache, the loader."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from configs.schema import DataConfig, RoomsConfig, SourceConfig
from services.data.sources import open_sources
from services.features.client import FeatureClient
from services.features.encode import build_encoder
from services.features.store import FeatureStore
from services.streams.collate import Collate
from services.streams.columns import column_specs
from services.streams.inputs import kind_inputs
from services.streams.loader import Loader
from services.streams.maps import open_target_store
from services.streams.pipeline import FeatureKeys
from services.streams.plan import EpochPlan
from services.streams.targets import Targets
from tests.unit.services.streams.small_world import small_config


def test_rooms_become_batches(tmp_path: Path) -> None:
    config = dataclasses.replace(
        small_config(tmp_path, micro_batch=2, accumulation=1),
        data=DataConfig(sources={"rooms": SourceConfig()}, rooms=RoomsConfig(scenes=4, views=3, width=64, height=48)),
    )
    manifests = open_sources(config)
    plan = EpochPlan(config, manifests)
    held_out = EpochPlan(config, manifests, split="test")
    assert not {s.item for s in _samples(plan)} & {s.item for s in _samples(held_out)}
    assert EpochPlan(config, open_sources(config, revalidate=False)).digest == plan.digest
    targets = Targets(config, manifests, store=open_target_store(config))
    specs = column_specs(
        config, kind_inputs(config), lambda name: build_encoder(name, config).outputs(), targets=targets
    )

    def epoch() -> tuple[list[dict], float]:
        with FeatureStore.from_config(config) as store:
            client = FeatureClient(config, store)
            with Loader(
                plan,
                rank=0,
                world_size=1,
                client=client,
                manifests=manifests,
                config=config,
                start_step=0,
                stop_step=plan.steps_per_epoch,
                collate=Collate(specs),
                targets=targets,
                reuse=False,
            ) as loader:
                batches = [step.micro_batches[0].batch for step in loader]
            client.close()
            return batches, client.stats.hit_rate

    cold, hits = epoch()
    assert hits == 0
    warm, hits = epoch()
    assert hits == 1
    targets.close()
    for a, b in zip(cold, warm, strict=True):
        assert a["id"] == b["id"]
        assert all(torch.equal(a[name], b[name]) for name in ("tokens", "summary", "depth", "labels", "scene_type"))
    batch = cold[0]
    assert batch["tokens"].shape == (2, 2, 2, 2, 32)
    assert batch["summary"].shape[0] == 2
    # Rooms have depth, furniture with classes and a type.
    assert (batch["depth"] > 0.1).float().mean() > 0.9
    assert batch["depth"].max() < 20
    seen = torch.cat([batch["labels"].flatten() for batch in cold])
    assert len(seen.unique()) >= 3
    assert seen.max() < len(targets.classes)
    assert all((batch["scene_type"] >= 0).all() for batch in cold)
    # What the pipeline would put into its rows.
    keys = FeatureKeys(config)(plan.step(0))
    assert list(keys) == batch["id"]


def _samples(plan: EpochPlan) -> list:
    return [s for i in range(plan.steps_per_epoch) for b in plan.step(i).micro_batches for s in b.samples]
