"""Every remote call has a deadline, and its error says who waits for what since when. No naked ``ray.get``."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from services.errors import USER_ERRORS, DeadlineError, ServiceError


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))


def _failure(error: Exception, what: str, asked_at: float, timeout_s: float) -> Exception:
    """The named error for what Ray raised while process ``os.getpid()`` waited for ``what``."""
    import ray.exceptions as rx

    if isinstance(error, rx.GetTimeoutError):
        return DeadlineError(
            f"process {os.getpid()} waits for {what} since {_clock(asked_at)}: no answer in {timeout_s:g} s"
        )
    if isinstance(error, rx.RayTaskError):
        cause = error.cause
        if isinstance(cause, USER_ERRORS):
            return cause
        return ServiceError(
            f"{what} failed with {type(cause).__name__}: {cause}\n{error}"
        )  # Ray's text is the remote traceback
    return ServiceError(f"{what} is gone ({type(error).__name__}: {error}); asked at {_clock(asked_at)}")


def call(ref: Any, what: str, timeout_s: float) -> Any:
    """The value of ``ref``. ``what`` names who answers what, for the error.

    Raises DeadlineError after ``timeout_s`` seconds, a named error of ours as the remote side raised it, and
    ServiceError for any other remote failure, a dead actor and a lost object alike.
    """
    import ray
    import ray.exceptions as rx

    asked_at = time.time()
    try:
        return ray.get(ref, timeout=max(0.0, timeout_s))
    except (rx.RayError, TimeoutError) as error:
        failure = _failure(error, what, asked_at, timeout_s)
        raise failure from (None if failure is getattr(error, "cause", None) else error)


def gather(refs: Sequence[Any], what: Sequence[str], timeout_s: float) -> list[Any]:
    """The values of ``refs`` in order under one deadline; a failed one is its exception, in its place."""
    deadline = time.monotonic() + timeout_s
    answers: list[Any] = []
    for ref, name in zip(refs, what, strict=True):
        try:
            answers.append(call(ref, name, deadline - time.monotonic()))
        except USER_ERRORS as error:
            answers.append(error)
    return answers
