from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.telemetry import events, logs


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, run = logging.getLogger(), logging.getLogger(logs.RUN)
    handlers, level = list(root.handlers), run.level
    yield
    root.handlers[:] = handlers
    run.setLevel(level)
    events.configure(None, "")


def said(folder: Path) -> list[tuple[str, str, str]]:
    return [(e["who"], e["level"], e["text"]) for e in events.read(folder) if e["what"] == logs.EVENT]


def test_what_our_loggers_say_in_a_worker_becomes_an_event_once(tmp_path: Path) -> None:
    logs.record(tmp_path, "trainer-0")
    logs.record(tmp_path, "trainer-0")
    logging.getLogger("loom3d").warning("%s is left out", "room_0001")
    logging.getLogger("services.features.client").warning("the service is gone")
    logging.getLogger("loom3d").debug("a detail")
    logging.getLogger("ray.data").warning("Starting execution")
    assert said(tmp_path) == [
        ("trainer-0", "WARNING", "room_0001 is left out"),
        ("trainer-0", "WARNING", "the service is gone"),
    ]


def test_the_driver_shows_what_workers_say_while_it_waits(tmp_path: Path) -> None:
    old = {"who": "trainer-0", "what": "log", "t0": 1.0, "t1": 1.0, "level": "WARNING", "text": "of an earlier run"}
    (tmp_path / "trainer-0.jsonl").write_text(json.dumps(old) + "\n")
    stream = io.StringIO()
    logs.record(tmp_path, "driver")
    path = tmp_path / "trainer-0.jsonl"
    with logs.terminal(stream=stream), logs.relayed(tmp_path, period_s=0.01), path.open("a") as file:
        file.write(json.dumps({**old, "text": "view 3 is broken"}) + "\n")
        file.write(json.dumps({**old, "what": "step"}) + "\n")
        file.write('{"who": "trainer-0", "what": "log", "te')
    assert stream.getvalue() == "warning: [trainer-0] view 3 is broken\n"
    assert said(tmp_path) == [
        ("trainer-0", "WARNING", "of an earlier run"),
        ("trainer-0", "WARNING", "view 3 is broken"),
    ]


def test_a_terminal_shows_the_story_and_warnings_of_everybody() -> None:
    stream = Terminal()
    with logs.terminal(stream=stream):
        logging.getLogger("loom3d").info("starting Ray")
        logging.getLogger("services.x").info("a detail")
        logging.getLogger("some_library").warning("careful")
    logging.getLogger("loom3d").warning("after the end")
    assert stream.getvalue() == "\r\033[Kstarting Ray\n\r\033[Kwarning: careful\n"


def test_debug_is_seen_by_whoever_asks() -> None:
    assert not logs.debugging()
    with logs.terminal(debug=True, stream=io.StringIO()):
        assert logs.debugging()
    assert not logs.debugging()


def test_a_run_folder_that_is_gone_does_not_stop_who_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs.record(tmp_path / "events", "driver")
    (tmp_path / "events").rmdir()
    logging.getLogger("loom3d").warning("said all the same")
    assert "said all the same" in caplog.text
    assert "events of driver are no longer recorded" in caplog.text
