"""The mailbox's own logic; with Ray see tests/ray/test_bridge.py."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.bridge import mailbox
from actors.bridge.mailbox import Mailbox, MailboxTransport


def test_letters_are_taken_by_number_whatever_order_they_came_in() -> None:
    async def story() -> list[object]:
        box = Mailbox()
        await box.put(0, 1, 1, b"second", ["b"])
        await box.put(0, 1, 0, b"first", ["a"])
        await box.put(2, 1, 0, b"other", [])
        return [await box.take(0, 1, 0, 1), await box.take(0, 1, 1, 1), await box.take(2, 1, 0, 1)]

    assert asyncio.run(story()) == [(b"first", ["a"]), (b"second", ["b"]), (b"other", [])]


def test_taking_waits_for_a_letter_and_gives_up_in_time() -> None:
    async def story() -> tuple[object, object, object]:
        box = Mailbox()
        nothing = await box.take(0, 1, 0, 0.01)
        waiting = asyncio.create_task(box.take(0, 1, 0, 10))
        await asyncio.sleep(0)
        await box.put(0, 1, 0, b"came", [])
        return nothing, await waiting, await box.take(0, 1, 0, 0.01)

    assert asyncio.run(story()) == (None, (b"came", []), None)


def test_a_letter_is_read_and_its_tensors_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport without Ray: the mailbox answers at once, and references are the arrays themselves."""
    letter = (b"7", [torch.arange(3, dtype=torch.uint8).numpy()])
    actor = SimpleNamespace(take=SimpleNamespace(remote=lambda *_: letter))
    monkeypatch.setattr(mailbox, "call", lambda answer, *_: answer)
    monkeypatch.setattr(mailbox, "gather", lambda refs, *_: refs)
    watch: Any = None
    came = MailboxTransport(actor, 1, 2, watch, device=torch.device("cpu")).receive(0, int)
    assert came.header == 7
    assert came.parts[0].tolist() == [0, 1, 2]
    letter[1][0][:] = 9
    assert came.parts[0].tolist() == [0, 1, 2], "the memory of the object store is not ours"
