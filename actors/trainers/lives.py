"""The lives of a run: its worker groups start together, end together, and start again from what was last saved.

Nothing here knows Ray: a group is a function that returns when it has ended.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.trainers import refusal
from services.errors import PeerLostError
from services.runtime import supervise

if TYPE_CHECKING:
    from actors.trainers.roles import RoleResult

_log = logging.getLogger("loom3d")
_PATIENCE_S = 15.0
"""How long groups may take to end when nothing is to follow."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the ranks of a run of several roles meet, for one life of the run."""

    address: str
    generation: int
    roles: Mapping[str, int]
    """Ranks of every role."""
    mailbox: Any = None
    """Handle of the mailbox actor, for ``bridge.transport=objects``."""


Outcomes = dict[str, supervise.Outcome["RoleResult"]]
Group = Callable[[], "RoleResult"]
"""Trains one role; returns when it has ended."""


def live(life: Callable[[int], Outcomes], folder: Path, *, first: str, restarts: int) -> RoleResult:
    """Run ``life(number)`` until all its groups have ended well, at most ``restarts`` times more than once.

    Returns what the role ``first`` came to. An error that trying again cannot change is raised at once: one of the
    user's making, and one that comes back unchanged although nothing more was saved meanwhile. Otherwise the last
    life's error is.
    """
    before: tuple[str, str, str] | None = None
    for number in range(restarts + 1):
        outcomes = life(number)
        failed = {role: outcome.failure.error for role, outcome in outcomes.items() if outcome.failure is not None}
        if not failed:
            return outcomes[first].unwrap()
        role, error = root_cause(failed)
        refused = refusal.read(folder)
        if refused is not None:
            raise refused from error
        if isinstance(error, refusal.FINAL):
            raise error
        now = (type(error).__name__, str(error), _newest_saved(folder))
        if now == before:
            _log.warning("role %s failed as before, with nothing saved in between; it is not tried again", role)
            raise error
        before = now
        what = f"role {role} failed ({str(error).splitlines()[0]})"
        if number == restarts:
            _log.warning("%s; cluster.max_failures=%d restarts are used up", what, restarts)
            raise error
        _log.warning("%s; %s (restart %d of %d)", what, _from_where(outcomes), number + 1, restarts)
    raise AssertionError("a life ends well or is the last")


def together(groups: Mapping[str, Group], *, end: Callable[[], object], folder: Path, patience_s: float) -> Outcomes:
    """Run every group in a thread of its own until all have ended; their outcomes, in the order in which they ended.

    At the first failure ``end`` is called, which makes the others end; so it is when this thread is interrupted. One
    that has not ended ``patience_s`` seconds after that is left alone, sooner where the run is over anyway.
    """
    ended: queue.SimpleQueue[tuple[str, supervise.Outcome[RoleResult]]] = queue.SimpleQueue()

    def body(role: str, group: Group) -> None:
        ended.put((role, supervise.attempt(f"role {role}", group)))

    threads = [
        threading.Thread(target=body, args=(role, group), name=f"fit-{role}", daemon=True)
        for role, group in groups.items()
    ]
    outcomes: Outcomes = {}
    try:
        for thread in threads:
            thread.start()
        failed = False
        while len(outcomes) < len(groups):
            over = failed and (refusal.read(folder) is not None or _final(outcomes))
            timeout = None if not failed else min(_PATIENCE_S, patience_s) if over else patience_s
            role, outcome = ended.get(timeout=timeout)
            outcomes[role] = outcome
            if outcome.failure is not None and not failed:
                failed = True
                end()
    except queue.Empty:
        _log.warning("%s did not end in time", " and ".join(f"role {r}" for r in groups if r not in outcomes))
    except KeyboardInterrupt:
        end()
        with suppress(queue.Empty):
            for _ in range(len(groups) - len(outcomes)):
                ended.get(timeout=_PATIENCE_S)
        raise
    return outcomes


def root_cause(failed: Mapping[str, Exception]) -> tuple[str, Exception]:
    """The role that failed first by itself, and its error: that a peer was lost is a consequence."""
    own = [(role, error) for role, error in failed.items() if not isinstance(error, PeerLostError)]
    return (own or list(failed.items()))[0]


def _final(outcomes: Outcomes) -> bool:
    return any(o.failure is not None and isinstance(o.failure.error, refusal.FINAL) for o in outcomes.values())


def _newest_saved(folder: Path) -> str:
    """Name of the newest checkpoint of any role; "" for none."""
    return max((path.name for path in (folder / "checkpoints").rglob("step-*") if path.is_dir()), default="")


def _from_where(outcomes: Outcomes) -> str:
    return "all roles start again from their last joint step" if len(outcomes) > 1 else "it starts again"
