"""Bad input of view sets and of conversations about frames, as a run meets it: refused by name, or handled as written.

Beside what stands here: a video file that breaks off (services/data/test_readers_videos), a question without an answer
and texts that do not match their frames (actors/recipes/test_spa3_vlm), latents of another fingerprint
(services/streams/test_view_sets).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import configs
from actors.recipes import open_recipe
from actors.recipes.samples import load_samples
from actors.trainers.feed import Feed
from configs import ConfigError
from models.errors import ModelError
from services.contracts import ImageRef, PlanSample, Scene, Split, View
from services.data.sources import open_sources
from services.errors import DataError
from services.features.client import FeatureClient
from services.features.encode import build_encoder, pin_weights
from services.features.sink import open_store
from services.streams.ledger import Ledger
from services.streams.plan import EpochPlan
from tests.unit.services.streams.small_world import SmallManifest

SETTINGS = [
    "recipe=spa3_vlm", "size=tiny", "data=corpus", "cluster=inline", "logger.progress=off",
    "encoders.spa3r.weights=random", "encoders.visual.side=56", "encoders.visual.height=28", "encoders.visual.width=56",
    "encoders.patches.height=28", "encoders.patches.width=42", "trainer.micro_batch=3", "trainer.accumulation=1",
    "recipe.spa3_vlm.questions_per_sample=1", "data.max_broken=1.0",
]  # fmt: skip
PICTURES = {"wide": (30, 40), "square": (40, 40), "tall": (60, 30), "band": (10, 80)}


def write_talks(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for name, size in PICTURES.items():
        Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "empty").mkdir()

    def about(name: str, what: dict[str, Any], marks: str) -> dict[str, Any]:
        said = [{"from": "human", "value": f"{marks}How many?"}, {"from": "gpt", "value": "Four."}]
        return {"id": name, "conversations": said, "split": "train", **what}

    records = [
        about("one", {"images": ["wide.png"]}, "<image>"),
        about("mixed", {"images": ["wide.png", "tall.png", "square.png"]}, "<image><image><image>"),
        about("upright", {"images": ["tall.png", "tall.png"]}, "<image><image>"),
        about("panorama", {"images": ["wide.png", "band.png"]}, "<image><image>"),
        about("none", {}, ""),
        about("film", {"video": "broken.mp4"}, "<video>"),
        about("blank", {"video": "empty"}, "<video>"),
    ]
    path = folder / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Feed]:
    root = tmp_path_factory.mktemp("bad")
    talks = write_talks(root)
    config = pin_weights(configs.load([*SETTINGS, f"data.sources.corpus.root={talks}", f"storage.root={root}"]))
    store = open_store(config)
    with (
        closing(FeatureClient(config, store)) as client,
        closing(Feed.open(config, open_sources(config), client, store)) as found,
    ):
        yield found


def planned(feed: Feed, *names: str) -> list[PlanSample]:
    plan = feed.plan(Split.TRAIN, complete=True)
    samples = [s for n in range(plan.steps_per_epoch) for b in plan.step(n).micro_batches for s in b.samples]
    return [next(sample for sample in samples if sample.item == name) for name in names]


def batch_of(feed: Feed, *names: str) -> dict[str, Any]:
    ((batch, _),) = [*load_samples(feed, planned(feed, *names), split=Split.TRAIN, batch_size=len(names))]
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}


def views(folder: Path, scenes: int, number: int) -> SmallManifest:
    path = folder / "view.png"
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(path)
    view = View(image=ImageRef(path=str(path)))
    return SmallManifest([Scene(id=f"room{n}", views=(view,) * number) for n in range(scenes)])


def test_a_set_of_one_view_can_be_asked_about_and_nothing_can_be_learnt_from_it(feed: Feed, tmp_path: Path) -> None:
    batch = batch_of(feed, "one")
    assert batch["grids_lengths"].tolist() == [[1]]
    assert batch["latents"].isfinite().all(), "all of it is context"
    pretraining = ["recipe=spa3r_pretrain", "cluster=inline", f"storage.root={tmp_path}"]
    with pytest.raises(
        ConfigError, match=r"recipe\.view_set\.views=\[1, 4\]: a set of one view has nothing to predict"
    ):
        configs.load([*pretraining, "recipe.view_set.views=[1,4]"])
    with pytest.raises(DataError, match=r"rooms: a scene needs at least 6 views.*recipe\.view_set\.views"):
        EpochPlan(configs.load(pretraining), {"rooms": views(tmp_path, scenes=8, number=1)})


def test_mixed_aspect_ratios_in_one_batch_are_as_each_sample_alone(feed: Feed) -> None:
    names = ("mixed", "upright", "one")
    together, alone = batch_of(feed, *names), [batch_of(feed, name) for name in names]
    grids = [together["grids"][row, : int(together["grids_lengths"][row, 0])].tolist() for row in range(3)]
    # At a width of 56: 42, 112 and 56 rows, of which whole blocks of 28 within a square are seen.
    assert grids == [[[1, 2], [2, 2], [2, 2]], [[2, 2], [2, 2]], [[1, 2]]]
    recipe = open_recipe(feed.config)
    built = recipe.build(recipe.roles[0], feed, feed.plan(Split.TRAIN))
    torch.manual_seed(1)
    adapter: Any = built.module.adapter
    torch.nn.init.normal_(adapter.mlp.fc2.weight, std=0.2)
    for row, (one, frames) in enumerate(zip(alone, grids, strict=True)):
        tokens = sum(rows * columns for rows, columns in frames)
        assert together["visual_lengths"][row].tolist() == [tokens]
        torch.testing.assert_close(together["visual"][row, :tokens], one["visual"][0])
        torch.testing.assert_close(together["latents"][row], one["latents"][0], rtol=1e-2, atol=1e-2)
        placed = together["latents"][row : row + 1]
        one["latents"] = placed  # encoded in another batch, in bfloat16
    with torch.no_grad():
        whole = built.spec.step(built.module, together, {}).sums["ce"]
        parts = torch.stack([built.spec.step(built.module, one, {}).sums["ce"] for one in alone])
    torch.testing.assert_close(whole, parts.sum(), rtol=1e-5, atol=1e-5)


def test_a_video_that_does_not_decode_is_left_out_and_named(feed: Feed) -> None:
    manifest = feed.manifests["corpus"]
    assert "film" not in manifest.ids
    assert "broken.mp4: not a readable video" in manifest.facts.broken["film"]


def test_zero_frames_are_a_fault_of_a_video_and_none_of_a_text(feed: Feed) -> None:
    manifest = feed.manifests["corpus"]
    assert "blank" not in manifest.ids
    assert "the folder holds no pictures" in manifest.facts.broken["blank"]
    batch = batch_of(feed, "none")
    assert batch["visual_lengths"].tolist() == batch["grids_lengths"].tolist() == [[0]]
    views_of, latents_of = (build_encoder(name, feed.config) for name in ("views", "spa3r"))
    with pytest.raises(ModelError, match="a set of views needs at least one view, got none"):
        views_of.prepare([], {})
    with pytest.raises(ModelError, match=r"takes tokens \(views, 1, 2, 3, 128\), got \(0, 1, 2, 3, 128\)"):
        latents_of.prepare({"tokens": torch.zeros(0, 1, 2, 3, 128)}, {})


def test_a_frame_too_flat_for_a_token_breaks_its_sample_alone(feed: Feed, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "quarantine.jsonl", max_broken=1.0, total=10)
    plan = feed.plan(Split.TRAIN, complete=True)
    with closing(feed.load(plan, ledger=ledger)) as loader:
        for step in loader:
            for micro in step.micro_batches:
                assert micro.batch["weight"].sum() > 0, "the others are trained on"
    assert ledger.broken == {"corpus/panorama#conversation0"}
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert "band.png: encoder 'visual': a frame of 10x80 pixels would be 0x56" in line
