"""What the training loop knows of the other roles: :class:`Link`, and :class:`Alone` where there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from actors.bridge import message, vote
from actors.bridge.liveness import Liveness
from actors.bridge.message import DTYPES, Header, Route, TensorHeader, routes
from actors.bridge.schedule import Op, source_schedule, target_schedule
from actors.bridge.transport import Message, Transport
from actors.bridge.vote import Agreement, Directive, Verdict
from actors.trainers.backends.base import Backend, Edge
from configs import ConfigError
from models.spec import EdgeSpec


@dataclass(frozen=True, kw_only=True)
class Micro:
    """A rank's part of a micro-batch, as the other side of an edge must know it too."""

    step: int
    index: int
    kind: str
    ids: tuple[str, ...]
    zero: tuple[bool, ...]
    """Which samples have weight 0."""


class Links(Protocol):
    """What :class:`Link` and :class:`Alone` have in common; all that the loop uses."""

    joint: bool
    """Whether there are other roles."""
    coordinator: bool
    """Whether this is the rank whose directive counts."""

    def ops(self, kinds: Sequence[str]) -> tuple[Op, ...]: ...  # noqa: D102
    def phase(self, name: str, step: int = -1, micro: int = -1) -> None: ...  # noqa: D102
    def agree(self, step: int, counts: Mapping[str, float], broken: Mapping[str, str]) -> Agreement: ...  # noqa: D102
    def exchange(self, what: str, step: int, data: Any) -> list[Any]: ...  # noqa: D102
    def vote(self, step: int, finite: bool, directive: Directive | None = None) -> Verdict: ...  # noqa: D102
    def send(self, micro: Micro, tensors: Mapping[str, Tensor], *, gradients: bool = True) -> None: ...  # noqa: D102
    def receive(self, micro: Micro, *, gradients: bool = True) -> dict[str, Tensor]: ...  # noqa: D102
    def answer(self, micro: Micro, received: Mapping[str, Tensor], *, scale: float = 1.0) -> None: ...  # noqa: D102
    def gradients(self, micro: Micro) -> list[Edge]: ...  # noqa: D102
    def done(self, micro: Micro) -> None: ...  # noqa: D102
    def close(self, error: BaseException | None = None) -> None: ...  # noqa: D102


class Alone:
    """A run of one role: its ranks agree through their backend, and nothing crosses."""

    joint = False

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.coordinator = backend.rank == 0

    def ops(self, kinds: Sequence[str]) -> tuple[Op, ...]:
        """One micro-batch after the other; "" is one in which the role takes no part."""
        return source_schedule(kinds, (), 1)

    def phase(self, name: str, step: int = -1, micro: int = -1) -> None:
        """Nobody watches."""

    def agree(self, step: int, counts: Mapping[str, float], broken: Mapping[str, str]) -> Agreement:  # noqa: ARG002
        """Counts over all ranks, and every broken sample."""
        messages = self._backend.exchange((dict(counts), dict(broken)))
        return vote.agreement("", [""] * len(messages), messages)

    def exchange(self, what: str, step: int, data: Any) -> list[Any]:  # noqa: ARG002
        """Every rank's data."""
        return self._backend.exchange(data)

    def vote(self, step: int, finite: bool, directive: Directive | None = None) -> Verdict:  # noqa: ARG002
        """The backend's sums are equal on all ranks already; a directive is that of rank 0."""
        if directive is None:
            return Verdict(finite=finite)
        return vote.verdict([""], [(finite, self._backend.exchange(directive)[0])])

    def send(self, micro: Micro, tensors: Mapping[str, Tensor], *, gradients: bool = True) -> None:
        """Nobody is there to send to."""

    def receive(self, micro: Micro, *, gradients: bool = True) -> dict[str, Tensor]:  # noqa: ARG002
        """Nothing."""
        return {}

    def answer(self, micro: Micro, received: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        """Nobody asked."""

    def gradients(self, micro: Micro) -> list[Edge]:  # noqa: ARG002
        """None come back."""
        return []

    def done(self, micro: Micro) -> None:
        """Nothing was held."""

    def close(self, error: BaseException | None = None) -> None:
        """Nothing to let go of."""


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A message whose gradients are awaited."""

    edge: EdgeSpec
    route: Route
    header: Header
    number: int


class Link:
    """One rank's ends of the edges of its role, and its voice among all ranks of all roles.

    Use it as a context manager: an error inside is told to the other ranks, so that they end with its reason.
    """

    joint = True

    def __init__(
        self,
        transport: Transport,
        *,
        role: str,
        rank: int,
        roles: Mapping[str, int],
        edges: Sequence[EdgeSpec],
        window: int,
        generation: int = 0,
        liveness: Liveness | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``roles`` gives the ranks of every role; its first one coordinates. ConfigError for edges that cannot be."""
        check_edges(edges, roles)
        self.role, self.rank, self.roles, self.generation = role, rank, dict(roles), generation
        self.sends = tuple(edge for edge in edges if edge.source == role)
        self.receives = tuple(edge for edge in edges if edge.target == role)
        self.owners = [name for name, ranks in roles.items() for _ in range(ranks)]
        self.names = [rank_name(name, number) for name, ranks in roles.items() for number in range(ranks)]
        self.place = place_of(roles, role, rank)
        self.coordinator = self.place == 0
        self._world_size = roles[role]
        self._transport, self._liveness = transport, liveness
        self._window, self._device = window, torch.device(device)
        self._sent: dict[int, list[_Sent]] = {}
        self._left: dict[int, dict[str, Tensor]] = {}
        self._came: dict[int, list[tuple[EdgeSpec, Route, Header]]] = {}
        self._held: dict[int, list[Message]] = {}

    # -- all ranks together ----------------------------------------------------------------------------------

    def ops(self, kinds: Sequence[str]) -> tuple[Op, ...]:
        """The order of this role's passes over micro-batches of ``kinds``; "" is one without part in it."""
        edges = self.sends or self.receives
        crossing = {kind for kind in kinds if any(crosses(edge, kind) for edge in edges)}
        return source_schedule(kinds, crossing, self._window) if self.sends else target_schedule(kinds, crossing)

    def phase(self, name: str, step: int = -1, micro: int = -1) -> None:
        """Say what this rank does from now on."""
        if self._liveness is not None:
            self._liveness.phase(name, step, micro)

    def exchange(self, what: str, step: int, data: Any) -> list[Any]:
        """Every rank's ``data`` (JSON values), in the order of the places. BridgeError if one is elsewhere."""
        encoded = vote.encode(what, self.generation, step, data)
        others = [place for place in range(len(self.names)) if place != self.place]
        numbers = {place: self._transport.send(place, encoded) for place in others}
        answers = [data] * len(self.names)
        for place in others:
            answer = self._transport.receive(place)
            answers[place] = vote.decode(
                answer.header, what, self.generation, step, sender=self.names[place], receiver=self.names[self.place]
            )
            answer.release()
            self._transport.delivered(place, numbers[place] - 1)
        return answers

    def agree(self, step: int, counts: Mapping[str, float], broken: Mapping[str, str]) -> Agreement:
        """Counts of the loss terms and broken samples of the step, from all ranks of all roles."""
        messages = self.exchange("agree", step, [dict(counts), dict(broken)])
        return vote.agreement(self.role, self.owners, [(counts, broken) for counts, broken in messages])

    def vote(self, step: int, finite: bool, directive: Directive | None = None) -> Verdict:
        """What all ranks do: skip if one is not finite; then what rank 0 of the first role says."""
        ballots = self.exchange("vote", step, [bool(finite), directive or "continue"])
        return vote.verdict(self.owners, [(finite, directive) for finite, directive in ballots])

    # -- the sending end -------------------------------------------------------------------------------------

    def send(self, micro: Micro, tensors: Mapping[str, Tensor], *, gradients: bool = True) -> None:
        """Send what a forward pass gave along the edges that take this kind; does not wait.

        ``gradients``: the target answers; :meth:`gradients` collects that. False for a pass without backward.
        """
        for edge in self.sends:
            if not crosses(edge, micro.kind):
                continue
            for route in self._routes(edge, micro):
                begin, end = self._local(route, micro)
                packed = message.pack(edge, tensors, begin, end, sender=self.names[self.place])
                packed.parts = [part.to(self._device) for part in packed.parts]
                if not gradients:
                    packed.tensors = [replace(tensor, gradient=False) for tensor in packed.tensors]
                header = self._header(edge, micro, begin, end, tuple(packed.tensors))
                number = self._transport.send(self._place(edge.target, route.target), header.encode(), packed.parts)
                if gradients:
                    sent = _Sent(edge=edge, route=route, header=header, number=number)
                    self._sent.setdefault(micro.index, []).append(sent)
            if gradients:
                self._left.setdefault(micro.index, {}).update(
                    {t.name: tensors[t.name] for t in edge.tensors if t.gradient}
                )

    def gradients(self, micro: Micro) -> list[Edge]:
        """Pairs (tensor that was sent, gradient that came back) of a micro-batch; waits. Valid until :meth:`done`."""
        left = self._left.pop(micro.index, {})
        pieces: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        for sent in self._sent.pop(micro.index, []):
            place = self._place(sent.edge.target, sent.route.target)
            begin, end = self._local(sent.route, micro)
            expected = self._header(sent.edge, micro, begin, end, _with_gradient(sent.header.tensors), back=True)
            header, parts = self._take(place, micro, expected)
            self._transport.delivered(place, sent.number)
            for tensor, part in zip(expected.tensors, parts, strict=True):
                value = message.from_bytes(part, tensor, _axes(sent.edge, tensor.name), header.samples)
                pieces.setdefault((sent.edge.target, tensor.name), []).append((begin, value.to(self._device)))
        return [(left[name], _assemble(left[name], found)) for (_, name), found in pieces.items()]

    # -- the receiving end -----------------------------------------------------------------------------------

    def receive(self, micro: Micro, *, gradients: bool = True) -> dict[str, Tensor]:
        """The tensors of a micro-batch by name, ragged ones with ``<name>_lengths``; waits. Valid until :meth:`done`.

        Those of which a gradient returns are leaves that require one.
        """
        received: dict[str, Tensor] = {}
        for edge in self.receives:
            if not crosses(edge, micro.kind):
                continue
            found: dict[str, list[Tensor]] = {}
            for route in self._routes(edge, micro):
                begin, end = self._local(route, micro)
                declared = tuple(
                    TensorHeader(name=t.name, dtype=t.spec.dtype, shape=(), gradient=t.gradient and gradients)
                    for t in edge.tensors
                )
                expected = self._header(edge, micro, begin, end, declared)
                header, parts = self._take(self._place(edge.source, route.source), micro, expected)
                self._came.setdefault(micro.index, []).append((edge, route, header))
                sender = rank_name(edge.source, route.source)
                for tensor, part in zip(header.tensors, parts, strict=True):
                    message.check_shape(edge, tensor, sender=sender, receiver=self.names[self.place])
                    axes = _axes(edge, tensor.name)
                    found.setdefault(tensor.name, []).append(message.from_bytes(part, tensor, axes, header.samples))
                    if axes:
                        lengths = torch.tensor(tensor.lengths, dtype=torch.int64)
                        found.setdefault(f"{tensor.name}_lengths", []).append(lengths)
            wanted = {t.name for t in edge.tensors if t.gradient and gradients}
            for name, tensors in found.items():
                received[name] = message.merge(tensors).to(self._device).detach().requires_grad_(name in wanted)
        return received

    def answer(self, micro: Micro, received: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        """Send back the gradients of what :meth:`receive` gave, times ``scale``, zeros where none arose.

        What crosses is the gradient of the step's global loss; a backend that scales its loss is undone here. Does
        not wait.
        """
        for edge, route, header in self._came.pop(micro.index, []):
            begin, end = self._local(route, micro)
            tensors = _with_gradient(header.tensors)
            parts = []
            for tensor in tensors:
                leaf = received[tensor.name]
                gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                piece = gradient[begin:end] if scale == 1.0 else gradient[begin:end] * scale
                # Ranks that pad to a longer neighbour cut that off again.
                piece = piece[(slice(None), *(slice(size) for size in tensor.shape))]
                parts.append(message.to_bytes(piece, _axes(edge, tensor.name), tensor.lengths or None))
            back = self._header(edge, micro, begin, end, tensors, back=True)
            self._transport.send(self._place(edge.source, route.source), back.encode(), parts)

    def done(self, micro: Micro) -> None:
        """The tensors of this micro-batch are no longer needed."""
        self._came.pop(micro.index, None)
        for held in self._held.pop(micro.index, []):
            held.release()

    # -- parts -----------------------------------------------------------------------------------------------

    def _take(self, place: int, micro: Micro, expected: Header) -> tuple[Header, list[Tensor]]:
        """The next message of ``place``, which must be the expected one."""

        def read(encoded: bytes) -> Header:
            header = Header.decode(encoded)
            header.check(expected, sender=self.names[place], receiver=self.names[self.place])
            return header

        came = self._transport.receive(place, read)
        self._held.setdefault(micro.index, []).append(came)
        return came.header, came.parts

    def _header(
        self, edge: EdgeSpec, micro: Micro, begin: int, end: int, tensors: tuple[TensorHeader, ...], back: bool = False
    ) -> Header:
        ids = micro.ids[begin:end]
        return Header(
            generation=self.generation,
            step=micro.step,
            micro=micro.index,
            edge=f"{edge.source} -> {edge.target}{' back' if back else ''}",
            samples=end - begin,
            first=ids[0] if ids else "",
            digest=message.digest(ids),
            zero=tuple(i for i, zero in enumerate(micro.zero[begin:end]) if zero),
            tensors=tensors,
        )

    def _routes(self, edge: EdgeSpec, micro: Micro) -> list[Route]:
        """Routes of an edge that begin or end at this rank."""
        every = routes(len(micro.ids) * self._world_size, self.roles[edge.source], self.roles[edge.target])
        return [r for r in every if (r.source if edge.source == self.role else r.target) == self.rank]

    def _local(self, route: Route, micro: Micro) -> tuple[int, int]:
        """A route's samples as places in this rank's part of the micro-batch."""
        first = self.rank * len(micro.ids)
        return route.begin - first, route.end - first

    def _place(self, role: str, rank: int) -> int:
        return place_of(self.roles, role, rank)

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self, error: BaseException | None = None) -> None:
        """End. With ``error``, tell the other ranks why; without, wait until all have ended."""
        if error is not None and self._liveness is not None:
            self._liveness.fail(f"{type(error).__name__}: {error}")
        try:
            if error is None:
                self._transport.flush()
                if self._liveness is not None:
                    self._liveness.end()
        finally:
            self._transport.close()
            if self._liveness is not None:
                self._liveness.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


def rank_name(role: str, rank: int) -> str:
    """What a rank is called in messages."""
    return f"rank {rank} of {role}"


def place_of(roles: Mapping[str, int], role: str, rank: int) -> int:
    """Number of a rank among the ranks of all roles."""
    offset = 0
    for name, ranks in roles.items():
        if name == role:
            return offset + rank
        offset += ranks
    raise ConfigError(f"there is no role {role!r}; the run has {', '.join(roles)}")


def crosses(edge: EdgeSpec, kind: str) -> bool:
    """Whether micro-batches of ``kind`` use the edge."""
    return not edge.kinds or kind in edge.kinds


def check_edges(edges: Sequence[EdgeSpec], roles: Mapping[str, int]) -> None:
    """ConfigError unless every edge joins two roles of the run, no role is both ends, and names are unambiguous."""
    both = {edge.source for edge in edges} & {edge.target for edge in edges}
    if both:
        raise ConfigError(f"role {sorted(both)[0]!r} both sends and receives; a role is one end of its edges")
    pairs = [(edge.source, edge.target) for edge in edges]
    for edge in edges:
        if edge.source not in roles or edge.target not in roles:
            raise ConfigError(f"edge {edge.source} -> {edge.target}: the run has the roles {', '.join(roles)}")
        if pairs.count((edge.source, edge.target)) > 1:
            raise ConfigError(f"two edges {edge.source} -> {edge.target}; put their tensors into one")
        for tensor in edge.tensors:
            if tensor.spec.dtype not in DTYPES:
                raise ConfigError(f"{tensor.name} is {tensor.spec.dtype}; an edge carries {', '.join(DTYPES)}")
            if tensor.gradient and not DTYPES[tensor.spec.dtype].is_floating_point:
                raise ConfigError(f"{tensor.name} is {tensor.spec.dtype}: no gradient of it can return")
    for role in roles:
        names = [tensor.name for edge in edges if edge.target == role for tensor in edge.tensors]
        if len(names) > len(set(names)):
            raise ConfigError(f"role {role!r} receives two tensors of the same name: {names}")


def _with_gradient(tensors: Sequence[TensorHeader]) -> tuple[TensorHeader, ...]:
    return tuple(tensor for tensor in tensors if tensor.gradient)


def _axes(edge: EdgeSpec, name: str) -> tuple[int, ...]:
    return next(message.ragged_axes(tensor) for tensor in edge.tensors if tensor.name == name)


def _assemble(tensor: Tensor, pieces: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The gradient of ``tensor`` from pieces (first sample, gradient); zero where there is padding."""
    if len(pieces) == 1 and pieces[0][1].shape == tensor.shape:
        return pieces[0][1]
    whole = torch.zeros_like(tensor, dtype=pieces[0][1].dtype, memory_format=torch.contiguous_format)
    for begin, piece in pieces:
        region = whole[begin : begin + len(piece)]
        region[(slice(None), *(slice(size) for size in piece.shape[1:]))] = piece
    return whole
