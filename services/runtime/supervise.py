"""The only place with a broad ``except``: run something that must not take its neighbours down, and keep the story.

A failure is kept with its traceback, written to the events, and either handed to the caller as a value, answered by
a restart within a policy, or raised again.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from services.errors import USER_ERRORS
from services.telemetry import events

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong, where, when; ``error`` is the exception itself."""

    what: str
    error: Exception
    traceback: str
    time: float

    def __str__(self) -> str:
        return f"{self.what}: {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[T]):
    """The value of a supervised function, or its failure: exactly one of them is set."""

    value: T | None = None
    failure: Failure | None = None

    def unwrap(self) -> T:
        """The value; raises what the function raised."""
        if self.failure is not None:
            raise self.failure.error
        return self.value  # type: ignore[return-value]


@dataclass(kw_only=True)
class RestartPolicy:
    """At most ``max_failures`` failures, with a pause that doubles from ``pause_s`` to ``max_pause_s``.

    A function that ran for ``healthy_s`` seconds before it failed starts counting anew.
    """

    max_failures: int = 3
    pause_s: float = 0.5
    max_pause_s: float = 30.0
    healthy_s: float = 600.0
    sleep: Callable[[float], Any] = field(default=time.sleep, repr=False)


def attempt(what: str, function: Callable[[], T]) -> Outcome[T]:
    """Run ``function`` once. A failure is recorded in the events and returned, never raised.

    KeyboardInterrupt and SystemExit pass: they are no failures.
    """
    started = time.time()
    try:
        return Outcome(value=function())
    except Exception as error:  # noqa: BLE001  this file's purpose
        failure = Failure(what=what, error=error, traceback=traceback.format_exc(), time=time.time())
        events.emit(
            "failure", started, failure.time, where=what, error=type(error).__name__, message=str(error),
            traceback=failure.traceback,
        )  # fmt: skip
        # What a user caused is told in one line by whoever shows it; the rest needs its traceback now.
        if not isinstance(error, USER_ERRORS):
            _log.error("%s\n%s", failure, failure.traceback)
        return Outcome(failure=failure)


def run(what: str, function: Callable[[int], T], policy: RestartPolicy) -> T:
    """Run ``function(attempt)`` until it returns, restarting it within ``policy``; then raise its last error."""
    failures, pause, count = 0, policy.pause_s, 0
    while True:
        started = time.monotonic()
        outcome = attempt(what, lambda count=count: function(count))  # type: ignore[misc]
        if outcome.failure is None:
            return outcome.unwrap()
        if time.monotonic() - started >= policy.healthy_s:
            failures, pause = 0, policy.pause_s
        failures, count = failures + 1, count + 1
        if failures > policy.max_failures:
            raise outcome.failure.error
        _log.warning("%s; restart %d of %d in %.1f s", outcome.failure, failures, policy.max_failures, pause)
        policy.sleep(pause)
        pause = min(2 * pause, policy.max_pause_s)


def thread(what: str, function: Callable[[], None], on_failure: Callable[[Failure], None]) -> threading.Thread:
    """A started daemon thread; if ``function`` fails, ``on_failure`` learns it, so that nobody waits for ever."""

    def body() -> None:
        outcome = attempt(what, function)
        if outcome.failure is not None:
            on_failure(outcome.failure)

    started = threading.Thread(target=body, name=what, daemon=True)
    started.start()
    return started
