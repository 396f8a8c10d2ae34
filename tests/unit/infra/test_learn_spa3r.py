"""The experiment on Spa3R: its runs compose and feed each other; questions are rewritten; claims can fail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import configs
from infra.learn import spa3r
from infra.learn.claims import markdown
from infra.learn.runs import Job, ready
from infra.learn.spa3r import command, jobs, main, stretch_depth, write_vggt
from infra.learn.spa3r_claims import CURVE, claims, curve_of, scores
from infra.learn.spa3r_questions import rewritten, terse, write_questions
from models.encoders.vggt.model import Vggt
from models.pretrained import load_pretrained
from models.registry import build

ALL = jobs(2, 1)
PARTS = {"spa3r_pretrain": {"spa3r"}, "spa3_vlm": {"llm", "adapter"}}


def test_every_run_reads_what_an_earlier_one_leaves() -> None:
    assert len({one.name for one in ALL}) == len(ALL) == 2 + 1 + 2 * 6
    left: dict[str, set[str]] = {"vggt": {"vggt"}}
    for one in ALL:
        for run, part in re.findall(r"run:([\w-]+)/(\w+)", " ".join(one.overrides)):
            assert part in left[run], f"{one.name} reads {part} of {run}"
        left[one.name] = PARTS[one.recipe]


@pytest.mark.parametrize("one", [one for one in ALL if one.seed == 0], ids=lambda one: one.name)
def test_every_run_composes(one: Job, tmp_path: Path) -> None:
    config = configs.load(command(one, tmp_path, quick=False, weights="/somewhere"))
    assert (config.name, config.recipe.name, config.seed) == (one.name, one.recipe, 0)
    assert config.trainer.steps > 100
    frozen = tmp_path / "runs" / "vggt" / "weights" / "vggt"  # where write_vggt puts it
    for stage in ("patches", "views"):
        assert (Path(config.encoders[stage].weights), config.encoders[stage].arch) == (frozen, {})
    if one.phase == spa3r.SMALL:
        assert config.encoders["semantic"].weights == "/somewhere/dinov2-small"
        assert config.model.name == "spa3r-small"
    if one.phase == spa3r.VLM:
        folder = "blind" if one.part == "blind" else "asked"
        assert config.data.sources["asked"].root == str(tmp_path / "questions" / folder)
        assert config.recipe.spa3_vlm.geometry == (one.part if one.part in spa3r.GEOMETRY else "none")
        assert config.evaluate.samples == 0
    quick = configs.load(command(one, tmp_path, quick=True, weights="/somewhere"))
    assert quick.trainer.steps < 10
    assert quick.model == config.model


def test_each_geometry_goes_on_from_the_same_model_for_as_long() -> None:
    by_name = {one.name: one for one in ALL}
    kinds = [by_name[f"{kind}-1"] for kind in spa3r.GEOMETRY]
    ends = [[text for text in one.overrides if text.startswith(("model.init", "trainer.steps"))] for one in kinds]
    assert all(end == ends[0] for end in ends)
    assert "model.init.llm=run:base-1/llm" in ends[0]
    assert not ready(by_name["cross-1"], [by_name["base-1"]])
    assert not ready(by_name["cross-1"], [by_name["field-1"]])
    assert ready(by_name["blind-1"], [by_name["base-1"]])
    assert f"trainer.steps={spa3r.BASE_STEPS + spa3r.STEPS}" in by_name["blind-1"].overrides


def test_the_depth_of_a_random_vggt_is_made_to_vary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build("vggt-tiny").eval()
    assert isinstance(network, Vggt)
    pictures = torch.rand(1, 2, 3, 84, 112)
    with torch.no_grad():
        before = network(pictures).depth.log()
        stretch_depth(network, 50.0)
        after = network(pictures).depth.log()
    assert torch.allclose(after - after.mean(), 50 * (before - before.mean()), atol=1e-3)
    assert abs(float(after.mean())) < 1
    write_vggt(tmp_path / "vggt")
    first = (tmp_path / "vggt" / "model.safetensors").read_bytes()
    write_vggt(tmp_path / "vggt")
    assert (tmp_path / "vggt" / "model.safetensors").read_bytes() == first
    with torch.no_grad():
        assert float(load_pretrained(tmp_path / "vggt").eval()(pictures).depth.log().std()) > 0.05


def asked(kind: str, text: str, answer: str) -> dict[str, Any]:
    return {
        "id": f"room/{kind}/0", "scene": "room", "split": "train", "images": ["/a.png", "/b.png"], "views": [0, 1],
        "conversations": [], "question_type": kind, "question": text, "options": [], "answer": answer,
    }  # fmt: skip


DISTANCE = (
    "How many metres lie between the bath tub and the door, measured between the closest points of the two objects?"
)
FLOOR = "How many square metres of floor does this room have? Take all parts together if more than one room is shown."


def test_questions_are_asked_in_few_words_with_and_without_pictures(tmp_path: Path) -> None:
    assert terse("object_abs_distance", DISTANCE) == "Metres, bath tub to door?"
    with pytest.raises(ValueError, match="room_size_estimation was expected to read like"):
        terse("room_size_estimation", "How large is it?")
    made = tmp_path / "made"
    made.mkdir()
    records = [
        asked("object_abs_distance", DISTANCE, "2.3"),
        asked("room_size_estimation", FLOOR, "12.0"),
        asked("route_planning", "Which turns?", "A"),
    ]
    (made / "questions-train.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert write_questions(made, tmp_path) == {"train": 2}
    seen, blind = (
        [json.loads(line) for line in (tmp_path / folder / "questions-train.jsonl").read_text().splitlines()]
        for folder in ("asked", "blind")
    )
    assert [record["answer"] for record in seen] == [record["answer"] for record in blind] == ["2.3", "12.0"]
    assert seen[1]["conversations"][0]["value"] == "<image><image>\nFloor, square metres?"
    assert blind[1]["conversations"][0]["value"] == "Floor, square metres?"
    assert (len(seen[0]["images"]), {"images", "views"} & set(blind[0])) == (2, set())
    assert rewritten(records[0], pictures=True)["split"] == "train"
    times = (tmp_path / "asked" / "questions-train.jsonl").stat().st_mtime_ns
    write_questions(made, tmp_path)
    assert (tmp_path / "asked" / "questions-train.jsonl").stat().st_mtime_ns == times


def row(value: float, baseline: float, name: str, better: str, **also: float) -> dict[str, Any]:
    return {"value": value, "baseline": baseline, "baseline_name": name, "better": better, "also": also}


def field(name: str, cosine: float, curve: list[float]) -> dict[str, Any]:
    columns = ["context views", "view sets", "geo/model", "geo/scene mean"]
    rows = [[count, 9, value, 0.5] for count, value in enumerate(curve, 1)]
    beside = {"scene mean": 0.6, "another scene's context": 0.5}
    return {
        "name": name,
        "metrics": {
            "geo/cosine": row(cosine, 0.7, "nearest context view", "higher", **beside),
            "depth_probe/abs_rel": row(0.2, 0.4, "mean depth", "lower", **{"mean depth of the context": 0.1}),
        },
        "tables": [{"title": CURVE, "columns": columns, "rows": rows}],
    }


def test_a_field_is_compared_with_copying_means_and_fewer_views() -> None:
    results = {"field-0": field("field-0", 0.8, [0.5, 0.6, 0.65]), "field-1": field("field-1", 0.75, [0.5, 0.7, 0.6])}
    assert curve_of(results["field-0"], "geo/scene mean") == {1: 0.5, 2: 0.5, 3: 0.5}
    assert curve_of(results["field-0"], "sem/model") == {}
    by_text = {claim["claim"]: claim for claim in claims(results)}
    assert by_text["geo cosine − nearest context view"]["figures"] == pytest.approx({"field-0": 0.1, "field-1": 0.05})
    assert by_text["geo cosine − another scene's context"]["holds"]
    assert by_text["depth probe AbsRel / mean depth"]["figures"] == pytest.approx({"field-0": 0.5, "field-1": 0.5})
    assert not by_text["depth probe AbsRel / mean depth of the context"]["holds"]
    assert by_text["geo cosine, 2 − 1 context views"]["holds"]
    more = by_text["geo cosine, 3 − 2 context views"]
    assert (more["figures"]["field-1"], more["holds"]) == (pytest.approx(-0.1), False)
    assert not any("sem" in text or "mean of training views" in text for text in by_text)


def vlm(name: str, score: float, floor: float) -> dict[str, Any]:
    answers = {
        "answers/vsibench, mean of the asked": row(score, 0.4, "best image-blind baseline", "higher"),
        "text/ce": row(2 * score, 5.0, "before training", "lower"),
    }
    table = {
        "title": "Answers about asked by type",
        "columns": ["type", "questions", "score", "guessing", "strategy"],
        "rows": [["room_size_estimation", 7, floor, 0.35, "constant"]],
    }
    return {"name": name, "metrics": answers, "tables": [table]}


def test_geometry_is_compared_with_none_with_guessing_and_with_each_other() -> None:
    figures = {"none-0": 0.45, "cross-0": 0.5, "cross-1": 0.3, "append-0": 0.55, "blind-0": 0.42}
    results = {name: vlm(name, score, score - 0.1) for name, score in figures.items()}
    found = claims(results)
    by_text = {claim["claim"]: claim for claim in found}
    guess = by_text["room_size_estimation, Spa3R by cross-attention − best image-blind baseline"]
    assert (guess["figures"], guess["holds"]) == (pytest.approx({"cross-0": 0.05, "cross-1": -0.15}), False)
    assert by_text["room_size_estimation, no geometry − image-blind model"]["mean"] == pytest.approx(0.03)
    better = by_text["mean over types, Spa3R by cross-attention − no geometry"]
    assert (better["figures"], better["holds"]) == (pytest.approx({"cross-0": 0.05}), True)
    assert not by_text["room_size_estimation, Spa3R by cross-attention − Spa3R appended"]["holds"]
    assert not any("VGGT" in text for text in by_text)
    assert "mean over types, Spa3R by cross-attention − no geometry | 0.05 | > 0 | yes |" in markdown(found)
    lines = scores(results).splitlines()
    assert lines[0] == "| | room_size_estimation | cross-entropy |"
    assert lines[2] == "| best image-blind baseline | 0.350 | |"
    assert "| Spa3R by cross-attention | 0.300 ± 0.141 | 0.800 ± 0.283 |" in lines
    assert scores({}) == ""


def test_without_weights_the_runs_with_dinov2_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOOM3D_WEIGHTS", raising=False)
    with pytest.raises(SystemExit, match="there are: field-0, field-1, field-2, base-0"):
        main(["--only", "field-dinov2-0", "--root", str(tmp_path), "--out", str(tmp_path)])
    assert "left out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="there are: field-0, field-dinov2-0, field-1"):
        main(["--only", "nothing", "--root", str(tmp_path), "--out", str(tmp_path), "--weights", "/somewhere"])
    with pytest.raises(SystemExit, match="--quick makes no figures"):
        main(["--quick", "--root", str(tmp_path)])
    assert main(["--table", "--out", str(tmp_path / "none")]) == 1
