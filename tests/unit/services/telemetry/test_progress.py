from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import LoggerConfig
from services.telemetry import progress as module
from services.telemetry.progress import Progress, counting, follow


def test_plain_lines_name_what_they_show() -> None:
    stream = io.StringIO()
    progress = Progress(10, LoggerConfig(progress="plain"), stream=stream)
    progress.update(5, loss=0.5, samples_per_s=31.6, wait_share=0.04, hit_rate=1.0)
    progress.update(10, loss=0.25)
    first, last = stream.getvalue().splitlines()
    assert first == "step 5/10  loss 0.5  32 samples/s  wait 4%  hits 100%"
    assert last.startswith("step 10/10  loss 0.25  ETA 0:00")


def test_off_writes_nothing() -> None:
    stream = io.StringIO()
    Progress(10, LoggerConfig(progress="off"), stream=stream).update(10, loss=1.0)
    assert stream.getvalue() == ""


def test_follow_shows_training_lines_after_the_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = json.dumps({"step": 1, "split": "train", "loss": 9.0}) + "\n"
    path.write_text(old)
    with path.open("a") as file:
        file.write(json.dumps({"step": 4, "split": "val", "loss": 7.0}) + "\n")
        file.write(json.dumps({"step": 4, "split": "train", "loss": 0.5, "hit_rate": 0.25}) + "\n")
        file.write('{"step": 5, "split"')
    stream, stop = io.StringIO(), threading.Event()
    stop.set()
    follow(tmp_path, Progress(4, LoggerConfig(progress="plain"), stream=stream), stop, start_at=len(old), period_s=0)
    assert stream.getvalue() == "step 4/4  loss 0.5  hits 25%\n"


def test_several_roles_make_one_line_a_step(tmp_path: Path) -> None:
    rows = [
        {"step": 3, "split": "train", "role": "llm", "loss": 4.5, "samples_per_s": 20.0, "wait_share": 0.1},
        {"step": 6, "split": "train", "role": "llm", "loss": 4.0, "samples_per_s": 20.0, "hit_rate": 1.0},
        {"step": 6, "split": "train", "role": "llm", "skipped_steps": 1.0},
        {"step": 6, "split": "train", "role": "diffusion", "loss": 0.5, "samples_per_s": 9.0, "hit_rate": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream, stop = io.StringIO(), threading.Event()
    stop.set()
    progress = Progress(6, LoggerConfig(progress="plain"), stream=stream)
    follow(tmp_path, progress, stop, period_s=0, roles=("llm", "diffusion"))
    assert stream.getvalue() == "step 6/6  loss 4.5  llm 4  diffusion 0.5  20 samples/s  hits 50%\n"


class Once(threading.Event):
    """Runs something at the first wait, and is set at the third."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        super().__init__()
        self.actions = list(actions)

    def wait(self, timeout: float | None = None) -> bool:
        if not self.actions:
            return True
        self.actions.pop(0)()
        return False


def test_follow_goes_on_when_lines_were_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_EVERY_S", 0.0)
    path = tmp_path / "metrics.jsonl"

    def line(step: int, loss: float) -> str:
        return json.dumps({"step": step, "split": "train", "loss": loss}) + "\n"

    path.write_text(line(1, 9.0) + line(2, 8.0))
    stream = io.StringIO()
    stop = Once(lambda: path.write_text(line(1, 9.0)), lambda: path.write_text(line(1, 9.0) + line(2, 0.5)))
    progress = Progress(4, LoggerConfig(progress="plain"), stream=stream)
    follow(tmp_path, progress, stop, start_at=path.stat().st_size, period_s=0)
    assert stream.getvalue() == "step 2/4  loss 0.5\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_counts_are_drawn_anew_on_a_terminal_and_cleared_at_the_end() -> None:
    stream = Terminal()
    with counting("encoding", stream=stream) as show:
        show(1, 2, "room_0000")
    assert stream.getvalue() == "\r\033[Kencoding room_0000 1/2\r\033[K"


def test_counts_are_lines_now_and_then_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with counting("", stream=stream) as show:
        show(1, 9, "making rooms")
        monkeypatch.setattr(module, "PLAIN_EVERY_S", 0.0)
        show(2, 9, "making rooms")
    assert stream.getvalue() == "making rooms 2/9\n"


def test_counts_can_be_off() -> None:
    stream = Terminal()
    with counting("encoding", "off", stream=stream) as show:
        show(1, 2)
    assert stream.getvalue() == ""
