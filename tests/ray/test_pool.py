"""The feature service on a real Ray: a killed replica changes no record, a service that is gone is replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import CacheConfig, ClusterConfig, EncoderConfig, RunConfig, ServiceConfig, StorageConfig
from services.contracts import FeatureRequest, ImageRef
from services.data.digests import content_digest
from services.errors import ServiceError
from services.features.client import FeatureClient
from services.features.encode import Encoder
from services.features.keys import feature_key
from services.features.pool import connect_pool, start_pool, stop_pool
from services.features.sink import open_store
from services.runtime import calls

pytestmark = pytest.mark.ray

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def config_in(folder: Path) -> RunConfig:
    return RunConfig(
        storage=StorageConfig(root=str(folder)),
        encoders={"features": EncoderConfig(arch=TINY, height=56, width=56, dtype="float32", batch_size=4)},
        service=ServiceConfig(replicas=2, threads=1, deadline_s=30.0),
        cache=CacheConfig(seal_s=0.2),
        cluster=ClusterConfig(mode="local"),
    )


def pictures(folder: Path, count: int) -> list[FeatureRequest]:
    requests = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
        image = ImageRef(path=str(path))
        digest = content_digest(image)
        key = feature_key([digest])
        requests.append(
            FeatureRequest(key=key, encoder="features", sample_id=str(number), images=(image,), digests=(digest,))
        )
    return requests


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_replicas_that_are_killed_released_or_gone_change_no_record(ray_cluster, tmp_path):
    config, requests = config_in(tmp_path), pictures(tmp_path, 24)
    want = Encoder("features", config).encode(requests)
    address = start_pool(config, events_folder=tmp_path / "events")
    pool = connect_pool(address, config)
    client = FeatureClient(config, open_store(config), pool=pool)

    got = client.get(requests[:8], 0)
    stats, replicas = pool.state()
    assert stats.live == len(replicas) == 2
    assert stats.leases == 0
    victims = [calls.call(pool.replica(name).pid.remote(), name, 30) for name in replicas]
    assert os.getpid() not in victims
    stored = client.sink.namespace("features")
    wait_for(lambda: stored.contains([request.key for request in requests[:8]]).all())
    os.kill(victims[0], signal.SIGKILL)
    got += client.get(requests[8:16], 1)
    assert client._encoders == {}  # the service answered, nothing was encoded here

    # The cache answers everything: nobody needs a replica until something is missing again.
    pool.report(256, 0)
    wait_for(lambda: pool.state()[0].live == 0)
    wait_for(lambda: not Path(f"/proc/{victims[1]}").exists())
    got += client.get(requests[16:20], 2)
    state, _ = pool.state()
    assert (state.released, state.live) == (2, 1)
    assert client._encoders == {}

    stop_pool(address)
    with pytest.raises(ServiceError, match=address.name):
        pool.state()
    got += client.get(requests[20:], 3)
    assert list(client._encoders) == ["features"]
    client.close()

    for mine, theirs in zip(want, got, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name].data, theirs[name].data) for name in mine)
    again = FeatureClient(config, open_store(config))
    again.get(requests[:8] + requests[20:], 4)
    assert (again.stats.hits, again.stats.encoded) == (12, 0)  # both sides wrote what they encoded
    again.close()
