"""Benchmarks of the bridge: UniUGG's condition one way between two processes, beside a bare gloo send and receive."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from infra.bench.harness import Bench, Context, Measured, Target
from infra.bench.joint_peers import ROLES, Peers

QUERIES, WIDTH = 128, 2048
"""Of the condition of one sample: 1 MiB in float32."""
_TRIPS = {1: 100, 16: 20, 64: 8}
"""Round trips of one figure, by size."""


class End:
    """One end of the edge llm -> diffusion, and of a bare gloo group beside it."""

    def __init__(self, role: str, address: str, settings: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        import models
        from actors.bridge.rendezvous import connect
        from actors.trainers.backends.single import SingleBackend
        from configs.schema import RunConfig

        samples = settings["samples"]
        self.source = role == "llm"
        self.link = connect(
            RunConfig(),
            role=role,
            rank=0,
            world_size=1,
            roles=ROLES,
            edges=models.spec("uniugg-tiny").edges,
            address=address,
            generation=0,
            backend=SingleBackend(),
        )
        host, _, port = address.rpartition(":")
        store = dist.PrefixStore("bare", dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False))
        self.group: Any = dist.ProcessGroupGloo(store, list(ROLES).index(role), len(ROLES), timedelta(seconds=60))
        self.tensor = torch.randn(samples, QUERIES, WIDTH, generator=torch.Generator().manual_seed(0))
        self.buffer = torch.empty_like(self.tensor)
        self.lengths = torch.tensor([[QUERIES, WIDTH]] * samples)
        self.ids = tuple(f"rooms/room-{place:05d}/generation#{place}" for place in range(samples))
        self.trips = 0

    def linked(self, trips: int) -> float:
        """Median seconds one way through the link: the condition there, its gradient, as large, back."""
        return _median(self._there_and_back, trips)

    def bare(self, trips: int) -> float:
        """The same tensor there and back through gloo alone, into memory that is there."""
        return _median(self._plain, trips)

    def _there_and_back(self) -> None:
        from actors.bridge.link import Micro

        self.trips += 1
        micro = Micro(step=0, index=self.trips, kind="generation", ids=self.ids, zero=(False,) * len(self.ids))
        if self.source:
            self.link.send(micro, {"condition": self.tensor, "condition_lengths": self.lengths})
            ((_, self.came),) = self.link.gradients(micro)
        else:
            received = self.link.receive(micro)
            received["condition"].grad = self.tensor  # as a backward pass leaves it, in memory of its own
            self.link.answer(micro, received)
        self.link.done(micro)

    def _plain(self) -> None:
        if self.source:
            self.group.send([self.tensor], 1, 0).wait()
            self.group.recv([self.buffer], 1, 0).wait()
        else:
            self.group.recv([self.buffer], 0, 0).wait()
            self.group.send([self.tensor], 0, 0).wait()

    def equal(self) -> bool:
        """Whether what came by both ways in the last trips is what was sent; both ends hold the same tensor."""
        import torch

        return torch.equal(self.buffer, self.tensor) and (not self.source or torch.equal(self.came, self.tensor))


def _median(trip: Callable[[], None], trips: int) -> float:
    took = []
    for _ in range(trips):
        began = time.perf_counter()
        trip()
        took.append((time.perf_counter() - began) / 2)
    return statistics.median(took)


def prepare(context: Context, *, megabytes: int) -> Measured:
    """Milliseconds one way of ``megabytes`` MiB."""
    samples = context.size(megabytes, 1)
    trips = context.size(_TRIPS[megabytes], 3)
    peers = context.cleanup.enter_context(Peers(End, {"samples": samples}, pinned=False))

    def sample(method: str) -> float:
        return 1e3 * float(peers.call(method, trips)["llm"])

    for method in ("linked", "bare"):
        sample(method)
    if not all(peers.call("equal").values()):
        raise AssertionError("what arrived is not what was sent")
    return Measured(
        value=lambda: sample("linked"),
        baseline=lambda: sample("bare"),
        extra=lambda: {"bytes": samples * QUERIES * WIDTH * 4, "trips": trips},
    )


TABLE = [
    Bench(
        name=f"bridge_{megabytes}mb",
        unit="ms",
        target=Target(on="ratio", op="<=", limit=1.2),
        prepare=functools.partial(prepare, megabytes=megabytes),
    )
    for megabytes in _TRIPS
]
