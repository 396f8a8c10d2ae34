"""Transport through Ray's object store: for ranks that a process group cannot join, and the portable way.

Tensors are put into the object store as raw bytes (numpy knows no bfloat16, and pickled tensors are ten times slower);
an actor of no CPU keeps the references until they are asked for. Waits are long polls with a deadline.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from actors.bridge.transport import POLL_S, Message, Watch
from services.errors import LoomError, PeerLostError
from services.runtime.calls import call, gather

_CALL_S = 30.0
"""Deadline of a call that has nothing to wait for."""

Letter = tuple[bytes, list[Any]]
"""A header and references to its parts."""


class Mailbox:
    """Letters between places, by number. Runs as an async actor; knows nothing of what is inside.

    Ray may run the calls of an async actor in another order than they were made in, so letters are numbered.
    """

    def __init__(self) -> None:
        self._letters: dict[tuple[int, int, int], Letter] = {}
        self._arrived = asyncio.Condition()

    async def put(self, source: int, target: int, number: int, header: bytes, parts: list[Any]) -> None:
        """Keep a letter until it is taken."""
        async with self._arrived:
            self._letters[source, target, number] = header, parts
            self._arrived.notify_all()

    async def take(self, source: int, target: int, number: int, timeout_s: float) -> Letter | None:
        """Letter ``number`` from ``source`` to ``target``; None if it did not come within the time."""
        key = source, target, number
        async with self._arrived:
            try:
                await asyncio.wait_for(self._arrived.wait_for(lambda: key in self._letters), timeout_s)
            except TimeoutError:
                return None
            return self._letters.pop(key)


def start_mailbox(namespace: str, generation: int) -> Any:
    """Start the mailbox of a generation in the driver's cluster; returns its handle, which goes to :func:`connect`."""
    import ray

    actor: Any = ray.remote(Mailbox)
    return actor.options(
        name=f"mailbox-{generation}", namespace=namespace, num_cpus=0, max_concurrency=1000, lifetime=None
    ).remote()


class MailboxTransport:
    """One rank's end of a :class:`Mailbox` actor."""

    def __init__(self, actor: Any, place: int, places: int, watch: Watch, *, device: torch.device) -> None:
        self._actor, self.place, self.places = actor, place, places
        self._watch, self._device = watch, device
        self._outgoing, self._incoming = dict.fromkeys(range(places), 0), dict.fromkeys(range(places), 0)
        self._sent: deque[tuple[int, int, Any, list[Any]]] = deque()

    def send(self, to: int, header: bytes, parts: Sequence[Tensor] = ()) -> int:
        """Put the parts into the store and post the letter; the parts are free again at once."""
        import ray

        refs = [ray.put(part.cpu().numpy()) for part in parts]
        number = self._outgoing[to]
        self._outgoing[to] += 1
        posted = self._actor.put.remote(self.place, to, number, header, refs)
        self._sent.append((to, number, posted, refs))
        return number

    def delivered(self, to: int, number: int) -> None:
        """References to what has arrived are dropped, and with them the memory in the store."""
        self._sent = deque(entry for entry in self._sent if entry[0] != to or entry[1] > number)

    def receive(self, source: int, read: Callable[[bytes], Any] = bytes) -> Message:
        """The next letter of ``source``, copied out of the store, whose memory cannot be written to."""
        letter = self._take(source)
        if letter is None:
            self._watch.waiting(source)
            try:
                while letter is None:
                    self._watch.check(source)
                    letter = self._take(source)
            finally:
                self._watch.waiting(None)
        self._incoming[source] += 1
        encoded, refs = letter
        header = read(encoded)
        arrays = gather(refs, [f"a tensor of place {source}" for _ in refs], _CALL_S)
        for array in arrays:
            if isinstance(array, LoomError):
                raise self._watch.lost(source, str(array)) from array
        return Message(header=header, parts=[torch.tensor(array, device=self._device) for array in arrays])

    def _take(self, source: int) -> Letter | None:
        answer = self._actor.take.remote(source, self.place, self._incoming[source], POLL_S)
        letter: Letter | None = call(answer, "the mailbox of this run", POLL_S + _CALL_S)
        return letter

    def flush(self) -> None:
        """Wait until every letter is in the mailbox."""
        answers = gather([entry[2] for entry in self._sent], ["the mailbox of this run"] * len(self._sent), _CALL_S)
        for answer in answers:
            if isinstance(answer, LoomError):
                raise PeerLostError(f"a message could not be sent: {answer}") from answer

    def close(self) -> None:
        """Drop what was sent."""
        self._sent.clear()
