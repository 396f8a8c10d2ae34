"""What a caller gets when a remote call goes wrong; Ray's own exceptions, no cluster."""

from __future__ import annotations

import os

import pytest
import ray
import ray.exceptions as rx

from services.errors import DataError, DeadlineError, ServiceError
from services.runtime import calls


class Remote:
    """Stands for ray.get: a reference is a value, or an exception to raise."""

    def __init__(self):
        self.timeouts = []

    def get(self, ref, timeout):
        self.timeouts.append(timeout)
        if isinstance(ref, Exception):
            raise ref
        return ref


@pytest.fixture
def remote(monkeypatch):
    fake = Remote()
    monkeypatch.setattr(ray, "get", fake.get)
    return fake


def task_error(cause):
    return rx.RayTaskError("encode", "the remote traceback", cause).as_instanceof_cause()


def test_a_value_comes_back_within_its_deadline(remote):
    assert calls.call(3, "x", 5.0) == 3
    assert remote.timeouts == [5.0]


def test_a_deadline_says_who_waits_for_what_since_when(remote):
    with pytest.raises(DeadlineError) as caught:
        calls.call(rx.GetTimeoutError("late"), "encoder 3", 2.5)
    message = str(caught.value)
    assert f"process {os.getpid()} waits for encoder 3 since " in message
    assert "no answer in 2.5 s" in message


def test_named_errors_cross_as_they_are(remote):
    with pytest.raises(DataError, match=r"x\.png"):
        calls.call(task_error(DataError("x.png is broken")), "encoder", 1)


def test_other_errors_keep_their_remote_traceback(remote):
    with pytest.raises(ServiceError, match="encoder failed with KeyError: 'a'") as caught:
        calls.call(task_error(KeyError("a")), "encoder", 1)
    assert "the remote traceback" in str(caught.value)


def test_a_dead_actor_is_a_service_error(remote):
    with pytest.raises(ServiceError, match="encoder 1 is gone"):
        calls.call(rx.ActorDiedError(), "encoder 1", 1)


def test_gather_puts_failures_in_their_place_under_one_deadline(remote):
    late = rx.GetTimeoutError("late")
    answers = calls.gather([1, late, task_error(DataError("bad"))], ["a", "b", "c"], 4.0)
    assert answers[0] == 1
    assert isinstance(answers[1], DeadlineError)
    assert isinstance(answers[2], DataError)
    assert remote.timeouts[0] <= 4.0
    assert remote.timeouts == sorted(remote.timeouts, reverse=True)
