"""kill -9 of an encoder replica while a running trainer waits for its answer: the same losses."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from actors import driver
from configs import RunConfig
from services.features.pool import NAMESPACE, PoolAddress, PoolClient, connect_pool
from services.runtime import calls
from services.telemetry import events
from tests.support.probe_runs import losses, small_run

pytestmark = pytest.mark.ray


class Killer(threading.Thread):
    """Halts both replicas, waits until the trainer has asked both, kills one and lets the other go on."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(daemon=True)
        self.config = config
        self.victim = 0
        self.in_flight = 0

    def run(self) -> None:
        client = self._client()
        pids = [calls.call(client.replica(name).pid.remote(), name, 60) for name in client.state()[1]]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            while (leases := client.state()[0].leases) < 2:
                time.sleep(0.05)
            time.sleep(0.2)  # from the assignment to the call
            self.in_flight, self.victim = leases, pids[0]
            os.kill(self.victim, signal.SIGKILL)
        finally:
            os.kill(pids[1], signal.SIGCONT)

    def _client(self) -> PoolClient:
        while True:
            named = ray.util.list_named_actors(all_namespaces=True) if ray.is_initialized() else []
            for actor in named:
                if actor["namespace"] == NAMESPACE and re.fullmatch(r"features-[0-9a-f]{8}", actor["name"]):
                    return connect_pool(PoolAddress(name=actor["name"]), self.config)
            time.sleep(0.1)


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_killed_with_a_call_in_flight_changes_no_loss(tmp_path: Path) -> None:
    short = ("trainer.steps=4", "trainer.validate_every=0")
    undisturbed = driver.train(small_run(tmp_path / "inline", *short))
    config = small_run(
        tmp_path / "killed", *short, "cluster=local", "backend=ddp", "cluster.max_failures=0",
        "service.replicas=2", "service.threads=1",
    )  # fmt: skip
    killer = Killer(config)
    killer.start()
    result = driver.train(config)
    killer.join(10)
    assert killer.in_flight >= 2
    assert not Path(f"/proc/{killer.victim}").exists()
    assert losses(result.folder) == losses(undisturbed.folder)
    assert result.metrics == undisturbed.metrics
    # The other replica took the requests over: the trainer encoded nothing itself.
    encoded = [event for event in events.read(result.folder / "events") if event["what"] == "encode"]
    assert encoded
    assert not [event for event in encoded if event.get("where") == "here"]
