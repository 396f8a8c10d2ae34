"""service_cold: images a second through the feature service with nothing cached, against the bare encoder loop.

DINOv2-S at 224 px in float32, one replica, pictures of 640 x 480 as JPEG. The service's side is what a trainer
sees: Ray, queue, micro-batching, and the records written to the store on the way. The weights are those below
$LOOM3D_WEIGHTS where it is set, otherwise random ones of the same shape, which cost the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from configs.schema import CacheConfig, ClusterConfig, EncoderConfig, RunConfig, ServiceConfig, StorageConfig
from infra.bench import baselines
from infra.bench.harness import Bench, Context, Measured, Target, main, rate
from services.contracts import FeatureRequest, ImageRef
from services.data.digests import content_digest
from services.features.client import FeatureClient
from services.features.keys import feature_key
from services.features.pool import connect_pool, start_pool, stop_pool
from services.features.sink import open_store
from services.runtime import cluster

_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
_QUICK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
_AHEAD = 2
"""Steps that the consumer asks for ahead, as a loader does."""


def _config(context: Context, threads: int) -> RunConfig:
    side = context.size(224, 56)
    weights = os.environ.get("LOOM3D_WEIGHTS", "")
    stored = Path(weights) / "dinov2-small"
    if not context.quick and weights and stored.is_dir():
        encoder = EncoderConfig(weights=str(stored), height=side, width=side, dtype="float32")
    else:
        arch = _QUICK if context.quick else _SMALL
        encoder = EncoderConfig(arch=arch, height=side, width=side, dtype="float32")
    return RunConfig(
        storage=StorageConfig(root=str(context.folder)),
        encoders={"features": encoder},
        service=ServiceConfig(replicas=1, threads=threads),
        cache=CacheConfig(mode="always"),
        cluster=ClusterConfig(mode="local"),
    )


def _pictures(folder: Path, count: int) -> list[Path]:
    paths = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def _requests(paths: Sequence[Path], digests: Sequence[str], turn: int) -> list[FeatureRequest]:
    """Requests whose keys no turn had before, so that the cache is cold; the pictures are the same."""
    return [
        FeatureRequest(
            key=feature_key([digest], transform={"turn": turn}),
            encoder="features",
            sample_id=path.stem,
            images=(ImageRef(path=str(path)),),
            digests=(digest,),
        )
        for path, digest in zip(paths, digests, strict=True)
    ]


def prepare_service(context: Context) -> Measured:
    """One replica on a local Ray; a consumer that asks two steps ahead."""
    import torch

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    config = _config(context, threads)
    paths = _pictures(context.folder, context.size(256, 12))
    digests = [content_digest(ImageRef(path=str(path))) for path in paths]
    context.cleanup.enter_context(cluster.running(config))
    address = start_pool(config)
    context.cleanup.callback(stop_pool, address)
    store = open_store(config)
    client = FeatureClient(config, store, pool=connect_pool(address, config))
    context.cleanup.callback(client.close)
    size = config.encoders["features"].batch_size
    turns = itertools.count()

    def through_service() -> float:
        requests = _requests(paths, digests, next(turns))
        steps = [requests[i : i + size] for i in range(0, len(requests), size)]
        first = next(turns) * len(steps)
        for offset, step in enumerate(steps[:_AHEAD]):
            client.prefetch(step, first + offset)
        for offset, step in enumerate(steps):
            if offset + _AHEAD < len(steps):
                client.prefetch(steps[offset + _AHEAD], first + offset + _AHEAD)
            for answer in client.get(step, first + offset):
                if isinstance(answer, BaseException):
                    raise answer
        return len(requests)

    settings = config.encoders["features"]
    model = baselines.load_dinov2(settings.weights, settings.arch)
    bare = rate(lambda: baselines.encode_files(model, paths, size, settings.height))

    def figures() -> dict[str, object]:
        # Had the service not answered, the trainer's own encoder would have been measured: say so.
        return {**dataclasses.asdict(client.stats), "fell_back": client.fell_back}

    return Measured(value=rate(through_service), baseline=bare, extra=figures)


TABLE = (
    Bench(
        name="service_cold",
        unit="images/s",
        target=Target(on="ratio", op=">=", limit=0.9),
        prepare=prepare_service,
    ),
)

if __name__ == "__main__":
    sys.exit(main(TABLE))
