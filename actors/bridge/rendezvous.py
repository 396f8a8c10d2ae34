"""Where the ranks of all roles meet: a store that the driver hosts, and :func:`connect`, which each rank calls.

Everything of one life of the run is under its generation. A rank that missed a restart finds a newer generation and
ends; it can never meet the others.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from datetime import timedelta
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from actors.bridge.group import GroupTransport
from actors.bridge.link import Link, place_of, rank_name
from actors.bridge.liveness import Liveness
from actors.bridge.transport import POLL_S, Transport
from actors.trainers.backends.base import Backend
from configs import ConfigError, RunConfig
from configs.schema import BridgeConfig
from models.spec import EdgeSpec
from services.errors import LoomError, PeerLostError, ServiceError

T = TypeVar("T")
_GENERATION = "generation"
_STORE_TIMEOUT = timedelta(seconds=20)


class Rendezvous:
    """The store of a run, hosted by the driver for its whole life: address and generation go to the workers."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen on ``host`` (loopback, or the driver's address in its cluster) and nowhere else; port 0: any free."""
        try:
            listener = socket.create_server((host, port))
        except OSError as error:
            raise ServiceError(f"the rendezvous store cannot listen on {host}:{port}: {error}") from error
        self.host, self.port = host, int(listener.getsockname()[1])
        self._store: dist.TCPStore | None = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    @property
    def address(self) -> str:
        """What :func:`connect` wants: host:port."""
        return f"{self.host}:{self.port}"

    def open(self, generation: int) -> None:
        """Let the ranks of ``generation`` meet, and those of earlier ones end."""
        assert self._store is not None, "the rendezvous is closed"
        self._store.set(_GENERATION, str(generation))

    def close(self) -> None:
        """End the store; ranks that still run notice its silence."""
        self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StoreBoard:
    """Heartbeats in the store; see :class:`actors.bridge.liveness.Board`."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._there: set[str] = set()

    def write(self, name: str, text: str) -> None:
        """Set a text."""
        self._store.set(name, text)

    def read(self, names: Sequence[str]) -> list[str]:
        """The texts; asking the store for one that is not there would wait for it."""
        self._there.update(name for name in names if name not in self._there and self._store.check([name]))
        known = [name for name in names if name in self._there]
        texts = dict(zip(known, self._store.multi_get(known), strict=True)) if known else {}
        return [texts[name].decode() if name in texts else "" for name in names]


def connect(
    config: RunConfig,
    *,
    role: str,
    rank: int,
    world_size: int,
    roles: Mapping[str, int],
    edges: Sequence[EdgeSpec],
    address: str,
    generation: int,
    backend: Backend,
    mailbox: Any = None,
) -> Link:
    """Meet the ranks of all roles; returns when all are there.

    Args:
        config: the run; ``bridge`` says how.
        role: this rank's role.
        rank: its rank within the role.
        world_size: ranks of the role.
        roles: ranks of every role, in one order everywhere; the first one coordinates.
        edges: all edges between the roles.
        address: ``host:port`` of the :class:`Rendezvous`.
        generation: the life of the run that this rank belongs to.
        backend: for its device.
        mailbox: handle of the mailbox actor of this generation, for ``bridge.transport=objects``.

    Raises:
        PeerLostError: another rank does not come within ``bridge.phase_s.start``, or a newer generation has begun.
        ServiceError: the store cannot be reached.
        ConfigError: the sizes do not fit.
    """
    if roles.get(role) != world_size:
        raise ConfigError(f"role {role} has {world_size} ranks here, {roles.get(role)} in the run's plan {dict(roles)}")
    place, places = place_of(roles, role, rank), sum(roles.values())
    names = [rank_name(name, number) for name, ranks in roles.items() for number in range(ranks)]
    store = _client(address)
    _check_generation(store, generation, names[place])
    mine = dist.PrefixStore(f"generation-{generation}", store)
    if mine.add(f"claim/{place}", 1) > 1:
        raise PeerLostError(
            f"{names[place]} of generation {generation} is there already; restart with a new generation"
        )
    liveness = _liveness(config.bridge, address, generation, place, names)
    with _told(liveness):
        start_s = config.bridge.phase_s.get("start", config.bridge.phase_s["other"])
        facts = _meet(mine, place, names, _facts(backend.device), start_s, lambda: _newest(store), generation)
        make = functools.partial(
            _transport, config.bridge, address, mine, place, liveness, facts, backend.device, start_s, mailbox
        )
        transport = _watched(make, liveness, [p for p in range(places) if p != place])
    return Link(
        transport,
        role=role,
        rank=rank,
        roles=roles,
        edges=edges,
        window=config.bridge.window,
        generation=generation,
        liveness=liveness,
        device=backend.device,
    )


def _liveness(bridge: BridgeConfig, address: str, generation: int, place: int, names: Sequence[str]) -> Liveness:
    """Heartbeats over a connection of their own: a store answers one question of a client at a time."""
    beats = _client(address)
    liveness = Liveness(
        StoreBoard(dist.PrefixStore(f"generation-{generation}/beat", beats)),
        place,
        names,
        heartbeat_s=bridge.heartbeat_s,
        silence_s=bridge.silence_s,
        phase_s=bridge.phase_s,
        generation=generation,
        newest=lambda: int(beats.get(_GENERATION)),
    )
    liveness.start()
    return liveness


def _transport(
    bridge: BridgeConfig,
    address: str,
    store: dist.Store,
    place: int,
    liveness: Liveness,
    facts: Sequence[Mapping[str, str]],
    device: torch.device,
    start_s: float,
    mailbox: Any,
) -> Transport:
    """What ``bridge.transport`` chooses; ``facts`` has an entry for every place."""
    if bridge.transport == "objects":
        if mailbox is None:
            raise ConfigError("bridge.transport=objects needs the mailbox actor of this generation")
        from actors.bridge.mailbox import MailboxTransport

        return MailboxTransport(mailbox, place, len(facts), liveness, device=device)
    return GroupTransport(
        dist.PrefixStore("group", store),
        place,
        len(facts),
        liveness,
        device=device,
        start_s=start_s,
        timeout_s=bridge.timeout_s,
        loopback=address.rpartition(":")[0] in ("127.0.0.1", "localhost"),
        nccl=_own_gpus(facts),
    )


def _client(address: str) -> dist.TCPStore:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _STORE_TIMEOUT.total_seconds()).close()  # TCPStore tries for long
        return dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    except (OSError, RuntimeError, ValueError) as error:
        raise ServiceError(
            f"the rendezvous store at {address} does not answer ({str(error).splitlines()[0]}); is the driver alive?"
        ) from error


def _newest(store: dist.Store) -> int:
    return int(store.get(_GENERATION)) if store.check([_GENERATION]) else -1


def _check_generation(store: dist.Store, generation: int, name: str) -> None:
    newest = _newest(store)
    if newest != generation:
        raise PeerLostError(
            f"{name} is of generation {generation} of the run, but generation {newest} is the one that is open: a rank "
            "of an earlier life must end, it would compute with other weights"
        )


def _facts(device: torch.device) -> dict[str, str]:
    """What decides the transport, of this rank."""
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return {"device": device.type, "uuid": uuid}


def _own_gpus(facts: Sequence[Mapping[str, str]]) -> bool:
    """Whether every rank has a GPU that no other uses: NCCL refuses two ranks on one."""
    ids = [fact["uuid"] for fact in facts]
    return all(fact["device"] == "cuda" for fact in facts) and len(set(ids)) == len(ids)


def _meet(
    store: dist.Store,
    place: int,
    names: Sequence[str],
    facts: Mapping[str, str],
    limit_s: float,
    newest: Callable[[], int],
    generation: int,
) -> list[dict[str, str]]:
    """Wait until every rank has said hello; returns what they said."""
    board = StoreBoard(dist.PrefixStore("hello", store))
    board.write(str(place), json.dumps(facts))
    began, pause = time.monotonic(), 0.01
    while True:
        texts = board.read([str(other) for other in range(len(names))])
        missing = [name for name, text in zip(names, texts, strict=True) if not text]
        if not missing:
            return [json.loads(text) for text in texts]
        waited = time.monotonic() - began
        if waited > limit_s:
            raise PeerLostError(
                f"{names[place]} waits {waited:.0f} s for {', '.join(missing)} to start (bridge.phase_s.start="
                f"{limit_s:g}); see their logs, or give them more time"
            )
        if newest() != generation:
            raise PeerLostError(
                f"{names[place]} of generation {generation} waits for {', '.join(missing)}, but generation {newest()} "
                "of the run has begun"
            )
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)


def _watched(make: Callable[[], T], liveness: Liveness, others: Sequence[int]) -> T:
    """What ``make`` returns; given up when another rank is lost meanwhile (the thread stays behind)."""
    made: Future[T] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except (RuntimeError, LoomError) as error:
            made.set_exception(error)
        finally:
            if not made.done():
                made.set_exception(ServiceError("the transport could not be made; the log of this process says why"))

    Thread(target=work, name="bridge-connect", daemon=True).start()
    while True:
        with contextlib.suppress(NotYet):
            return made.result(timeout=POLL_S)
        for other in others:
            liveness.check(other)


@contextlib.contextmanager
def _told(liveness: Liveness) -> Iterator[None]:
    """Tell the other ranks of an error within."""
    try:
        yield
    finally:
        error = sys.exception()
        if error is not None:
            liveness.fail(f"{type(error).__name__}: {error}")
            liveness.close()
