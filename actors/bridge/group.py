"""Transport through a process group of its own, beside whatever group the workers train with.

Gloo's waits cannot be interrupted and a time-out kills the group. A rank waits in gloo itself, since handing a message
from thread to thread costs as much as the message; another thread looks every now and then whether the peer is alive,
and kills the group when it is not. Receives are posted before they are needed: gloo sends only what is being received,
so a message arrives while its receiver computes, and its latency is that of a plain send and receive.

A message is its parts and, behind them, one *block* (counts, sizes, header): where the block is, the parts mostly are,
so that the receiver, which waits for the block first, is woken once a message. Both sides know the largest part that
came at each place so far; the receiver has a buffer of that capacity posted. A larger part makes the sender fill that
buffer with one byte, and travels on its own; from then on the capacity is larger.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.bridge.transport import POLL_S, Message, Watch
from services.errors import BridgeError, LoomError

BLOCK = 4096
"""Bytes of a block; a header that is longer spills into a part."""
_MAX_PARTS = 64
_FIXED = struct.Struct("<III")
"""Bytes of the header, number of parts, 1 if the header is the first part."""
_HEAD_TAG, _NEVER_TAG, _POSTED_TAG, _LARGE_TAG = 1, 2, 100, 200
_MAX_HEADER = 1 << 28
_GRACE_S = 0.05
_lock = threading.Lock()


class GroupTransport:
    """Messages through gloo; parts on CUDA through NCCL where ``nccl`` is set, through pinned memory elsewhere.

    NCCL knows no tags, and what two ranks send each other waits in line on one stream: each direction has a group of
    its own, or two ranks that send at once would wait for each other for ever.
    """

    def __init__(
        self,
        store: dist.Store,
        place: int,
        places: int,
        watch: Watch,
        *,
        device: torch.device,
        start_s: float,
        timeout_s: float,
        loopback: bool = False,
        nccl: bool = False,
    ) -> None:
        self.place, self.places = place, places
        self._watch, self._device, self._nccl = watch, device, nccl
        start, timeout = timedelta(seconds=start_s), timedelta(seconds=timeout_s)
        with _interface("lo" if loopback else None):
            self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), place, places, start)
        self._up: Any = None
        self._down: Any = None
        if nccl:
            self._up = _nccl_group(dist.PrefixStore("up", store), place, places, timeout)
            self._down = _nccl_group(dist.PrefixStore("down", store), place, places, timeout)
        self._timeout = timeout
        self._pool = _Pool()
        self._sent: dict[int, deque[tuple[int, Any, Tensor]]] = {p: deque() for p in range(places) if p != place}
        self._numbers = dict.fromkeys(self._sent, 0)
        self._out = {peer: _Capacities() for peer in self._sent}
        self._in = {peer: _Incoming() for peer in self._sent}
        for peer, incoming in self._in.items():
            self._post_receives(peer, incoming)
        self._guard = _Guard(watch, {peer: self._never(peer) for peer in self._sent})

    # -- sending ---------------------------------------------------------------------------------------------

    def send(self, to: int, header: bytes, parts: Sequence[Tensor] = ()) -> int:
        """Hand a message to gloo; see :class:`actors.bridge.transport.Transport`."""
        self._numbers[to] += 1
        sizes = [part.numel() for part in parts]
        spilled = _FIXED.size + 8 * len(sizes) + len(header) > BLOCK
        if len(sizes) >= _MAX_PARTS:
            raise BridgeError(f"a message has {len(sizes)} tensors, at most {_MAX_PARTS - 1} can cross an edge")
        if spilled:
            spill = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        fixed = _FIXED.pack(len(header), len(sizes), int(spilled))
        block = bytearray(fixed + struct.pack(f"<{len(sizes)}Q", *sizes) + (b"" if spilled else header))
        if not self._nccl:
            for index, part in enumerate(parts):
                if part.numel():
                    self._send_part(to, index, part.cpu())
        self._post(to, torch.frombuffer(block, dtype=torch.uint8), _HEAD_TAG)
        if spilled:
            self._post(to, spill, _LARGE_TAG + _MAX_PARTS)
        if self._nccl:  # only now: its first send waits for the peer, which receives when it has read the block
            for part in parts:
                if part.numel():
                    self._keep(to, self._direction(self.place, to).send([part], to, 0), part)
        return self._numbers[to]

    def _send_part(self, to: int, index: int, part: Tensor) -> None:
        if self._out[to].fits(index, part.numel()):
            self._post(to, part, _POSTED_TAG + index)
            return
        if self._out[to].grow(index, part.numel()):
            self._post(to, torch.zeros(1, dtype=torch.uint8), _POSTED_TAG + index)
        self._post(to, part, _LARGE_TAG + index)

    def _post(self, to: int, data: Tensor, tag: int) -> None:
        try:
            work = self._group.send([data], to, tag)
        except RuntimeError as error:  # gloo refuses at once to talk to a peer whose connection has broken
            raise self._lost(to, error) from error
        self._keep(to, work, data)

    def _keep(self, to: int, work: Any, data: Tensor) -> None:
        """Gloo sends from the tensor's own memory, later."""
        self._sent[to].append((self._numbers[to], work, data))

    def delivered(self, to: int, number: int) -> None:
        """Forget the messages up to ``number``."""
        sent = self._sent[to]
        while sent and sent[0][0] <= number:
            sent.popleft()

    def flush(self) -> None:
        """Wait until everything has left."""
        for to, sent in self._sent.items():
            while sent:
                self._wait(sent[0][1], to)
                sent.popleft()

    # -- receiving -------------------------------------------------------------------------------------------

    def _never(self, source: int) -> Any:
        """A receive of what nobody sends."""
        return self._group.recv([torch.empty(1, dtype=torch.uint8)], source, _NEVER_TAG)

    def receive(self, source: int, read: Callable[[bytes], Any] = bytes) -> Message:
        """The next message of ``source``. Its header is read while the parts come that are larger than any before."""
        incoming = self._in[source]
        if incoming.broken is not None:
            raise self._lost(source, incoming.broken)
        self._wait(incoming.work, source)
        encoded, sizes = self._block(source, incoming)
        coming = [] if self._nccl else [self._coming(source, incoming, index, size) for index, size in enumerate(sizes)]
        header = read(encoded)
        for _, work in coming:
            if work is not None:
                self._wait(work, source)
        # Not earlier: gloo locks out whoever posts while it reads, and reads the slower for it.
        self._post_receives(source, incoming)
        if self._nccl:
            return Message(header=header, parts=[self._receive_gpu(source, size) for size in sizes])
        parts = [buffer[:size] for (buffer, _), size in zip(coming, sizes, strict=True)]
        return Message(header=header, parts=parts, _release=lambda: self._pool.give(buffer for buffer, _ in coming))

    def _block(self, source: int, incoming: _Incoming) -> tuple[bytes, tuple[int, ...]]:
        """Header and sizes of the parts, from the block that came."""
        block = incoming.view
        length, count, spilled = _FIXED.unpack_from(block)
        if length > _MAX_HEADER or count >= _MAX_PARTS:
            raise BridgeError(f"what place {source} sent is no message (header of {length} bytes, {count} parts)")
        sizes = struct.unpack_from(f"<{count}Q", block, _FIXED.size)
        if not spilled:
            begin = _FIXED.size + 8 * count
            return block[begin : begin + length].tobytes(), sizes
        spill = torch.empty(length, dtype=torch.uint8)
        self._wait(self._recv(spill, source, _LARGE_TAG + _MAX_PARTS), source)
        return spill.numpy().tobytes(), sizes

    def _coming(self, source: int, incoming: _Incoming, index: int, size: int) -> tuple[Tensor, Any]:
        """The buffer of a part, and what to wait for until the part is in it; None: nothing."""
        if not size:
            return torch.empty(0, dtype=torch.uint8), None
        if incoming.capacities.fits(index, size):
            buffer, work = incoming.posted.pop(index)
            return buffer, work
        if incoming.capacities.grow(index, size):
            stale, work = incoming.posted.pop(index)
            self._wait(work, source)
            self._pool.give([stale])
        buffer = self._pool.take(incoming.capacities.of(index))
        return buffer, self._recv(buffer[:size], source, _LARGE_TAG + index)

    def _recv(self, into: Tensor, source: int, tag: int) -> Any:
        """Receive what no buffer was posted for."""
        try:
            return self._group.recv([into], source, tag)
        except RuntimeError as error:
            raise self._lost(source, error) from error

    def _receive_gpu(self, source: int, size: int) -> Tensor:
        part = torch.empty(size, dtype=torch.uint8, device=self._device)
        if size:
            self._direction(source, self.place).recv([part], source, 0).wait()
        return part

    def _post_receives(self, source: int, incoming: _Incoming) -> None:
        """Be ready for the next message."""
        try:
            for index, capacity in incoming.capacities.items():
                if index not in incoming.posted:
                    buffer = self._pool.take(capacity)
                    incoming.posted[index] = buffer, self._group.recv([buffer], source, _POSTED_TAG + index)
            incoming.work = self._group.recv([incoming.block], source, _HEAD_TAG)
        except RuntimeError as error:
            incoming.broken = error  # what came before is whole; the next receive tells

    def _direction(self, source: int, target: int) -> Any:
        return self._up if source < target else self._down

    # -- waiting ---------------------------------------------------------------------------------------------

    def _wait(self, work: Any, peer: int) -> None:
        """Wait for gloo in this thread; the guard ends that when nothing can be expected of the peer any more."""
        self._guard.begin(peer)
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self._lost(peer, error) from error
        finally:
            self._guard.end()

    def _lost(self, peer: int, error: RuntimeError) -> Exception:
        return self._guard.given_up or self._watch.lost(peer, _first_line(error))

    def close(self) -> None:
        """Drop the group. Receives that are posted end with it."""
        self._guard.close()
        self._sent.clear()
        self._in.clear()
        self._group = self._up = self._down = None


class _Incoming:
    """What is posted for one sender."""

    def __init__(self) -> None:
        self.block = torch.empty(BLOCK, dtype=torch.uint8)
        self.view = self.block.numpy().data
        self.work: Any = None
        self.broken: RuntimeError | None = None
        self.capacities = _Capacities()
        self.posted: dict[int, tuple[Tensor, Any]] = {}


class _Capacities:
    """Bytes that the receiver has room for at each part; both sides compute them from the messages so far."""

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}

    def fits(self, index: int, size: int) -> bool:
        return size <= self._bytes.get(index, 0)

    def grow(self, index: int, size: int) -> bool:
        """Make room for ``size``; returns whether a smaller buffer is posted, which has to go."""
        posted = index in self._bytes
        step = max(64, 1 << max(0, size.bit_length() - 3))
        self._bytes[index] = -(-size // step) * step
        return posted

    def of(self, index: int) -> int:
        return self._bytes[index]

    def items(self) -> Iterator[tuple[int, int]]:
        yield from self._bytes.items()


class _Pool:
    """Buffers that were received into and can be again: fresh memory costs as much time as the message itself."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def take(self, size: int) -> Tensor:
        free = self._free.get(size)
        return free.pop() if free else torch.empty(size, dtype=torch.uint8)

    def give(self, buffers: Iterable[Tensor]) -> None:
        for buffer in buffers:
            if buffer.numel():
                self._free.setdefault(buffer.numel(), []).append(buffer)


class _Guard:
    """A thread that looks after the peer this rank waits for, and ends the wait when that peer is lost.

    A wait in gloo ends before its time only when another wait of the same group runs out of time, which closes all its
    connections. So from every peer something is received that never comes.
    """

    def __init__(self, watch: Watch, never: dict[int, Any]) -> None:
        self.given_up: LoomError | None = None
        """Why the wait was ended; the group is dead then."""
        self._watch, self._never = watch, never
        self._waits: tuple[int] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="bridge-guard", daemon=True).start()

    def begin(self, peer: int) -> None:
        """From now on this rank waits for ``peer``."""
        self._waits = (peer,)  # a new object: the thread tells one wait from the next by it

    def end(self) -> None:
        """It waits no longer."""
        self._waits = None

    def close(self) -> None:
        """Look no more, and let go of the group."""
        self._closed.set()
        self._never.clear()

    def _run(self) -> None:
        before: tuple[int] | None = None
        told = False
        while not self._closed.wait(POLL_S):
            waits = self._waits
            if waits is not None and waits is before:
                if not told:
                    self._watch.waiting(waits[0])
                    told = True
                if not self._alive(waits):
                    return
            elif told:
                self._watch.waiting(None)
                told = False
            before = waits

    def _alive(self, waits: tuple[int]) -> bool:
        """Whether to go on waiting; ends the wait otherwise."""
        try:
            self._watch.check(waits[0])
        except LoomError as error:
            # What a peer sent before its end may be arriving just now.
            if self._closed.wait(_GRACE_S) or self._waits is not waits:
                return True
            self.given_up = error
            with contextlib.suppress(RuntimeError, KeyError):
                self._never[waits[0]].wait(timedelta(milliseconds=1))
            return False
        return True


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__


def _nccl_group(store: dist.Store, place: int, places: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, place, places, options)


@contextlib.contextmanager
def _interface(name: str | None) -> Iterator[None]:
    """Gloo listens on the interface of the machine's host name unless this variable says otherwise."""
    key = "GLOO_SOCKET_IFNAME"
    if name is None or key in os.environ:
        yield
        return
    with _lock:
        os.environ[key] = name
        try:
            yield
        finally:
            del os.environ[key]
