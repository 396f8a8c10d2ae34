"""The loader: what it hands out, in which order, what happens to broken samples and when something fails."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs import ConfigError, RunConfig
from models.spec import TensorSpec
from services.contracts import CacheStats, FeatureKey, FeatureRequest, Lookups, Record, Tensor
from services.errors import CacheError, DataError, QuarantineLimitError, ServiceError
from services.features.client import FeatureClient
from services.features.encode import build_encoder
from services.features.store import FeatureStore
from services.streams import rows
from services.streams.collate import Collate
from services.streams.columns import column_specs
from services.streams.inputs import kind_inputs
from services.streams.ledger import Ledger
from services.streams.loader import LoadedStep, Loader, PlanSteps
from services.streams.plan import EpochPlan
from services.streams.rows import PlannedStep
from services.streams.targets import Targets
from tests.unit.services.streams.small_world import SmallManifest, small_config, write_scenes


class FakeClient:
    """Features that say which image they are of. ``answer`` may replace a record by an exception."""

    def __init__(self, answer: Callable[[FeatureRequest], BaseException | None] = lambda _: None) -> None:
        self.answer = answer
        self.steps: list[int] = []
        self.asked_ahead: list[tuple[int, int]] = []
        self.passed_by = -1

    def get(
        self, requests: Sequence[FeatureRequest], step: int, lookups: Lookups | None = None
    ) -> list[Record | BaseException]:
        self.steps.append(step)
        if lookups is not None:
            lookups.hits += 3
            lookups.misses += 1
        return [self.answer(request) or self.record(request) for request in requests]

    def record(self, request: FeatureRequest) -> Record:
        data = np.frombuffer(request.key.digest, np.uint8).astype(np.float32).reshape(2, 8)
        return {"tokens": Tensor(data=data, dtype="float32"), "summary": Tensor(data=data[:1], dtype="float32")}

    def prefetch(self, requests: Sequence[FeatureRequest], step: int) -> None:
        self.asked_ahead.append((step, len(requests)))

    def passed(self, step: int) -> None:
        self.passed_by = step


def outputs(dtype: str) -> dict[str, TensorSpec]:
    """Shapes of what a FakeClient gives."""
    return {"tokens": TensorSpec(shape=(2, 8), dtype=dtype), "summary": TensorSpec(shape=(1, 8), dtype=dtype)}


class World:
    """Scenes, a plan of them, and loaders."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.config: RunConfig = small_config(folder, **options)
        self.manifests = {"small": SmallManifest(write_scenes(folder / "data", (4, 5, 7, 16)))}
        self.plan = EpochPlan(self.config, self.manifests)
        self.folder = folder

    def loader(self, client: Any, start: int = 0, stop: int = 4, **options: Any) -> Loader:
        settings = {"rank": 0, "world_size": 1, "config": self.config, **options}
        return Loader(self.plan, client=client, manifests=self.manifests, start_step=start, stop_step=stop, **settings)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def ids(steps: list[LoadedStep]) -> list[list[list[str]]]:
    return [[micro.batch["id"] for micro in step.micro_batches] for step in steps]


def everything(loader: Loader) -> list[tuple[int, dict[str, Any]]]:
    with loader:
        return [
            (
                step.step,
                {
                    f"{i}.{name}": value.clone() if isinstance(value, torch.Tensor) else value
                    for i, micro in enumerate(step.micro_batches)
                    for name, value in micro.batch.items()
                },
            )
            for step in loader
        ]


def assert_equal_batches(one: list[tuple[int, dict[str, Any]]], two: list[tuple[int, dict[str, Any]]]) -> None:
    assert [step for step, _ in one] == [step for step, _ in two]
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == b[name].dtype
                assert value.view(torch.uint8).equal(b[name].view(torch.uint8)), name
            else:
                assert value == b[name]


def test_steps_come_in_plan_order_with_their_data(world: World) -> None:
    client = FakeClient()
    with world.loader(client, start=1, stop=6, targets=Targets(world.config, world.manifests)) as loader:
        for number, step in enumerate(loader, 1):
            planned = world.plan.step(number)
            assert (step.step, step.epoch) == (number, planned.epoch)
            assert [m.kind for m in step.micro_batches] == [b.kind for b in planned.micro_batches]
            for micro, batch in zip(step.micro_batches, planned.micro_batches, strict=True):
                assert micro.samples == batch.samples
                assert micro.batch["id"] == [s.id for s in batch.samples]
                assert micro.weights == (1.0,) * 4
                assert micro.batch["depth"].shape == (4, 28, 28)
                assert micro.batch["labels"].dtype == torch.int64
                assert len({row.numpy().tobytes() for row in micro.batch["tokens"]}) == 4
            assert step.hit_rate == 0.75
            assert step.bytes > 4 * 28 * 28 * 12
            assert step.wait_s >= 0
            assert step.load_s > 0
    assert number == 5
    assert client.steps == [step for step in range(1, 6) for _ in range(2)]


def test_ranks_share_each_micro_batch(world: World) -> None:
    whole = everything(world.loader(FakeClient()))
    parts = [everything(world.loader(FakeClient(), rank=rank, world_size=2)) for rank in range(2)]
    for place, (_, batch) in enumerate(whole):
        for micro in range(2):
            joined = torch.cat([part[place][1][f"{micro}.tokens"] for part in parts])
            assert torch.equal(joined, batch[f"{micro}.tokens"])
    with pytest.raises(ConfigError, match=r"3 workers.*trainer\.micro_batch=4"):
        world.loader(FakeClient(), world_size=3)


def test_a_broken_sample_in_the_middle_is_zeros_and_the_rest_is_untouched(world: World, tmp_path: Path) -> None:
    bad = world.plan.step(1).micro_batches[0].samples[2]
    good = everything(world.loader(FakeClient()))

    def answer(request: FeatureRequest) -> DataError | None:
        return DataError("x.png: truncated") if request.sample_id == bad.id else None

    ledger = Ledger(tmp_path / "quarantine.jsonl", max_broken=0.5, total=world.plan.samples)
    with world.loader(FakeClient(answer), ledger=ledger) as loader:
        steps = []
        for step in loader:
            if step.step == 1:
                micro = step.micro_batches[0]
                assert micro.weights == (1.0, 1.0, 0.0, 1.0)
                assert micro.batch["weight"].tolist() == [1.0, 1.0, 0.0, 1.0]
                assert micro.batch["tokens"][2].abs().sum() == 0
                kept = [0, 1, 3]
                assert torch.equal(micro.batch["tokens"][kept], good[1][1]["0.tokens"][kept])
            steps.append((step.step, step.broken))
    assert steps == [(0, {}), (1, {bad.id: "x.png: truncated"}), (2, {}), (3, {})]
    assert ledger.broken == {bad.id}


def test_broken_targets_and_missing_views_are_broken_samples(world: World) -> None:
    first = world.plan.step(0).micro_batches[0].samples
    view = world.manifests["small"].views(first[1].item, [first[1].views[0].index])[0]
    assert view.depth is not None
    Path(view.depth.path).write_bytes(b"")
    entry = next(e for e in world.manifests["small"].entries if e.id == first[3].item)
    short = dataclasses.replace(entry, digests=entry.digests[: first[3].views[0].index])
    world.manifests["small"].entries[world.manifests["small"].entries.index(entry)] = short
    with world.loader(FakeClient(), stop=1, targets=Targets(world.config, world.manifests)) as loader:
        step = next(loader)
    assert {first[1].id, first[3].id} <= set(step.broken)
    assert view.depth.path in step.broken[first[1].id]
    assert step.micro_batches[0].batch["depth"][1].abs().sum() == 0
    assert step.micro_batches[0].weights[1] == step.micro_batches[0].weights[3] == 0.0


def test_a_first_micro_batch_that_is_broken_as_a_whole(world: World) -> None:
    everything_breaks = FakeClient(lambda _: DataError("x.png: gone"))
    targets = Targets(world.config, world.manifests)
    specs = column_specs(world.config, kind_inputs(world.config), lambda _: outputs("bfloat16"), targets=targets)
    with world.loader(everything_breaks, stop=1, collate=Collate(specs), targets=targets) as loader:
        batch = next(loader).micro_batches[0].batch
    assert batch["tokens"].shape == (4, 2, 8)
    assert batch["tokens"].dtype == torch.bfloat16
    assert batch["depth"].shape == (4, 28, 28)
    assert batch["weight"].sum() == 0
    with (
        pytest.raises(DataError, match="all 4 samples of the first micro-batch"),
        world.loader(everything_breaks) as loader,
    ):
        next(loader)


def test_too_many_broken_samples_end_the_run(world: World, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "quarantine.jsonl", max_broken=0.01, total=world.plan.samples)
    client = FakeClient(lambda _: DataError("x.png: gone"))
    specs = column_specs(world.config, kind_inputs(world.config), lambda _: outputs("float32"))
    with (
        world.loader(client, collate=Collate(specs), ledger=ledger) as loader,
        pytest.raises(QuarantineLimitError, match=r"8 of 32 samples.*data\.max_broken"),
    ):
        next(loader)


def test_an_error_in_the_thread_is_raised_where_the_step_is_asked_for(world: World) -> None:
    bad = {sample.id for sample in world.plan.step(2).micro_batches[1].samples}

    def answer(request: FeatureRequest) -> ServiceError | None:
        return ServiceError("nobody encodes") if request.sample_id in bad else None

    loader = world.loader(FakeClient(answer), stop=10)
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(ServiceError, match="nobody encodes"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    assert_no_loader_threads()


def test_prefetch_is_bounded_and_shutdown_is_prompt(world: World) -> None:
    client = FakeClient()
    world.config = dataclasses.replace(
        world.config, trainer=dataclasses.replace(world.config.trainer, prefetch_steps=3)
    )
    loader = world.loader(client, stop=1000)
    assert next(loader).step == 0
    deadline = time.monotonic() + 10
    while len(set(client.steps)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(set(client.steps)) == [0, 1, 2, 3], "one step is with the consumer, three are ready"
    loader.close()
    loader.close()
    assert_no_loader_threads()
    assert max(client.steps) == 3


def assert_no_loader_threads() -> None:
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_buffers_are_used_again_unless_asked_not_to(world: World) -> None:
    def addresses(reuse: bool) -> list[int]:
        with world.loader(FakeClient(), stop=12, reuse=reuse) as loader:
            kept = [step.micro_batches[0].batch["tokens"] for step in loader]
            return [tensor.data_ptr() for tensor in kept]

    assert len(set(addresses(reuse=True))) <= world.config.trainer.prefetch_steps + 1
    assert len(set(addresses(reuse=False))) == 12


class ListSteps:
    """Steps as a stream delivers them, all of them at once."""

    def __init__(self, steps: list[PlannedStep]) -> None:
        self._new = list(steps)
        self._steps = iter(steps)

    def __next__(self) -> PlannedStep:
        return next(self._steps)

    def arrived(self) -> list[PlannedStep]:
        new, self._new = self._new, []
        return new


def through_rows(world: World, start: int, stop: int, rank: int = 0, world_size: int = 1) -> list[PlannedStep]:
    """What the pipeline would deliver: global rows, sliced, as a table."""
    tables = [rows.rank_slice(rows.to_table(world.plan.step(s)), rank, world_size) for s in range(start, stop)]
    return [planned for table in tables for planned in rows.from_table(table)]


@pytest.mark.parametrize("quotas", [{"view": 1.0}, {"view": 1.0, "view_set": 1.0}])
def test_rows_from_a_stream_give_the_same_batches_as_the_plan(tmp_path: Path, quotas: dict[str, float]) -> None:
    world = World(tmp_path, quotas=quotas)
    for rank in range(2):
        place = {"rank": rank, "world_size": 2, "targets": Targets(world.config, world.manifests)}
        client = FakeClient()
        streamed = everything(world.loader(client, 1, 5, steps=ListSteps(through_rows(world, 1, 5, rank, 2)), **place))
        assert_equal_batches(everything(world.loader(FakeClient(), 1, 5, **place)), streamed)
        planned = PlanSteps(world.plan, rank, 2, 1, 5)
        assert [step.plan for step in through_rows(world, 1, 5, rank, 2)] == [next(planned).plan for _ in range(4)]
        # Everything that arrived was asked for ahead, each step once.
        assert [step for step, _ in client.asked_ahead] == [1, 2, 3, 4]
        assert all(count >= 4 for _, count in client.asked_ahead)
        assert client.passed_by >= 0
    if "view_set" in quotas:
        batch = streamed[0][1]
        assert batch["0.tokens"].shape[1:] == (2, 8)
        assert batch["1.tokens"].ndim == 4
        assert batch["1.tokens_lengths"].shape == (2, 1)
        assert batch["1.depth_lengths"].equal(batch["1.tokens_lengths"])


def test_rows_that_are_wrong_are_refused(world: World) -> None:
    steps = through_rows(world, 0, 3)
    with (
        world.loader(FakeClient(), 0, 3, steps=ListSteps(steps[1:])) as loader,
        pytest.raises(DataError, match="gave step 1 where step 0 was due"),
    ):
        next(loader)
    with (
        world.loader(FakeClient(), 0, 4, steps=ListSteps(steps)) as loader,
        pytest.raises(DataError, match="ended before step 3 of 4"),
    ):
        list(loader)
    sample = steps[0].plan.micro_batches[0].samples[0].id
    wrong = dataclasses.replace(steps[0], keys={sample: (FeatureKey(b"0" * 16),)})
    with (
        world.loader(FakeClient(), 0, 1, steps=ListSteps([wrong])) as loader,
        pytest.raises(CacheError, match="the copies of the data differ"),
    ):
        next(loader)


def test_cached_features_are_those_that_were_computed(world: World) -> None:
    """The real client, encoder and store: an epoch that fills the cache, one that reads it, and one without it."""
    config = world.config
    specs = column_specs(config, kind_inputs(config), lambda name: build_encoder(name, config).outputs())

    def run(store: FeatureStore | None) -> tuple[list[tuple[int, dict[str, Any]]], CacheStats]:
        client = FeatureClient(config, store)
        targets = Targets(config, world.manifests, store=store)
        batches = everything(world.loader(client, 0, 4, collate=Collate(specs), targets=targets))
        stats = client.stats
        client.close()
        targets.close()
        return batches, stats

    with FeatureStore.from_config(config) as store:
        filling, cold = run(store)
    with FeatureStore.from_config(config) as store:
        reading, warm = run(store)
    computing, _ = run(None)
    assert (cold.hits, cold.encoded) == (0, 32)
    assert (warm.hits, warm.encoded) == (32, 0)
    assert filling[0][1]["0.tokens"].shape == (4, 2, 2, 2, 32)
    assert filling[0][1]["0.tokens"].dtype == torch.bfloat16
    assert filling[0][1]["0.tokens"].float().std() > 0
    assert_equal_batches(filling, reading)
    assert_equal_batches(filling, computing)


def test_an_image_that_breaks_costs_one_sample(world: World) -> None:
    first = world.plan.step(0).micro_batches[1].samples[1]
    path = world.manifests["small"].views(first.item, [first.views[0].index])[0].image.path
    Image.new("RGB", (8, 8)).save(path)
    Path(path).write_bytes(Path(path).read_bytes()[:40])
    client = FeatureClient(world.config, None)
    with world.loader(client, stop=1) as loader:
        step = next(loader)
    client.close()
    assert list(step.broken) == [first.id]
    assert path in step.broken[first.id]
    assert step.micro_batches[1].weights == (1.0, 0.0, 1.0, 1.0)
