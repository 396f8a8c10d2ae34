"""Where samples come from in a process of a run: what is pinned, and batches that have no good sample."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.trainers.roles import Feed
from services.contracts import Split
from services.data.sources import open_sources
from services.features.client import FeatureClient
from services.features.sink import open_store
from tests.support.probe_runs import small_run


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return small_run(tmp_path)


def test_a_first_micro_batch_that_is_broken_as_a_whole_is_no_error(config: Any) -> None:
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, mode="never"))
    manifests = open_sources(config)
    with (
        closing(FeatureClient(config, None)) as client,
        closing(Feed.open(config, manifests, client)) as feed,
    ):
        plan = feed.plan(Split.TRAIN)
        for sample in plan.step(0).micro_batches[0].samples:
            path = Path(manifests[sample.source].scene(sample.item).views[sample.views[0].index].image.path)
            path.write_bytes(path.read_bytes()[:60])
        with feed.load(plan, stop=1) as loader:
            step = next(loader)
            first, second = (micro.batch for micro in step.micro_batches)
            assert len(step.broken) == 4
            assert first["weight"].tolist() == [0.0] * 4
            assert second["weight"].sum() > 0
            for name, column in second.items():
                if isinstance(column, torch.Tensor):
                    assert (first[name].shape, first[name].dtype) == (column.shape, column.dtype), name


def test_a_feed_pins_features_and_targets_until_it_is_closed(config: Any) -> None:
    manifests = open_sources(config)
    with open_store(config) as store:
        client = FeatureClient(config, store)
        feed = Feed.open(config, manifests, client, store)
        with feed.load(feed.plan(Split.TRAIN), stop=1) as loader:
            next(loader)
        client.sink.flush()
        feed.targets.flush()
        assert [info.pinned for info in store.namespaces()] == [True, True]
        assert store.gc(keep=[], budget=0).fingerprints == ()
        feed.close()
        assert sorted(info.pinned for info in store.namespaces()) == [False, True]
        client.close()
        assert len(store.gc(keep=[]).fingerprints) == 2
