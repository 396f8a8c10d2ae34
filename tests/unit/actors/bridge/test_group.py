"""The process group's transport: sizes that grow and shrink, long headers, many parts; two ranks as threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.bridge import group
from actors.bridge.group import BLOCK, GroupTransport
from services.errors import BridgeError, PeerLostError


class Calm:
    """A watch that sees everybody alive, until it has a reason not to."""

    def __init__(self) -> None:
        self.reason = ""
        self.waited: list[int | None] = []

    def waiting(self, place: int | None) -> None:
        self.waited.append(place)

    def check(self, place: int) -> None:
        if self.reason:
            raise self.lost(place, self.reason)

    def lost(self, place: int, reason: str) -> Exception:
        return PeerLostError(f"place {place}: {reason}")


@pytest.fixture
def pair() -> Iterator[tuple[GroupTransport, GroupTransport]]:
    store = dist.HashStore()

    def make(place: int) -> GroupTransport:
        cpu = torch.device("cpu")
        return GroupTransport(store, place, 2, Calm(), device=cpu, start_s=30, timeout_s=60, loopback=True)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(make, range(2))
    yield one, other
    one.close()
    other.close()


def parts_of(*sizes: int) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]


@pytest.mark.parametrize("ahead", [1, 3, 12])
def test_messages_of_any_size_arrive_whole_and_in_order(
    pair: tuple[GroupTransport, GroupTransport], ahead: int
) -> None:
    """Small after large, large after small, empty, more and fewer parts: what is posted never fits by accident.

    With one message ahead its parts mostly find their buffers posted, with more of them they overtake that.
    """
    one, other = pair
    story = [(5,), (5,), (4,), (3000,), (3000, 1), (2, 70_000, 0), (), (0,), (70_000,), (1, 1, 1), (3001,), (8, 90_000)]
    sent = [(f"message {number}".encode(), parts_of(*sizes)) for number, sizes in enumerate(story)]
    for begin in range(0, len(sent), ahead):
        for header, parts in sent[begin : begin + ahead]:
            one.send(1, header, parts)
            other.send(0, header[::-1], parts[::-1])
        for header, parts in sent[begin : begin + ahead]:
            for transport, source, head, expected in ((other, 0, header, parts), (one, 1, header[::-1], parts[::-1])):
                came = transport.receive(source)
                assert came.header == head
                assert len(came.parts) == len(expected)
                assert all(torch.equal(a, b) for a, b in zip(came.parts, expected, strict=True))
                came.release()
    one.flush()
    other.flush()


def test_the_block_goes_behind_the_parts(
    pair: tuple[GroupTransport, GroupTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its receiver, which waits for the block first, is woken once a message and finds the parts there."""
    one, other = pair
    tags: list[int] = []
    post = one._post

    def noted(to: int, data: torch.Tensor, tag: int) -> None:
        tags.append(tag)
        post(to, data, tag)

    monkeypatch.setattr(one, "_post", noted)
    story = [
        ((9, 7), [group._LARGE_TAG, group._LARGE_TAG + 1, group._HEAD_TAG]),  # nothing is posted for a first message
        ((9, 3), [group._POSTED_TAG, group._POSTED_TAG + 1, group._HEAD_TAG]),
        ((300, 0), [group._POSTED_TAG, group._LARGE_TAG, group._HEAD_TAG]),  # a byte for the buffer that was too small
        ((300, 7), [group._POSTED_TAG, group._POSTED_TAG + 1, group._HEAD_TAG]),
        ((), [group._HEAD_TAG]),
    ]
    for sizes, expected in story:
        tags.clear()
        parts = parts_of(*sizes)
        one.send(1, b"", parts)
        assert tags == expected
        assert all(torch.equal(a, b) for a, b in zip(other.receive(0).parts, parts, strict=True))


def test_a_message_that_is_kept_is_not_overwritten(pair: tuple[GroupTransport, GroupTransport]) -> None:
    one, other = pair
    sent = [parts_of(1000)[0] for _ in range(4)]
    for part in sent:
        one.send(1, b"", [part])
    kept = [other.receive(0) for _ in sent]
    for message, part in zip(kept, sent, strict=True):
        assert torch.equal(message.parts[0], part)
    addresses = {message.parts[0].data_ptr() for message in kept}
    assert len(addresses) == 4
    for message in kept:
        message.release()
        message.release()  # a second time does nothing
    again = set()
    for part in sent:
        one.send(1, b"", [part])
        message = other.receive(0)
        again.add(message.parts[0].data_ptr())
        message.release()
    assert len(again - addresses) <= 1, "released memory is received into again"


def test_a_header_longer_than_a_block_arrives(pair: tuple[GroupTransport, GroupTransport]) -> None:
    one, other = pair
    for length in (BLOCK - 100, BLOCK, 50_000, 3):
        one.send(1, b"h" * length, parts_of(7))
        came = other.receive(0)
        assert came.header == b"h" * length
        assert came.parts[0].numel() == 7


def test_too_many_parts_are_refused(pair: tuple[GroupTransport, GroupTransport]) -> None:
    with pytest.raises(BridgeError, match="has 64 tensors"):
        pair[0].send(1, b"", parts_of(*[1] * 64))


def test_a_peer_that_closes_is_lost(pair: tuple[GroupTransport, GroupTransport]) -> None:
    one, other = pair
    one.send(1, b"last", ())
    assert other.receive(0).header == b"last"
    one.flush()
    one.close()
    with pytest.raises(PeerLostError, match=r"place 0: .*Connection (closed|reset) by peer"):
        other.receive(0)


def test_a_peer_that_ends_within_a_message_is_lost(pair: tuple[GroupTransport, GroupTransport]) -> None:
    """Its parts came, the block behind them never does."""
    one, other = pair
    one.send(1, b"whole", parts_of(8))
    assert other.receive(0).header == b"whole"
    one._send_part(1, 0, parts_of(8)[0])
    one.flush()
    one.close()
    with pytest.raises(PeerLostError, match=r"place 0: .*Connection (closed|reset) by peer"):
        other.receive(0)


def test_bytes_that_are_no_message_are_refused(pair: tuple[GroupTransport, GroupTransport]) -> None:
    one, other = pair
    gloo: Any = one._group
    gloo.send([torch.full((20,), 255, dtype=torch.uint8)], 1, 1)
    with pytest.raises(BridgeError, match="is no message"):
        other.receive(0)


def test_a_wait_for_a_lost_peer_ends_with_the_reason(pair: tuple[GroupTransport, GroupTransport]) -> None:
    """The peer's connection is whole and nothing comes: gloo alone would wait for its whole time-out."""
    other = pair[1]
    watch: Any = other._watch
    watch.reason = "asleep"
    with pytest.raises(PeerLostError, match="place 0: asleep"):
        other.receive(0)
    assert watch.waited == [0]
    with pytest.raises(PeerLostError, match="place 0: asleep"):
        other.send(0, b"no more")


def test_a_header_is_read_before_its_parts_are_there(pair: tuple[GroupTransport, GroupTransport]) -> None:
    """A header that is refused needs no parts."""
    one, other = pair
    one.send(1, b"wrong", [torch.zeros(1 << 26, dtype=torch.uint8)])

    def refuse(header: bytes) -> None:
        raise BridgeError(f"not {header.decode()}")

    with pytest.raises(BridgeError, match="not wrong"):
        other.receive(0, refuse)
    other.send(0, b"7")
    assert one.receive(1, int).header == 7
