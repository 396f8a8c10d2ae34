"""Transport through a process group of its own, beside whatever group the workers train with.

Gloo's waits cannot be interrupted and a time-out kills the group, so a thread waits and this rank looks every now and
then whether the peer is alive. Receives are posted before they are needed: gloo sends only what is being received, so
a message arrives while its receiver computes, and its latency is that of a plain send and receive.

A message is one *block* (counts, sizes, header) and its parts. Both sides know the largest part that came at each place
so far; the receiver has a buffer of that capacity posted. A part that is larger makes the sender fill that buffer with
one byte, and travels on its own; from then on the capacity is larger.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from actors.bridge.transport import POLL_S, Message, Watch
from services.errors import BridgeError

BLOCK = 4096
"""Bytes of a block; a header that is longer spills into a part."""
_MAX_PARTS = 64
_FIXED = struct.Struct("<III")
"""Bytes of the header, number of parts, 1 if the header is the first part."""
_HEAD_TAG, _POSTED_TAG, _LARGE_TAG = 1, 100, 200
_MAX_HEADER = 1 << 28
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
        self._waiter = _Waiter()
        self._pool = _Pool()
        self._sent: dict[int, deque[tuple[int, Any, Tensor]]] = {p: deque() for p in range(places) if p != place}
        self._numbers = dict.fromkeys(self._sent, 0)
        self._out = {peer: _Capacities() for peer in range(places) if peer != place}
        self._in = {peer: self._incoming(peer) for peer in range(places) if peer != place}

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
        self._post(to, torch.frombuffer(block, dtype=torch.uint8), _HEAD_TAG)
        if spilled:
            self._post(to, spill, _LARGE_TAG + _MAX_PARTS)
        for index, part in enumerate(parts):
            if not part.numel():
                continue
            if self._nccl:
                self._keep(to, self._direction(self.place, to).send([part], to, 0), part)
            else:
                self._send_part(to, index, part.cpu())
        return self._numbers[to]

    def _send_part(self, to: int, index: int, part: Tensor) -> None:
        if self._out[to].fits(index, part.numel()):
            self._post(to, part, _POSTED_TAG + index)
            return
        if self._out[to].grow(index, part.numel()):
            self._post(to, torch.zeros(1, dtype=torch.uint8), _POSTED_TAG + index)
        self._post(to, part, _LARGE_TAG + index)

    def _post(self, to: int, data: Tensor, tag: int) -> None:
        with self._broken(to):
            self._keep(to, self._group.send([data], to, tag), data)

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
                work = sent[0][1]
                self._wait(functools.partial(self._finish, work), to)
                sent.popleft()

    # -- receiving -------------------------------------------------------------------------------------------

    def _incoming(self, source: int) -> _Incoming:
        block = torch.empty(BLOCK, dtype=torch.uint8)
        return _Incoming(block=block, work=self._group.recv([block], source, _HEAD_TAG))

    def receive(self, source: int) -> Message:
        """The next message of ``source``."""
        incoming = self._in[source]
        message, sizes = self._wait(lambda: self._receive(source, incoming), source)
        # Being ready for the next message is nothing that this one has to wait for.
        self._waiter.later(lambda: self._post_receives(source, incoming))
        if self._nccl:  # here, because it is this thread's stream that has to wait for them
            message.parts = [self._receive_gpu(source, size) for size in sizes]
        return cast(Message, message)

    def _receive(self, source: int, incoming: _Incoming) -> tuple[Message, tuple[int, ...]]:
        """Wait for a block and the parts that gloo carries; also their sizes. In the waiting thread."""
        self._finish(incoming.work)
        head = incoming.block.numpy().tobytes()
        length, count, spilled = _FIXED.unpack_from(head)
        if length > _MAX_HEADER or count >= _MAX_PARTS:
            raise BridgeError(f"what place {source} sent is no message (header of {length} bytes, {count} parts)")
        sizes = struct.unpack_from(f"<{count}Q", head, _FIXED.size)
        if spilled:
            spill = torch.empty(length, dtype=torch.uint8)
            self._finish(self._group.recv([spill], source, _LARGE_TAG + _MAX_PARTS))
            header = spill.numpy().tobytes()
        else:
            begin = _FIXED.size + 8 * count
            header = head[begin : begin + length]
        if self._nccl:
            return Message(header=header), sizes
        buffers = [self._receive_part(source, incoming, index, size) for index, size in enumerate(sizes)]
        parts = [buffer[:size] for buffer, size in zip(buffers, sizes, strict=True)]
        return Message(header=header, parts=parts, _release=lambda: self._pool.give(buffers)), sizes

    def _receive_part(self, source: int, incoming: _Incoming, index: int, size: int) -> Tensor:
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        if incoming.capacities.fits(index, size):
            buffer, work = incoming.posted.pop(index)
            self._finish(work)
            return buffer
        if incoming.capacities.grow(index, size):
            stale, work = incoming.posted.pop(index)
            self._finish(work)
            self._pool.give([stale])
        buffer = self._pool.take(incoming.capacities.of(index))
        self._finish(self._group.recv([buffer[:size]], source, _LARGE_TAG + index))
        return buffer

    def _receive_gpu(self, source: int, size: int) -> Tensor:
        part = torch.empty(size, dtype=torch.uint8, device=self._device)
        if size:
            self._direction(source, self.place).recv([part], source, 0).wait()
        return part

    def _post_receives(self, source: int, incoming: _Incoming) -> None:
        """Be ready for the next message; in the waiting thread."""
        for index, capacity in incoming.capacities.items():
            if index not in incoming.posted:
                buffer = self._pool.take(capacity)
                incoming.posted[index] = buffer, self._group.recv([buffer], source, _POSTED_TAG + index)
        incoming.work = self._group.recv([incoming.block], source, _HEAD_TAG)

    def _direction(self, source: int, target: int) -> Any:
        return self._up if source < target else self._down

    # -- waiting ---------------------------------------------------------------------------------------------

    def _finish(self, work: Any) -> None:
        work.wait(self._timeout)

    def _wait(self, what: Callable[[], Any], peer: int) -> Any:
        """What ``what`` gives, which waits for gloo in a thread; looks after the peer meanwhile."""
        self._waiter.begin(what)
        if not self._waiter.done(POLL_S):
            self._watch.waiting(peer)
            try:
                while not self._waiter.done(POLL_S):
                    self._watch.check(peer)
            finally:
                self._watch.waiting(None)
        result = self._waiter.result
        if isinstance(result, BridgeError):
            raise result
        if isinstance(result, RuntimeError):
            raise self._watch.lost(peer, _first_line(result)) from result
        return result

    @contextlib.contextmanager
    def _broken(self, peer: int) -> Iterator[None]:
        """Gloo refuses at once to talk to a peer whose connection has broken."""
        try:
            yield
        except RuntimeError as error:
            raise self._watch.lost(peer, _first_line(error)) from error

    def close(self) -> None:
        """Drop the group. Receives that are posted end with it."""
        self._waiter.close()
        if not self._waiter.stuck:
            self._sent.clear()
            self._in.clear()
            self._group = self._up = self._down = None


class _Incoming:
    """What is posted for one sender."""

    def __init__(self, *, block: Tensor, work: Any) -> None:
        self.block, self.work = block, work
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

    def give(self, buffers: Sequence[Tensor]) -> None:
        for buffer in buffers:
            if buffer.numel():
                self._free.setdefault(buffer.numel(), []).append(buffer)


class _Waiter:
    """A thread that waits for one thing at a time; it may be left behind in a wait that never ends."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[tuple[Callable[[], Any], bool] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.result: Any = None
        """Of the last wait: what it gave, or the RuntimeError or BridgeError that it ended with."""
        self.stuck = False
        threading.Thread(target=self._run, name="bridge-wait", daemon=True).start()

    def begin(self, what: Callable[[], Any]) -> None:
        """Wait for ``what``."""
        assert not self.stuck, "a transport whose wait failed is not used again"
        self.stuck = True
        self._todo.put((what, True))

    def later(self, what: Callable[[], Any]) -> None:
        """Do ``what`` before the next wait; that one tells of its error."""
        self._todo.put((what, False))

    def done(self, timeout_s: float) -> bool:
        """Whether the wait ended within the time; then there is a :attr:`result`."""
        try:
            self.result = self._done.get(timeout=timeout_s)
        except queue.Empty:
            return False
        self.stuck = False
        return True

    def close(self) -> None:
        """End when there is nothing more to wait for."""
        self._todo.put(None)

    def _run(self) -> None:
        failed: Exception | None = None
        while (entry := self._todo.get()) is not None:
            what, awaited = entry
            result: Any = failed
            if failed is None:
                try:
                    result = what()
                except (RuntimeError, BridgeError) as error:
                    result = error
                    failed = None if awaited else error
            del entry, what
            if awaited:
                self._done.put(result)


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
