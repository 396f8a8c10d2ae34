"""Failures are kept, told, and answered by the policy."""

from __future__ import annotations

import threading

import pytest

from services.errors import DataError
from services.runtime import supervise
from services.runtime.supervise import RestartPolicy
from services.telemetry import events


def boom(error):
    raise error


def test_a_failure_is_a_value_with_its_story_in_the_events(tmp_path, caplog):
    events.configure(tmp_path, "test")
    outcome = supervise.attempt("loading", lambda: boom(ValueError("seven")))
    events.configure(None, "")
    assert str(outcome.failure) == "loading: ValueError: seven"
    (event,) = events.read(tmp_path)
    assert (event["what"], event["where"], event["error"]) == ("failure", "loading", "ValueError")
    assert "in boom" in event["traceback"]
    assert "in boom" in caplog.text
    with pytest.raises(ValueError, match="seven"):
        outcome.unwrap()


def test_what_a_user_caused_is_not_logged_as_a_traceback(caplog):
    outcome = supervise.attempt("x", lambda: boom(DataError("no file")))
    assert isinstance(outcome.failure.error, DataError)
    assert caplog.text == ""


def test_a_value_passes():
    assert supervise.attempt("x", lambda: 4).unwrap() == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_wish_to_end_is_no_failure(error):
    with pytest.raises(error):
        supervise.attempt("x", lambda: boom(error()))


def test_restarts_pause_longer_each_time_and_then_give_up():
    pauses, attempts = [], []

    def fails(number):
        attempts.append(number)
        raise OSError("gone")

    policy = RestartPolicy(max_failures=3, pause_s=1.0, max_pause_s=3.0, sleep=pauses.append)
    with pytest.raises(OSError, match="gone"):
        supervise.run("x", fails, policy)
    assert attempts == [0, 1, 2, 3]
    assert pauses == [1.0, 2.0, 3.0]


def test_a_restart_that_succeeds_ends_it():
    policy = RestartPolicy(max_failures=2, sleep=lambda _: None)
    assert supervise.run("x", lambda number: number if number == 2 else boom(OSError()), policy) == 2


def test_a_healthy_time_starts_the_count_anew(monkeypatch):
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(supervise.time, "monotonic", lambda: next(clock))
    policy = RestartPolicy(max_failures=1, healthy_s=40.0, sleep=lambda _: None)
    assert supervise.run("x", lambda number: number if number == 5 else boom(OSError()), policy) == 5


def test_a_thread_that_fails_tells():
    told, done = [], threading.Event()
    supervise.thread("x", lambda: boom(RuntimeError("dead")), lambda failure: (told.append(failure), done.set()))
    assert done.wait(10)
    assert str(told[0].error) == "dead"
