"""Spa3R's pre-training in one process: view sets, training, judging, pictures, and its latents as features."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import configs
from actors import driver, show_field
from actors.cli import main
from services.contracts import Split
from services.data.sources import open_sources
from services.features.client import FeatureClient
from services.features.encode import pin_weights
from services.features.requests import feature_requests
from services.features.sink import open_store
from services.streams.plan import EpochPlan
from tests.support.scenes import write_scenes

pytestmark = pytest.mark.e2e


def settings(folder: Path, *overrides: str) -> list[str]:
    chosen = [
        "recipe=spa3r_pretrain", "size=tiny", "data=scannet", f"data.sources.scannet.root={folder / 'scannet'}",
        f"storage.root={folder / 'storage'}", "logger.tensorboard=false", "logger.progress=off",
        "data.sources.scannet.interval=[]", "recipe.view_set.interval=[1,1]", "recipe.view_set.views=[3,4]",
        "recipe.view_set.plans_per_scene=2", "encoders.patches.height=28", "encoders.patches.width=42",
        "encoders.semantic.height=32", "encoders.semantic.width=48", "trainer.steps=6", "trainer.micro_batch=2",
        "trainer.warmup_steps=1", "trainer.log_every=1", "trainer.validate_every=3", "trainer.checkpoint_every=3",
        "trainer.threads=1", "cluster=inline", "backend=single",
    ]  # fmt: skip
    return [*chosen, *overrides]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spa3r")
    write_scenes(folder / "scannet")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> driver.RunResult:
    return driver.train(configs.load(settings(folder, "name=field")))


def test_metrics_stand_beside_copying_and_the_scene_mean(finished: driver.RunResult) -> None:
    evaluation = json.loads((finished.folder / "evaluation.json").read_text())
    assert (evaluation["split"], finished.steps) == ("test", 6)
    assert evaluation["samples"] > 0
    for target in ("geo", "sem"):
        row = evaluation["metrics"][f"{target}/cosine"]
        assert (row["baseline_name"], row["better"], list(row["also"])[:2]) == (
            "nearest context view", "higher", ["scene mean", "mean of training views"],
        )  # fmt: skip
        assert -1 <= row["value"] <= 1
        assert row["baseline"] > 0
    assert evaluation["metrics"]["depth_probe/abs_rel"]["baseline_name"] == "mean depth"
    (curve,) = json.loads((finished.folder / "tables.json").read_text())
    assert curve["title"] == "By the number of context views"
    assert [row[0] for row in curve["rows"]] == [1, 2]
    assert evaluation["metrics"]["geo/cosine with 2 context views"]["baseline"] == curve["rows"][0][2]


def test_the_field_is_drawn_beside_what_is_there(finished: driver.RunResult, folder: Path) -> None:
    listed = json.loads((finished.folder / "pictures.json").read_text())
    assert listed
    assert "VGGT features, there and predicted; semantic features" in listed[0]["caption"]
    page = finished.report.read_text()
    assert all(entry["title"] in page and entry["caption"] in page for entry in listed)
    assert page.count('<img class="shown" src="data:image/png;base64,') == len(listed)
    args = ["--run", str(finished.folder), "--sets", "1", "--split", "val", f"storage.root={folder / 'storage'}"]
    assert main(["show-field", *args]) == 0
    (entry,) = json.loads((finished.folder / show_field.FOLDER / "pictures.json").read_text())
    picture = np.asarray(Image.open(finished.folder / show_field.FOLDER / entry["file"]))
    # The picture, two pairs of features and a pair of depths, 112 pixels high each.
    assert picture.shape[1] >= 7 * 112
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_a_field_is_drawn_of_one_scene_and_nothing_else_is_read(
    finished: driver.RunResult, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.load(settings(folder, "name=field"))
    (manifest,) = open_sources(config).values()
    held = {split: [entry.id for entry in manifest.entries if entry.split is split] for split in Split}
    wanted, read = held[Split.TRAIN][-1], list[str]()
    loaded = show_field.load_samples

    def noted(*args: Any, **kwargs: Any) -> Any:
        for batch, samples in loaded(*args, **kwargs):
            read.extend(sample.item for sample in samples)
            yield batch, samples

    monkeypatch.setattr(show_field, "load_samples", noted)
    of_train = ["show-field", "--run", str(finished.folder), "--split", "train", "--out", str(folder / "drawn")]
    assert main([*of_train, "--scene", f"scannet/{wanted}"]) == 0
    assert read == [wanted] * 2, "its two sets"
    listed = json.loads((folder / "drawn/pictures.json").read_text())
    assert [entry["title"] for entry in listed] == [f"scannet/{wanted}, {n} views seen" for n in (1, 2)]
    assert main([*of_train, "--scene", wanted]) == 0, "what it wrote itself is replaced"
    capsys.readouterr()
    assert main([*of_train, "--scene", held[Split.TEST][0]]) == 2
    assert "is of the test split: add --split test" in capsys.readouterr().err
    assert main([*of_train, "--scene", f"{wanted}x"]) == 2
    assert f"no such scene; the train split has {wanted}" in capsys.readouterr().err


def test_drawing_a_field_never_replaces_pictures_of_others(
    finished: driver.RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home/pictures").mkdir(parents=True)
    (tmp_path / "home/pictures/holiday.jpg").write_bytes(b"x")
    (tmp_path / "note").write_text("x")
    before = (finished.folder / "pictures.json").read_bytes()
    for out, message in (
        (tmp_path / "home", "holds 'pictures', which show-field did not write"),
        (finished.folder, "is a run, whose 'pictures' are those of its report"),
        (tmp_path / "note", "is a file; name a folder"),
    ):
        assert main(["show-field", "--run", str(finished.folder), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "home/pictures/holiday.jpg").read_bytes() == b"x"
    assert (finished.folder / "pictures.json").read_bytes() == before


def test_a_second_run_encodes_nothing_again(finished: driver.RunResult, folder: Path) -> None:
    config = configs.load(settings(folder, "name=field"))
    with closing(FeatureClient(pin_weights(config), open_store(config))) as client:
        manifests = open_sources(config)
        plan = EpochPlan(config, manifests)
        sets = [s for step in range(plan.steps_per_epoch) for b in plan.step(step).micro_batches for s in b.samples]
        wanted = [r for s in sets for r in feature_requests(s, manifests[s.source], "views", config)]
        client.get(wanted, 0)
        assert (client.stats.hits, client.stats.misses, client.fell_back) == (len(wanted), 0, False)


def test_what_was_trained_is_an_encoder_of_view_sets(finished: driver.RunResult, folder: Path) -> None:
    trained = settings(
        folder, "encoders.latents.family=spa3r", "encoders.latents.upstream=views",
        "encoders.latents.weights=run:field/spa3r", "encoders.latents.dtype=float32",
    )  # fmt: skip
    config = pin_weights(configs.load(trained))
    manifests = open_sources(config)
    sample = EpochPlan(config, manifests, split=Split.VAL).step(0).micro_batches[0].samples[0]
    with closing(FeatureClient(config, open_store(config))) as client:
        (record,) = client.get(feature_requests(sample, manifests[sample.source], "latents", config), 0)
        assert isinstance(record, dict), record
        assert record["latents"].data.shape == (16, 96)
        assert np.isfinite(record["latents"].data).all()
