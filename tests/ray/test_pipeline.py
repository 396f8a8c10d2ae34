"""The pipeline with Ray: rows in plan order, in the driver and in a Train worker, ahead but not too far."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from configs import RunConfig
from services.errors import ServiceError
from services.features.client import FeatureClient
from services.streams.loader import Loader, PlanSteps
from services.streams.pipeline import PlanStream, start_feed
from services.streams.plan import EpochPlan
from tests.unit.services.streams.small_world import SmallKeys, SmallManifest, small_config, write_scenes

pytestmark = pytest.mark.ray


@dataclasses.dataclass
class World:
    config: RunConfig
    manifest: SmallManifest
    plan: EpochPlan
    note: Path

    def make_keys(self) -> Callable[[], SmallKeys]:
        return functools.partial(SmallKeys, self.config, self.manifest, self.note)


@pytest.fixture
def world(tmp_path: Path) -> World:
    config = small_config(tmp_path, lookahead_steps=8)
    manifest = SmallManifest(write_scenes(tmp_path / "data", (4, 5, 7)))
    return World(config, manifest, EpochPlan(config, {"small": manifest}), tmp_path / "reached")


@pytest.fixture
def feed(world: World, ray_cluster: None) -> Iterator[Any]:
    made = start_feed(world.config, world.plan, start_step=3, stop_step=40, make_keys=world.make_keys())
    yield made
    ray.kill(made)


def test_batches_through_ray_are_those_of_the_plan(world: World, feed: Any) -> None:
    config = world.config
    stream = PlanStream(config, feed, rank=0, start_step=3, stop_step=40)

    def load(steps: Any) -> list[tuple[int, list[str], torch.Tensor]]:
        client = FeatureClient(config, None)
        with Loader(
            world.plan,
            rank=0,
            world_size=1,
            client=client,
            manifests={"small": world.manifest},
            config=config,
            start_step=3,
            stop_step=40,
            steps=steps,
        ) as loader:
            taken = [
                (step.step, m.batch["id"], m.batch["tokens"].clone())
                for step, _ in zip(loader, range(3), strict=False)
                for m in step.micro_batches
            ]
        client.close()
        return taken

    streamed = load(stream)
    # The pipeline went ahead of the loader, and waits: rows are taken up to 8 steps ahead of what is loaded
    # (two more steps are being loaded), the feed keeps 8, and its stage may be 8 ahead of that.
    deadline = time.monotonic() + 30
    while (reached := int(world.note.read_text() or 0)) <= 8:
        assert time.monotonic() < deadline, reached
        time.sleep(0.1)
    time.sleep(0.5)
    assert int(world.note.read_text() or 0) < 39
    for (step, ids, tokens), (step_, ids_, tokens_) in zip(
        streamed, load(PlanSteps(world.plan, 0, 1, 3, 40)), strict=True
    ):
        assert (step, ids) == (step_, ids_)
        assert torch.equal(tokens, tokens_)
    # The rest of the run, to its end.
    rest = [step.plan.step for step in stream]
    assert rest == list(range(40 - len(rest), 40))
    assert int(world.note.read_text()) == 39
    ray.kill(feed)
    with pytest.raises(ServiceError, match="the feed: rows of step 3 for rank 0 is gone"):
        next(PlanStream(config, feed, rank=0, start_step=3, stop_step=40))
