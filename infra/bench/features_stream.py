"""Benchmarks of the stream: from the plan through Ray Data and the loader into torch batches.

``stream``, ``warm_epoch_wait``, ``cached_epoch`` and ``stream_memory``.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from configs import RunConfig
from configs.schema import (
    CacheConfig,
    DataConfig,
    EncoderConfig,
    RecipeConfig,
    RoomsConfig,
    ServiceConfig,
    SourceConfig,
    StorageConfig,
    TrainerConfig,
)
from infra.bench.harness import Bench, Context, Measured, Target, main
from services.contracts import ImageRef, PlanSample, Split, Tensor, View
from services.features.client import FeatureClient
from services.features.store import FeatureStore
from services.streams.loader import LoadedStep, Loader, Steps
from services.streams.plan import EpochPlan
from services.streams.requests import sample_requests
from services.streams.targets import Targets

_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 28}
_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224}
_BATCH = 8


@dataclass(frozen=True)
class _Entry:
    id: str
    n_views: int
    digests: tuple[str, ...]
    kind: str = "scene"
    scene_type: str | None = None
    split: Split = Split.TRAIN
    length: int = 0


class _Records:
    """A manifest of one scene whose features are in the store and whose images are never read."""

    digest, classes = "bench", ("none",)

    def __init__(self, count: int) -> None:
        digests = tuple(hashlib.sha256(b"%d" % i).hexdigest() for i in range(count))
        self.entries = [_Entry("scene", count, digests)]
        self.scene_types: tuple[str, ...] = ()

    def of_split(self, split: Split) -> list[_Entry]:
        return [entry for entry in self.entries if entry.split == split]

    def scene_type(self, _: str) -> None:
        return None

    def views(self, _: str, places: Sequence[int]) -> list[View]:
        return [View(image=ImageRef(path=f"/none/{place}")) for place in places]

    def digests(self, _: str, places: Sequence[int]) -> list[str]:
        return [self.entries[0].digests[place] for place in places]


class _KeysOf:
    """Keys of a step, as ``services.streams.pipeline.FeatureKeys`` makes them from real manifests."""

    def __init__(self, config: RunConfig, manifest: _Records) -> None:
        self.config, self.manifest = config, manifest

    def __call__(self, plan: Any) -> dict[str, tuple[Any, ...]]:
        samples = [sample for batch in plan.micro_batches for sample in batch.samples]
        return {s.id: tuple(r.key for r in sample_requests(s, self.manifest, self.config)) for s in samples}


def _config(root: Path, arch: dict[str, int], side: int, **parts: Any) -> RunConfig:
    encoder = EncoderConfig(arch={**arch, "patch_size": 14}, height=side, width=side)
    return RunConfig(
        storage=StorageConfig(root=str(root)),
        recipe=RecipeConfig(),
        encoders={"features": encoder},
        service=ServiceConfig(replicas=0),
        trainer=TrainerConfig(micro_batch=_BATCH),
        cache=CacheConfig(),
        **parts,
    )


class Stream:
    """``count`` records of 2 MiB in a warm store, and ways to get them into batches."""

    def __init__(self, root: Path, count: int) -> None:
        self.config = _config(root, _TINY, 28, data=DataConfig(sources={"bench": SourceConfig(root="/none")}))
        self.manifest = _Records(count)
        self.plan = EpochPlan(self.config, {"bench": self.manifest})
        self.store = FeatureStore.from_config(self.config)
        self.client = FeatureClient(self.config, self.store)
        self._fill()

    def _fill(self) -> None:
        namespace = self.client.sink.namespace("features")
        rng = np.random.default_rng(0)
        block = rng.integers(-(2**15), 2**15, (1024, 1024), np.int16)
        for step in range(self.plan.steps_per_epoch):
            for sample in self.plan.step(step).micro_batches[0].samples:
                (request,) = sample_requests(sample, self.manifest, self.config)
                block[0, 0] = step  # records differ
                namespace.put(request.key, {"tokens": Tensor(data=block.copy(), dtype="bfloat16")})
        namespace.flush()

    def consume(self, epochs: int, steps: Steps | None = None) -> float:
        """Bytes per second into batches, from the first batch on."""
        total, began = 0, 0.0
        stop = self.plan.steps_per_epoch * epochs
        with self._loader(stop, steps) as loader:
            for step in loader:
                if not began:
                    began = time.perf_counter()
                    continue
                total += step.bytes
        return total / (time.perf_counter() - began)

    def _loader(self, stop: int, steps: Steps | None) -> Loader:
        return Loader(
            self.plan,
            rank=0,
            world_size=1,
            client=self.client,
            manifests={"bench": self.manifest},
            config=self.config,
            start_step=0,
            stop_step=stop,
            steps=steps,
        )

    def through_ray(self, epochs: int) -> float:
        """The same through plan, Ray Data and loader."""
        with self.feed(epochs) as steps:
            return self.consume(epochs, steps)

    @contextmanager
    def feed(self, epochs: int) -> Iterator[Steps]:
        """Planned steps from a Ray Data pipeline of their own."""
        import ray

        from services.streams.pipeline import PlanStream, start_feed

        stop = self.plan.steps_per_epoch * epochs
        keys = _KeysOf(self.config, self.manifest)
        feed = start_feed(self.config, self.plan, start_step=0, stop_step=stop, make_keys=lambda: keys)
        try:
            yield PlanStream(self.config, feed, rank=0, start_step=0, stop_step=stop)
        finally:
            ray.kill(feed)

    def growth(self, total: int) -> float:
        """MB that memory grows by while ``total`` bytes are streamed.

        Buffers, imports and worker processes are there after some steps; growth counts from then on.
        """
        epochs = max(2, round(total / (self.plan.steps_per_epoch * _BATCH * 2**21)))
        stop = self.plan.steps_per_epoch * epochs
        with self.feed(epochs) as steps, self._loader(stop, steps) as loader:
            for _ in range(self.plan.steps_per_epoch // 2):
                next(loader)
            before = peak = _memory_mb()
            for number, _ in enumerate(loader):
                if number % 16 == 0:
                    peak = max(peak, _memory_mb())
            return max(peak, _memory_mb()) - before

    def mapped(self) -> float:
        """Bytes per second of copying the mapped shard files into one reused buffer: no index, check or batch."""
        buffer = np.empty(_BATCH * 2**21, np.uint8)
        total, began = 0, time.perf_counter()
        for path in self.client.sink.namespace("features").folder.rglob("*.arrow"):
            data = np.memmap(path, np.uint8, "r")
            for begin in range(0, len(data), len(buffer)):
                piece = data[begin : begin + len(buffer)]
                buffer[: len(piece)] = piece
                total += len(piece)
        return total / (time.perf_counter() - began)

    def close(self) -> None:
        """Let go of the store."""
        self.client.close()
        self.store.close()


def stream(context: Context) -> Measured:
    """bytes/s through plan, Ray Data and loader; baseline: the same loader from the plan, no Ray."""
    context.cleanup.enter_context(_ray())
    made = context.cleanup.enter_context(closing(Stream(context.folder, context.size(512, 64))))
    epochs = context.size(4, 2)

    def extra() -> dict[str, Any]:
        mapped = float(np.median([made.mapped() for _ in range(5)]))
        return {"mmap_bytes_s": mapped, "ratio_to_mmap": made.through_ray(epochs) / mapped}

    return Measured(value=lambda: made.through_ray(epochs), baseline=lambda: made.consume(epochs), extra=extra)


def stream_memory(context: Context) -> Measured:
    """Growth in MB of RssAnon + RssShmem (with children) + Ray's object store; baseline: a tenth streamed."""
    context.cleanup.enter_context(_ray())
    made = context.cleanup.enter_context(closing(Stream(context.folder, context.size(256, 32))))
    gigabyte = context.size(10**9, 10**8)
    return Measured(value=lambda: made.growth(10 * gigabyte), baseline=lambda: made.growth(gigabyte))


def _memory_mb() -> float:
    """RssAnon + RssShmem of this process and its children, plus what Ray's object store holds."""
    import ray

    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1e3
    held = ray.cluster_resources().get("object_store_memory", 0) - ray.available_resources().get(
        "object_store_memory", 0
    )
    return total + held / 1e6


class Probe:
    """DINOv2-S (random weights cost the same) and linear heads on it, over rooms: an epoch with and without cache."""

    def __init__(self, root: Path, *, quick: bool) -> None:
        from services.data.sources import open_sources

        side = 28 if quick else 224
        rooms = RoomsConfig(scenes=10, views=8, width=64, height=48) if quick else RoomsConfig(scenes=24)
        data = DataConfig(sources={"rooms": SourceConfig()}, rooms=rooms)
        self.config = _config(root, _TINY if quick else _SMALL, side, data=data)
        self.manifests = open_sources(self.config)
        self.plan = EpochPlan(self.config, self.manifests)
        self.channels = self.config.encoders["features"].arch["hidden_size"]
        self.store = FeatureStore.from_config(self.config)
        self.targets = Targets(self.config, self.manifests, store=self.store)

    @contextmanager
    def filled(self) -> Iterator[FeatureClient]:
        """A client of a cache that holds everything, features and targets."""
        with self.client(self.store) as client:
            self.epoch(client)
            self.store.open(client.sink.model("features").identity()).flush()
            self.targets.flush()
            yield client

    @contextmanager
    def client(self, store: FeatureStore | None) -> Iterator[FeatureClient]:
        """A client whose encoder is built, so that building it is in no figure."""
        client = FeatureClient(self.config, store)
        with self._loader(client, stop=1) as loader:
            next(loader)
        yield client
        client.close()

    def _loader(self, client: FeatureClient, stop: int | None = None) -> Loader:
        return Loader(
            self.plan,
            rank=0,
            world_size=1,
            client=client,
            manifests=self.manifests,
            config=self.config,
            start_step=0,
            stop_step=self.plan.steps_per_epoch if stop is None else stop,
            targets=self.targets,
        )

    def epoch(self, client: FeatureClient) -> tuple[float, float]:
        """(seconds, seconds of them spent waiting for data) of one epoch of training."""
        train = self.trainer()
        waited, began = 0.0, time.perf_counter()
        with self._loader(client) as loader:
            for step in loader:
                waited += step.wait_s
                train(step)
        return time.perf_counter() - began, waited

    def trainer(self) -> Callable[[LoadedStep], None]:
        """One optimiser step of two linear heads: log depth and class of each patch, resized to the targets."""
        torch.manual_seed(0)
        head = torch.nn.Linear(self.channels, 1 + len(self.targets.classes))
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)

        def train(step: LoadedStep) -> None:
            for micro in step.micro_batches:
                batch = micro.batch
                out = head(batch["tokens"][:, -1].float()).permute(0, 3, 1, 2)
                out = torch.nn.functional.interpolate(out, batch["depth"].shape[-2:], mode="bilinear")
                known = batch["depth"] > 0
                depth = (out[:, 0] - batch["depth"].clamp(min=1e-3).log()).abs()[known].mean()
                classes = torch.nn.functional.cross_entropy(out[:, 1:], batch["labels"], ignore_index=-1)
                (depth + classes).backward()
            optimizer.step()
            optimizer.zero_grad()

        return train

    def train_alone(self, client: FeatureClient) -> float:
        """Seconds of training an epoch's steps when a batch is there already."""
        train = self.trainer()
        with self._loader(client, stop=1) as loader:
            step = next(loader)
            train(step)
            began = time.perf_counter()
            for _ in range(self.plan.steps_per_epoch):
                train(step)
            return time.perf_counter() - began

    def encode_alone(self, client: FeatureClient) -> float:
        """Seconds of making an epoch's features, nothing else going on."""
        began = time.perf_counter()
        for number in range(self.plan.steps_per_epoch):
            samples: list[PlanSample] = [s for b in self.plan.step(number).micro_batches for s in b.samples]
            client.get([r for s in samples for r in sample_requests(s, self.manifests[s.source], self.config)], number)
        return time.perf_counter() - began

    def close(self) -> None:
        """Let go of the stores."""
        self.targets.close()
        self.store.close()


def warm_epoch_wait(context: Context) -> Measured:
    """Share of an epoch spent waiting for data, features and targets from the cache; the baseline is none."""
    probe = context.cleanup.enter_context(closing(Probe(context.folder, quick=context.quick)))
    client = context.cleanup.enter_context(probe.filled())

    def share() -> float:
        seconds, waited = probe.epoch(client)
        return waited / seconds

    return Measured(value=share, baseline=lambda: 0.0)


def cached_epoch(context: Context) -> Measured:
    """Time of an uncached epoch / a cached one; baseline: (encode + train) / train, each measured alone."""
    probe = context.cleanup.enter_context(closing(Probe(context.folder, quick=context.quick)))
    cached = context.cleanup.enter_context(probe.filled())
    uncached = context.cleanup.enter_context(probe.client(None))

    def ideal() -> float:
        train = probe.train_alone(cached)
        return (probe.encode_alone(uncached) + train) / train

    return Measured(value=lambda: probe.epoch(uncached)[0] / probe.epoch(cached)[0], baseline=ideal)


@contextmanager
def _ray() -> Iterator[None]:
    """A Ray of our own on loopback."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=256 * 2**20, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


TABLE = (
    Bench(name="stream", unit="bytes/s", target=Target(on="ratio", op=">=", limit=0.8), prepare=stream),
    Bench(
        name="warm_epoch_wait", unit="share", target=Target(on="value", op="<=", limit=0.05), prepare=warm_epoch_wait
    ),
    Bench(name="cached_epoch", unit="ratio", target=Target(on="ratio", op=">=", limit=0.8), prepare=cached_epoch),
    Bench(name="stream_memory", unit="MB", target=Target(on="value", op="<=", limit=100.0), prepare=stream_memory),
)

if __name__ == "__main__":
    sys.exit(main(TABLE))
