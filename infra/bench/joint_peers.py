"""Two plain processes that are the two roles of a joint run, and do what the benchmark tells them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

from actors.bridge.rendezvous import Rendezvous

ROLES = {"llm": 1, "diffusion": 1}
"""Ranks by role; a role's place here is that of its process."""
_START_S, _WORK_S = 120.0, 300.0


class Peers:
    """The processes: each makes an object and answers calls of its methods.

    Args:
        make: (role, address of the rendezvous, settings) -> the object; at the top level of a module.
        settings: what ``make`` needs to know.
        pinned: each process keeps to one core of its own.
    """

    def __init__(self, make: Callable[..., Any], settings: dict[str, Any], *, pinned: bool) -> None:
        context = multiprocessing.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        if pinned and len(cores) < len(ROLES):
            raise RuntimeError(f"{len(ROLES)} processes with a core each need as many cores, there are {len(cores)}")
        self._open = ExitStack()
        rendezvous = self._open.enter_context(Rendezvous())
        rendezvous.open(0)
        self._ends, self._children = [], []
        for place, role in enumerate(ROLES):
            mine, theirs = context.Pipe()
            core = cores[place] if pinned else None
            child = context.Process(
                target=_serve, args=(theirs, make, role, rendezvous.address, settings, core), daemon=True
            )
            child.start()
            theirs.close()
            self._ends.append(mine)
            self._children.append(child)
        self._answers(tuple(ROLES), _START_S)

    def call(self, method: str, *args: Any, roles: Sequence[str] = tuple(ROLES)) -> dict[str, Any]:
        """What ``method`` returns in each of ``roles``, which run it at once."""
        for role in roles:
            self._ends[list(ROLES).index(role)].send((method, args))
        return self._answers(roles, _WORK_S)

    def _answers(self, roles: Sequence[str], limit_s: float) -> dict[str, Any]:
        answers = {}
        for role in roles:
            end = self._ends[list(ROLES).index(role)]
            if not end.poll(limit_s):
                raise RuntimeError(f"the process of {role} says nothing for {limit_s:g} s")
            try:
                answers[role] = end.recv()
            except EOFError:
                raise RuntimeError(f"the process of {role} has ended; its error stands above") from None
        return answers

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for child in self._children:
            child.join(5.0)
            child.kill()
            child.join()
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(
    end: Any, make: Callable[..., Any], role: str, address: str, settings: dict[str, Any], core: int | None
) -> None:
    """A process: make the object, then answer calls until the other end closes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if core is not None:
        os.sched_setaffinity(0, {core})  # before torch starts threads, which inherit it
    import torch

    torch.set_num_threads(1)
    made = make(role, address, settings)
    end.send(None)
    while True:
        try:
            method, args = end.recv()
        except EOFError:
            getattr(made, "close", _nothing)()
            return
        end.send(getattr(made, method)(*args))


def _nothing() -> None:
    """Of an object that has nothing to end."""
