"""Transport within a process: every role is a thread, and exactly one of them runs at a time.

The baton passes when a role waits for a message. What is global in a process (Python's, numpy's and torch's random
generators) is kept for each role and put back when its turn comes, so that a role computes what it would alone.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from actors.bridge.transport import Message
from actors.trainers.randomness import capture, restore
from services.errors import PeerLostError


class Bus:
    """The messages and the baton of the roles of one process."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.ended: dict[int, str] = {}
        """Place -> why it sends nothing any more."""
        self._queues: dict[tuple[int, int], deque[Message]] = {}
        self._turn = threading.Condition()
        self._busy = False

    def acquire(self) -> None:
        """Take the baton; waits for it."""
        with self._turn:
            self._turn.wait_for(lambda: not self._busy)
            self._busy = True

    def release(self) -> None:
        """Give the baton to whoever can go on."""
        with self._turn:
            self._busy = False
            self._turn.notify_all()

    def end(self, place: int, reason: str) -> None:
        """Nothing more comes from ``place``: those who wait for it are told ``reason``."""
        with self._turn:
            self.ended.setdefault(place, reason)
            self._turn.notify_all()

    def put(self, source: int, target: int, message: Message) -> None:
        """Leave a message; the holder of the baton does."""
        with self._turn:
            self._queues.setdefault((source, target), deque()).append(message)

    def take(self, source: int, target: int) -> Message:
        """The next message from ``source``; passes the baton until it is there. PeerLostError when none can come."""
        waiting = self._queues.setdefault((source, target), deque())
        if not waiting:
            state = capture()
            with self._turn:
                self._busy = False
                self._turn.notify_all()
                self._turn.wait_for(lambda: (waiting or source in self.ended) and not self._busy)
                self._busy = True
            restore(state)
        if not waiting:
            raise PeerLostError(f"{self.names[target]} waits for {self.names[source]}: {self.ended[source]}")
        return waiting.popleft()


class LocalTransport:
    """One role's end of a :class:`Bus`. Parts are handed over as they are, without a copy."""

    def __init__(self, bus: Bus, place: int) -> None:
        self._bus, self.place, self.places = bus, place, len(bus.names)

    def send(self, to: int, header: bytes, parts: Sequence[Tensor] = ()) -> int:
        """Leave a message for ``to``."""
        self._bus.put(self.place, to, Message(header=header, parts=list(parts)))
        return 0

    def delivered(self, to: int, number: int) -> None:
        """Messages are kept by whoever reads them."""

    def receive(self, source: int, read: Callable[[bytes], Any] = bytes) -> Message:
        """The next message of ``source``; meanwhile other roles run."""
        message = self._bus.take(source, self.place)
        message.header = read(message.header)
        return message

    def flush(self) -> None:
        """Nothing is ever on the way."""

    def close(self) -> None:
        """Nothing to let go of."""


def run_roles(tasks: Mapping[str, Callable[[LocalTransport], Any]]) -> dict[str, Any]:
    """Run every role in a thread of this process, one at a time; returns what each task returned.

    The first error of a task is raised here once all have ended; the others end with PeerLostError as soon as they
    wait for the role that failed.
    """
    bus = Bus([f"role {name}" for name in tasks])
    failed: list[str] = []
    outside = capture()

    def work(place: int, name: str) -> Any:
        bus.acquire()
        try:
            restore(outside)
            return tasks[name](LocalTransport(bus, place))
        finally:
            error = sys.exception()
            if error is not None:
                failed.append(name)
            bus.end(place, "it has ended" if error is None else f"it failed with {type(error).__name__}: {error}")
            bus.release()

    with ThreadPoolExecutor(len(tasks), thread_name_prefix="role") as pool:
        futures = {name: pool.submit(work, place, name) for place, name in enumerate(tasks)}
        try:
            wait(futures.values())
        finally:
            for place in range(len(bus.names)):  # an interrupt ends the wait, and the roles with it
                bus.end(place, "the run was interrupted")
    restore(outside)
    if failed:
        futures[failed[0]].result()
    return {name: future.result() for name, future in futures.items()}
