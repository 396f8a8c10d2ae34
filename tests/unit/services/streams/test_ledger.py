from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from services.errors import DataError, QuarantineLimitError
from services.streams.ledger import Ledger, read_quarantine


def test_each_sample_counts_once_and_the_limit_names_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    ledger = Ledger(path, max_broken=0.02, total=100)
    ledger.add({"rooms/a#view0": "a.jpg: truncated"}, step=3)
    ledger.add({"rooms/a#view0": "a.jpg: truncated", "rooms/b#view1": "b.jpg: missing"}, step=4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["id"], line["step"]) for line in lines] == [("rooms/a#view0", 3), ("rooms/b#view1", 4)]
    with pytest.raises(QuarantineLimitError) as caught:
        ledger.add({"rooms/c#view2": "c.jpg: empty"}, step=5)
    for part in ("3 of 100", "3.00%", "2.00%", "c.jpg: empty", str(path), "data.quarantine", "data.max_broken"):
        assert part in str(caught.value)
    assert read_quarantine(path) == ledger.broken == {"rooms/a#view0", "rooms/b#view1", "rooms/c#view2"}


def test_ranks_share_the_file_and_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    one, two = (Ledger(path, max_broken=0.1, total=10) for _ in range(2))
    one.add({"a": "x"}, 1)
    two.add({"a": "x"}, 1)
    assert len(path.read_text().splitlines()) == 1
    with pytest.raises(QuarantineLimitError, match="2 of 10"):
        two.add({"b": "x"}, 1)
    with pytest.raises(QuarantineLimitError):
        one.add({}, 2)


def test_an_earlier_attempt_counts_and_a_torn_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Ledger(path, max_broken=1.0, total=10).add({"a": "x"}, 1)
    with path.open("a") as file:
        file.write('{"id": "tor')
    ledger = Ledger(path, max_broken=1.0, total=10)
    assert ledger.broken == {"a"}
    ledger.add({"b": "y"}, 2)
    assert Ledger(path, max_broken=1.0, total=10).broken == {"a", "b"}


def test_quarantine_lists(tmp_path: Path) -> None:
    assert read_quarantine("") == frozenset()
    path = tmp_path / "ids.txt"
    path.write_text('# by hand\nroom-1\n\n{"id": "rooms/room-2#view3", "reason": "blurred"}\n')
    assert read_quarantine(path) == {"room-1", "rooms/room-2#view3"}
    path.write_text('{"sample": 3}\n')
    with pytest.raises(DataError, match=r"ids\.txt:1: the object has no 'id'"):
        read_quarantine(path)
    path.write_text('ok\n{"id": \n')
    with pytest.raises(DataError, match=r"ids\.txt:2"):
        read_quarantine(path)
    with pytest.raises(DataError, match=r"gone\.txt \(data\.quarantine\)"):
        read_quarantine(tmp_path / "gone.txt")


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        blocked = tmp_path / "file"
        blocked.write_text("")
        path = blocked / "quarantine.jsonl"
    else:
        tmp_path.chmod(0o500)
        path = tmp_path / "quarantine.jsonl"
    with pytest.raises(OSError, match=str(tmp_path)):
        Ledger(path, max_broken=1.0, total=1).add({"a": "x"}, 1)
