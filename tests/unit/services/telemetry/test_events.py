from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.telemetry import events


@pytest.fixture(autouse=True)
def _unconfigured():
    yield
    events.configure(None, "")


def test_span_records_who_what_when_and_fields(tmp_path: Path) -> None:
    events.configure(tmp_path, "trainer-0")
    with events.span("encode", images=3) as fields:
        fields["bytes"] = 12
    (event,) = events.read(tmp_path)
    assert (event["who"], event["what"], event["images"], event["bytes"]) == ("trainer-0", "encode", 3, 12)
    assert event["t1"] >= event["t0"] > 0


def test_span_is_recorded_when_the_block_raises(tmp_path: Path) -> None:
    events.configure(tmp_path, "trainer-0")
    with pytest.raises(KeyError), events.span("encode"):
        raise KeyError("x")
    assert [event["what"] for event in events.read(tmp_path)] == ["encode"]


def test_unconfigured_writes_nothing(tmp_path: Path) -> None:
    events.configure(None, "x")
    with events.span("encode"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_read_merges_processes_in_time_and_skips_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"who": "a", "what": "x", "t0": 2.0, "t1": 3.0}) + '\n{"who": "a", "wh'
    )
    (tmp_path / "b.jsonl").write_text(json.dumps({"who": "b", "what": "y", "t0": 1.0, "t1": 5.0}) + "\n")
    assert [event["who"] for event in events.read(tmp_path)] == ["b", "a"]


def test_a_folder_that_went_away_is_said_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events.configure(tmp_path / "run" / "events", "trainer-0")
    (tmp_path / "run").rename(tmp_path / "run.1")
    for _ in range(2):
        with events.span("encode"):
            pass
    assert [record.message for record in caplog.records if "no longer recorded" in record.message] != []
    assert len(caplog.records) == 1
