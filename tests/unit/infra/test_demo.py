"""``make demo``: what must be better than before training, and the page over all phases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra import demo

LOSS = {"value": 1.0, "baseline": 2.0, "baseline_name": "untrained network", "better": "lower"}
METRIC = {
    "value": 0.5,
    "baseline": 0.9,
    "baseline_name": "majority",
    "better": "higher",
    "also": {"before training": 0.4},
}


def write_run(root: Path, metrics: dict[str, Any], name: str = "uniugg_vae-tiny") -> Path:
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"samples": 7, "metrics": metrics}))
    return folder


def test_a_phase_that_beats_its_untrained_self_has_no_faults(tmp_path: Path) -> None:
    assert demo.check(write_run(tmp_path, {"loss": LOSS, "tokens/cosine": METRIC})) == []


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"loss": {**LOSS, "value": 2.5}, "a": METRIC}, "loss is 2.5, untrained 2"),
        ({"loss": LOSS, "a": {**METRIC, "value": 0.3}}, "no metric beats the untrained network"),
        ({"loss": LOSS}, "no metric beats the untrained network"),
        ({"a": METRIC}, "evaluation.json has no loss"),
        ({"text/ce": {**LOSS, "baseline_name": "chance"}, "a": METRIC}, "text/ce has no untrained loss beside it"),
    ],
)
def test_what_is_not_reached_is_named(tmp_path: Path, metrics: dict[str, Any], said: str) -> None:
    assert demo.check(write_run(tmp_path, metrics)) == [f"uniugg_vae-tiny: {said}"]


def test_a_chain_that_fell_short_ends_with_status_1_and_a_page_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every phase is one command; the page shows each figure beside its baselines."""
    called: list[tuple[str, ...]] = []

    def command(*arguments: str) -> None:
        called.append(arguments)
        if arguments[0] == "train":
            name = f"{arguments[1].removeprefix('recipe=')}-tiny"
            worse = {**LOSS, "value": 3.25} if name == "uniugg_align-tiny" else LOSS
            folder = write_run(tmp_path, {"loss": worse, "tokens/cosine": METRIC}, name)
            (folder / "pictures.json").write_text(json.dumps([{"title": "rooms/room0_0002#generation5"}]))

    monkeypatch.setattr(demo, "loom3d", command)
    assert demo.main(["--root", str(tmp_path), "logger.progress=off"]) == 1
    trained = [arguments for arguments in called if arguments[0] == "train"]
    assert [arguments[1] for arguments in trained] == [f"recipe={phase.recipe}" for phase in demo.PHASES]
    assert all("logger.progress=off" in arguments for arguments in trained)
    assert ["cluster=inline" in arguments for arguments in trained] == [True, True, True, False, True]
    assert [arguments[0] for arguments in called[-2:]] == ["generate", "ask"]
    assert "rooms/room0_0002" in called[-1]
    assert "NOT REACHED: uniugg_align-tiny: loss is 3.25, untrained 2" in capsys.readouterr().out
    page = (tmp_path / "demo" / "index.html").read_text()
    for text in ("uniugg_align-tiny: loss is 3.25", "tokens/cosine", "majority", "imagined/index.html"):
        assert text in page
