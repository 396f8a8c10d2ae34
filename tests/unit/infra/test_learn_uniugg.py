"""The experiment on UniUGG: its runs compose and feed each other; claims follow from figures, and can fail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import configs
from infra.learn import runs, uniugg
from infra.learn.claims import markdown
from infra.learn.runs import Job, collect, finished, ready, train
from infra.learn.uniugg import command, jobs, main
from infra.learn.uniugg_claims import BINS, claims

PARTS = {
    "uniugg_encoder": {"encoder", "spatial_decoder"},
    "uniugg_vae": {"vae", "spatial_decoder"},
    "uniugg_align": {"llm"},
    "uniugg_joint": {"llm", "diffusion"},
    "uniugg_finetune": {"llm", "diffusion"},
    "uniugg_direct": {"llm"},
}
ALL = jobs(2)


def test_every_run_reads_what_an_earlier_one_leaves() -> None:
    assert len({one.name for one in ALL}) == len(ALL)
    left: dict[str, set[str]] = {}
    for one in ALL:
        for run, part in re.findall(r"run:([\w-]+)/(\w+)", " ".join(one.overrides)):
            assert part in left[run], f"{one.name} reads {part} of {run}"
        left[one.name] = PARTS[one.recipe]


@pytest.mark.parametrize("one", [one for one in ALL if one.seed == 0], ids=lambda one: one.name)
def test_every_run_composes(one: Job, tmp_path: Path) -> None:
    config = configs.load(command(one, tmp_path, quick=False, lpips="alex"))
    assert (config.name, config.recipe.name, config.seed) == (one.name, one.recipe, 0)
    longer = 2 if one.part == "encoder-long" else 1
    assert config.trainer.steps == uniugg.STEPS[one.recipe] * longer
    assert config.evaluate.lpips_weights == "alex"
    quick = configs.load(command(one, tmp_path, quick=True, lpips=""))
    assert quick.trainer.steps < 10
    assert quick.model == config.model


def test_a_run_waits_for_those_that_it_reads() -> None:
    by_name = {one.name: one for one in ALL}
    encoder, vae, other = by_name["encoder-0"], by_name["vae-0"], by_name["encoder-1"]
    assert not ready(vae, [encoder, vae])
    assert ready(vae, [vae, other])
    assert ready(other, [encoder, other])
    assert ready(by_name["vae-1"], [encoder, by_name["encoder-b-0"]])


def test_runs_go_side_by_side_in_order_and_stop_at_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []

    class Finished:
        def __init__(self, command: list[str]) -> None:
            began.append(command[-1])
            self.returncode = 7 if command[-1] == "encoder-b-0" else 0

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(runs.subprocess, "Popen", Finished)
    chain = [one for one in ALL if one.seed == 0 and one.name in {"encoder-0", "vae-0", "align-0", "joint-0"}]
    for one in ALL:
        (tmp_path / "runs" / one.name).mkdir(parents=True)
    over = train([(one, [one.name]) for one in chain[::-1]], tmp_path, parallel=2, end=float("inf"))
    assert [one.name for one in over] == began
    assert began.index("encoder-0") == 0
    assert began[-1] == "joint-0"
    assert finished(chain[0], tmp_path, [chain[0].name])
    broken = next(one for one in ALL if one.name == "encoder-b-0")
    with pytest.raises(SystemExit, match="7"):
        list(train([(broken, [broken.name])], tmp_path, parallel=2, end=float("inf")))


def test_the_teacher_of_the_ablation_is_that_of_the_first_phase(tmp_path: Path) -> None:
    first = next(one for one in ALL if one.name == "encoder-0")
    other = next(one for one in ALL if one.name == "vae-a-0")
    teacher = configs.load(command(first, tmp_path, quick=False, lpips="")).encoders["teacher"]
    vit = configs.load(command(other, tmp_path, quick=False, lpips="")).encoders["vit"]
    assert (vit.family, vit.weights, vit.seed, vit.arch) == (
        teacher.family,
        teacher.weights,
        teacher.seed,
        teacher.arch,
    )
    assert (vit.height, vit.width, vit.layers) == (teacher.height, teacher.width, teacher.layers)


def row(value: float, baseline: float, name: str, better: str, **also: float) -> dict[str, Any]:
    return {"value": value, "baseline": baseline, "baseline_name": name, "better": better, "also": also}


def result(name: str, tables: list[dict[str, Any]] | None = None, **metrics: dict[str, Any]) -> dict[str, Any]:
    named = {key.replace("__", "/"): value for key, value in metrics.items()}
    return {"name": name, "metrics": named, "tables": tables or []}


def encoder(name: str, error: float) -> dict[str, Any]:
    return result(
        name,
        points__view1_error=row(error, 1.0, "mean-depth plane", "lower", **{"untrained network": 4.0}),
        matches__accuracy=row(0.2, 0.01, "chance", "higher"),
    )


def test_a_claim_holds_when_it_does_for_every_seed() -> None:
    found = claims({"encoder-0": encoder("encoder-0", 0.5), "encoder-1": encoder("encoder-1", 1.5)})
    plane, untrained, matches = found
    assert plane["figures"] == {"encoder-0": 0.5, "encoder-1": 1.5}
    assert (plane["mean"], plane["holds"]) == (1.0, False)
    assert plane["spread"] == pytest.approx(0.7071, abs=1e-3)
    assert (untrained["mean"], untrained["holds"]) == (0.25, True)
    assert (matches["mean"], matches["limit"], matches["holds"]) == (20.0, ">= 10", True)
    table = markdown(found)
    assert "| P1 | pointmap error of view1 / mean-depth plane | 1 ± 0.707 | < 1 | **no** |" in table
    assert "| P1 | match accuracy / chance | 20 ± 0 | >= 10 | yes |" in table


def test_the_second_phase_is_compared_with_its_ablation_of_the_same_seed() -> None:
    def vae(name: str, depth: float) -> dict[str, Any]:
        depths = row(depth, 9.0, "reconstructions, first decoder", "lower", **{"originals, first decoder": 0.2})
        return result(name, depth__abs_rel=depths, tokens__cosine=row(0.92, 0.1, "mean token", "higher"))

    found = {"vae-0": vae("vae-0", 0.24), "vae-1": vae("vae-1", 0.3), "vae-c-0": vae("vae-c-0", 0.36)}
    by_text = {claim["claim"]: claim for claim in claims(found)}
    depth = by_text["depth AbsRel from reconstructions / from originals by P1's decoder"]
    assert depth["figures"] == pytest.approx({"vae-0": 1.2, "vae-1": 1.5})
    assert not depth["holds"]
    worse = by_text["(c) depth AbsRel without decoder finetuning / with it"]
    assert worse["figures"] == pytest.approx({"vae-c-0": 1.5})
    assert worse["holds"]


def joint(name: str, psnr: float, answers: float, tables: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    beside = {"mean training picture": 15.0}
    return result(
        name,
        tables,
        rgb__psnr=row(psnr, 14.0, "copying the reference", "higher", **beside),
        answers__vsibench=row(answers, 0.4, "best image-blind baseline", "higher"),
    )


def test_views_are_compared_with_baselines_and_ablations() -> None:
    bins = {
        "title": BINS,
        "columns": ["camera", "pairs", "psnr, colours", "psnr, copying the reference"],
        "rows": [["angle<=15 degrees", 3, 16.0, 17.0], ["angle>60 degrees", 2, 16.0, 12.0], ["empty", 0, "", ""]],
    }
    types = {
        "title": "Answers about single by type",
        "columns": ["type", "questions", "score", "guessing", "strategy"],
        "rows": [["scene_type", 8, 0.5, 0.25, "mode"], ["object_count", 8, 0.5, 0.5, "median"]],
    }
    found = {"joint-0": joint("joint-0", 16.0, 0.5, [bins, types]), "joint-a-0": joint("joint-a-0", 17.0, 0.3)}
    by_text = {claim["claim"]: claim for claim in claims(found)}
    assert by_text["imagined views, rgb/psnr − copying the reference"]["figures"] == {"joint-0": 2.0}
    assert by_text["imagined views, rgb/psnr − mean training picture"]["holds"]
    assert not by_text["imagined views, psnr, colours − copying the reference, angle<=15 degrees"]["holds"]
    assert by_text["imagined views, psnr, colours − copying the reference, angle>60 degrees"]["mean"] == 4.0
    assert not by_text["our encoder − teacher's features (a), rgb/psnr"]["holds"]
    assert by_text["our encoder − teacher's features (a), answers/vsibench"]["holds"]
    assert by_text["answers, vsibench, after joint − best image-blind baseline"]["mean"] == pytest.approx(0.1)
    assert by_text["answers, scene_type, after joint − best image-blind baseline"]["mean"] == pytest.approx(0.25)
    assert not by_text["answers, object_count, after joint − best image-blind baseline"]["holds"]
    assert not any("empty" in text or "direct" in text for text in by_text)


def test_results_are_collected_and_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, root, out = ALL[0], tmp_path / "root", tmp_path / "out"
    called = command(one, root, quick=False, lpips="/somewhere/alexnet")
    assert not finished(one, root, called)
    folder = root / "runs" / one.name
    folder.mkdir(parents=True)
    (folder / "learn.json").write_text(json.dumps({"command": called, "seconds": 7.0}))
    (folder / "evaluation.json").write_text(json.dumps({"step": 3, **encoder(one.name, 0.5)}))
    (folder / "tables.json").write_text(json.dumps([{"title": "Questions about rooms"}, {"title": BINS, "rows": []}]))
    assert finished(one, root, called)
    with pytest.raises(SystemExit, match="another call"):
        finished(one, root, [*called, "trainer.lr=1"])
    collect(one, root, out)
    kept = json.loads((out / f"{one.name}.json").read_text())
    assert (kept["seed"], kept["seconds"], kept["step"]) == (0, 7.0, 3)
    assert [table["title"] for table in kept["tables"]] == [BINS]
    assert not any("/" in text and ("root" in text or "alexnet" in text) for text in kept["overrides"])
    assert main(["--table", "--out", str(out)]) == 0
    assert "| P1 | pointmap error of view1 / mean-depth plane | 0.5 | < 1 | yes |" in capsys.readouterr().out
    assert main(["--table", "--out", str(tmp_path / "none")]) == 1


def test_a_smoke_test_writes_no_figures_and_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--quick makes no figures"):
        main(["--quick", "--root", str(tmp_path)])
    with pytest.raises(SystemExit, match="there are: encoder-0"):
        main(["--only", "nothing", "--root", str(tmp_path), "--out", str(tmp_path)])
