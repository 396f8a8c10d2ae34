from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from actors.report import write_report
from actors.report.collect import collect
from actors.report.figures import depth_picture, enlarge, label_picture
from actors.report.page import page_values
from actors.report.units import with_unit
from services.errors import DataError


def make_run(folder: Path) -> Path:
    """A run folder with everything that the report shows."""
    rng = np.random.default_rng(0)
    (folder / "events").mkdir(parents=True)
    (folder / "config.yaml").write_text("recipe: {name: probe}\nnote: '<script>alert(1)</script>'\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, 210, 10):
            train = {"loss": 2 / step**0.5, "loss/depth": 1.5 / step**0.5, "hit_rate": min(1, step / 100)}
            train |= {"wait_share": 0.3 / step**0.5, "samples_per_s": 100 + rng.normal()}
            file.write(json.dumps({"step": step, "split": "train", "time": 0, **train}) + "\n")
            if step % 50 == 0:
                values = {"depth_linear/abs_rel": 0.3 - step / 2000, "depth_dpt/abs_rel": 0.25 - step / 2000}
                file.write(json.dumps({"step": step, "split": "val", "time": 0, **values}) + "\n")
    with (folder / "events" / "a.jsonl").open("w") as file:
        for step in range(50):
            for who, what, start, end in (("feature-0", "encode", 0.0, 0.05), ("trainer-0", "forward", 0.05, 0.08)):
                t0 = 100 + step * 0.1
                file.write(json.dumps({"who": who, "what": what, "t0": t0 + start, "t1": t0 + end}) + "\n")
    metrics = {
        "depth_linear/abs_rel": {
            "value": 0.2,
            "baseline": 0.4,
            "baseline_name": "mean depth",
            "better": "lower",
            "also": {"mean depth map": 0.375},
        },
        "seg/miou": {"value": 0.1, "baseline": 0.2, "baseline_name": "majority class", "better": "higher"},
    }
    (folder / "evaluation.json").write_text(json.dumps({"split": "test", "samples": 12, "metrics": metrics}))
    questions = folder.parents[1] / "questions" / "rooms"
    questions.mkdir(parents=True)
    row = {"split": "val", "type": "object_counting", "questions": 9, "chance": 0.0, "best": 0.31}
    (questions / "blind.jsonl").write_text(json.dumps(row | {"strategies": {"constant": 0.31, "scene": 0.2}}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"title": "probe", "facts": {"rooms": 24}}))
    (folder / "quarantine.jsonl").write_text(json.dumps({"id": "rooms/r3#1", "reason": "truncated PNG"}) + "\n")
    image = rng.integers(0, 255, (3, 56, 70, 3), dtype=np.uint8)
    depth = rng.uniform(1, 4, (3, 56, 70)).astype(np.float32)
    labels = rng.integers(-1, 9, (3, 56, 70))
    np.savez(
        folder / "examples.npz",
        image=image,
        depth_true=depth,
        depth_linear=depth,
        depth_dpt=depth,
        seg_true=labels,
        seg_pred=labels,
        pca=rng.integers(0, 255, (3, 4, 5, 3), dtype=np.uint8),
        ids=np.array(["a", "b", "c"]),
        classes=np.array([f"class {i}" for i in range(9)]),
    )
    return folder


class _Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href") and tag != "use"]


def test_the_page_is_self_contained_and_shows_every_part(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "runs" / "demo")).read_text()
    parser = _Sources()
    parser.feed(page)
    assert len(parser.sources) == 3 * 7
    assert all(source.startswith("data:image/png;base64,") for source in parser.sources)
    for text in (
        "depth_linear/abs_rel",
        "mean depth",
        "✓ beats it",
        "✗ does not",
        "truncated PNG",
        "constant",
        "encode (",
    ):
        assert text in page
    assert "<script>" not in page, "the config is shown as text"


def test_an_empty_run_gives_a_page_without_the_missing_parts(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    page = write_report(tmp_path).read_text()
    assert "Resolved configuration" in page
    assert "Who did what when" not in page


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no run folder.*config\.yaml"):
        write_report(tmp_path)


def test_a_torn_evaluation_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "run")
    (tmp_path / "runs" / "run" / "evaluation.json").write_text('{"split": ')
    with pytest.raises(DataError, match=r"evaluation\.json is not JSON"):
        collect(tmp_path / "runs" / "run")


def test_unknown_depth_and_ignored_labels_are_grey() -> None:
    assert depth_picture(np.array([[0.0, 2.0]]), 1.0, 3.0)[0, 0].tolist() == [200, 200, 200]
    assert label_picture(np.array([[-1, 2]]), 4)[0, 0].tolist() == [200, 200, 200]
    np.testing.assert_array_equal(enlarge(np.arange(12).reshape(2, 2, 3), 4, 4)[0, 1], [0, 1, 2])


def test_another_run_stands_beside_with_the_margin(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "runs" / "pretrained"), tmp_path / "runs" / "random"
    other.mkdir()
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["metrics"]["depth_linear/abs_rel"]["value"] = 0.25
    evaluation["metrics"]["seg/miou"]["value"] = 0.125
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    depth, classes = collect(run, other).scores
    assert (depth.other, classes.other) == (0.25, 0.125)
    assert depth.margin == pytest.approx(0.2)
    assert classes.margin == pytest.approx(-0.2)
    page = write_report(run, other).read_text()
    assert "random</th>" in page
    assert "+20 %" in page
    assert "-20 %" in page


def test_metrics_stand_with_their_units(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["metrics"]["rgb/psnr"] = {**evaluation["metrics"]["seg/miou"], "value": 15.0}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(run).read_text()
    assert "<td>rgb/psnr (dB)</td>" in page
    assert "<td>seg/miou</td>" in page
    assert with_unit("points/chamfer") == "points/chamfer (m)"
    assert with_unit("video_depth/abs_rel/median_scale") == "video_depth/abs_rel/median_scale"


def test_a_column_of_numbers_stands_below_its_title(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a")
    table = {"title": "Answers", "note": "", "columns": ["type", "questions"], "rows": [["counting", 3]]}
    (run / "tables.json").write_text(json.dumps([table, {**table, "rows": []}]))
    page = write_report(run).read_text()
    assert '<tr><th>type</th><th class="number">questions</th></tr>' in page
    assert "<tr><th>type</th><th>questions</th></tr>" in page, "an empty table has a head as well"


def test_runs_on_other_data_are_not_compared(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "runs" / "a"), tmp_path / "runs" / "b"
    other.mkdir()
    with pytest.raises(DataError, match="was not evaluated"):
        collect(run, other)
    (other / "evaluation.json").write_text(json.dumps({"split": "test", "samples": 99, "metrics": {}}))
    with pytest.raises(DataError, match=r"a was judged on samples=12, b on samples=99"):
        collect(run, other)


def test_what_roles_logged_stands_apart(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "joint"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("recipe: {name: uniugg_joint}\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in (1, 2):
            for role, term, speed in (("llm", "ce", 8.0), ("diffusion", "noise", 4.0)):
                row = {"step": step, "split": "train", "role": role, "loss": 1.5, f"loss/{term}": 1.5}
                file.write(json.dumps(row | {"lr": 0.1, "grad_norm": 2.0, "samples_per_s": speed}) + "\n")
    values = page_values(collect(folder))
    assert values["throughput"] == [
        ("llm: samples per second, median", "8.0"),
        ("diffusion: samples per second, median", "4.0"),
    ]
    figures = dict(values["curve_figures"])
    assert set(figures) == {"Training losses", "Throughput"}
    assert {">loss<", ">loss/ce<", ">loss/noise<"} <= set(re.findall(r">[a-z/]+<", figures["Training losses"]))
    assert {">llm<", ">diffusion<"} <= set(re.findall(r">[a-z/]+<", figures["Throughput"]))
