"""What a transport is: first-in-first-out messages between any two ranks of a run, all roles together.

A *place* is the number of a rank among the ranks of all roles, role after role.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

POLL_S = 0.5
"""A wait looks this often whether its peer is still alive."""


def _keep() -> None:
    """Nothing to give back."""


@dataclass(kw_only=True)
class Message:
    """What arrived: a header and vectors of bytes."""

    header: Any
    """What the receiver read it as."""
    parts: list[Tensor] = field(default_factory=list)
    """uint8 (bytes,). Valid until :meth:`release`."""
    _release: Callable[[], None] = _keep

    def release(self) -> None:
        """The parts are no longer needed: their memory may be received into again."""
        release, self._release = self._release, _keep
        release()


class Transport(Protocol):
    """Every rank has one. Not to be used by several threads at once."""

    place: int
    places: int

    def send(self, to: int, header: bytes, parts: Sequence[Tensor] = ()) -> int:
        """Send a message to place ``to`` without waiting for it to arrive; returns its number among those to ``to``.

        The parts (uint8 vectors) must not change until they are :meth:`delivered`.
        """
        ...

    def delivered(self, to: int, number: int) -> None:
        """By an answer of ``to``, the messages up to ``number`` have arrived there; they need not be kept."""

    def receive(self, source: int, read: Callable[[bytes], Any] = bytes) -> Message:
        """The next message of place ``source``; waits for it. PeerLostError when it can no longer come.

        ``read`` makes of its header what the message has as header, or raises; the parts may still be on their way.
        """
        ...

    def flush(self) -> None:
        """Wait until everything that was sent has left."""

    def close(self) -> None:
        """Let go of everything at once; messages on the way may be lost."""


class Watch(Protocol):
    """Who says that a peer is lost. :class:`actors.bridge.liveness.Liveness` is one."""

    def waiting(self, place: int | None) -> None:
        """From now on this rank waits for ``place``; None: it waits no longer."""

    def check(self, place: int) -> None:
        """PeerLostError if a message of ``place`` can no longer be expected."""

    def lost(self, place: int, reason: str) -> Exception:
        """The error for a peer whose connection broke with ``reason``."""
        ...
