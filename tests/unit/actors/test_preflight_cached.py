"""Records, bytes and hit rates of what is encoded together: by hand for a few scenes, and as a loader then asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import configs
from actors import preflight
from actors.preflight.checks import data_problems
from actors.preflight.encoders import record_bytes
from actors.preflight.sizes import DataSize, data_sizes
from actors.preflight.view_sets import describe_choices, drawn
from configs import ConfigError
from configs.schema import RunConfig
from services.data.sources import run_index

VLM = ("recipe=spa3_vlm", "size=tiny", "data=corpus", "encoders.visual.side=56", "encoders.visual.height=28",
       "encoders.visual.width=56", "encoders.patches.height=28", "encoders.patches.width=42")  # fmt: skip


def talks(folder: Path) -> Path:
    """Four questions about frames (a, b) and one to test, two about (b, c), one about c, one without pictures."""
    folder.mkdir()
    for number, name in enumerate("abc"):
        Image.fromarray(np.full((30, 40, 3), 40 * number, np.uint8)).save(folder / f"{name}.png")
    about = [("ab", "train")] * 4 + [("ab", "test")] + [("bc", "train")] * 2 + [("c", "train"), ("", "train")]
    lines = []
    for number, (names, split) in enumerate(about):
        said = [{"from": "human", "value": f"Question {number}?"}, {"from": "gpt", "value": "Yes."}]
        images: dict[str, Any] = {"images": [f"{name}.png" for name in names]} if names else {}
        lines.append(json.dumps({"id": f"q{number}", "conversations": said, "split": split, **images}))
    path = folder / "talks.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    talks(folder / "data")
    run_index(config_of(folder))
    return folder


def config_of(root: Path, *overrides: str) -> RunConfig:
    data = f"data.sources.corpus.root={root / 'data' / 'talks.jsonl'}"
    return configs.load([*VLM, data, f"storage.root={root / 'storage'}", *overrides])


def test_one_latent_for_each_set_of_frames(root: Path) -> None:
    plan = preflight.plan(config_of(root, "recipe.spa3_vlm.questions_per_sample=1"))
    outputs = {encoder.name: encoder.outputs for encoder in plan.encoders}
    # Three pictures; (a, b), (b, c) and c alone are encoded together.
    assert plan.cache.encoders == {"visual": 3, "patches": 3, "views": 3, "spa3r": 3}
    views = {n: record_bytes(outputs["views"], "none", n) for n in (1, 2)}
    # A view has 2 x 3 tokens of 128 channels, a pose of nine numbers and 2 x 3 depths, all in float32.
    assert views[1] == 4 * (2 * 3 * 128 + 9 + 2 * 3)
    assert plan.cache.sizes["views"] == 2 * views[2] + views[1] == 5 * views[1]
    assert plan.cache.sizes["spa3r"] == 3 * 16 * 96 * 4
    assert plan.cache.bytes == sum(plan.cache.sizes.values())
    assert plan.cache.inputs["views"] == pytest.approx(5 / 6), "work is by views, the cost is of six"
    # Train, of visual and spa3r: (a, b) is asked 4 times, (b, c) 2 times, c once: 8 + 4 + 1 and 4 + 2 + 1 look-ups,
    # of which 2 + 2 + 1 and 1 + 1 + 1 are the first of their set.
    assert plan.cache.hit_rates == pytest.approx((1 - 8 / 20, 1.0, 1.0))
    assert plan.schedule.steps_per_epoch == 8 // 4


def test_packs_ask_less_often(root: Path) -> None:
    config = config_of(root, "recipe.spa3_vlm.questions_per_sample=3")
    (size,) = data_sizes(config)
    # (a, b) in two packs, (b, c) in one, c, and the text.
    assert size.units("conversation", "train") == 2 + 1 + 1 + 1
    assert size.units("conversation", "test") == 1
    plan = preflight.plan(config)
    assert plan.cache.hit_rates[0] == pytest.approx(1 - 8 / (2 * 2 + 2 + 1 + 2 + 1 + 1))


def test_plain_finetuning_reads_pictures_alone(root: Path) -> None:
    plan = preflight.plan(config_of(root, "recipe.spa3_vlm.geometry=none"))
    assert plan.cache.encoders == {"visual": 3}


def test_questions_that_are_not_made_yet_are_about_their_scenes(tmp_path: Path) -> None:
    """Ten rooms of twelve views: a question shows eight of them, a caption one."""
    base = ("recipe=spa3_vlm", f"storage.root={tmp_path}", "data.rooms.scenes=10", "data.rooms.views=12")
    plan = preflight.plan(configs.load(base))
    assert plan.cache.encoders == {"visual": 120, "patches": 120, "views": 10 + 120, "spa3r": 10 + 120}
    views = next(encoder.outputs for encoder in plan.encoders if encoder.name == "views")
    assert plan.cache.sizes["views"] == 10 * record_bytes(views, "none", 8) + 120 * record_bytes(views, "none", 1)
    assert plan.cache.hit_rates[0] == 0.0
    alone = preflight.plan(configs.load([*base, "data.sources.captions.weight=0", "~data.sources.captions"]))
    assert alone.cache.encoders == {"visual": 80, "patches": 80, "views": 10, "spa3r": 10}


def test_scenes_that_are_all_too_short_for_the_largest_set_are_refused(tmp_path: Path) -> None:
    def problems(views: str) -> list[str]:
        base = ["recipe=spa3r_pretrain", f"storage.root={tmp_path}", "data.rooms.scenes=10", "data.rooms.views=8"]
        config = configs.load([*base, f"recipe.view_set.views={views}"])
        return list(data_problems(config, data_sizes(config)))

    assert problems("[4,8]") == []
    (problem,) = problems("[4,9]")
    assert problem.startswith("recipe.view_set.views=[4, 9]: a scene needs 9 views for the largest set, and of rooms")
    assert "no training scene has more than 8: all would be left out; lower recipe.view_set.views" in problem


def test_a_model_of_another_recipe_is_named_as_such(tmp_path: Path) -> None:
    base = [f"storage.root={tmp_path}", "data.rooms.scenes=10", "data.rooms.views=8"]
    with pytest.raises(ConfigError, match=r"model\.name=probe-tiny: recipe spa3r_pretrain trains a spa3r-\* model"):
        preflight.plan(configs.load([*base, "recipe=spa3r_pretrain", "model.name=probe-tiny"]))
    with pytest.raises(ConfigError, match=r"model\.name=probe-tiny: recipe spa3_vlm trains a spa3-vlm-\* model"):
        preflight.plan(configs.load([*base, "recipe=spa3_vlm", "model.name=probe-tiny"]))


def test_planned_sets_by_hand(tmp_path: Path) -> None:
    """Two scenes of forty views, two sets of three views each: what `plans_per_scene` costs and gives."""
    config = configs.load(
        ["recipe=spa3r_pretrain", f"storage.root={tmp_path}", "recipe.view_set.views=[3,3]",
         "recipe.view_set.plans_per_scene=2", "recipe.view_set.interval=[1,1]", "trainer.micro_batch=2",
         "trainer.accumulation=1", "trainer.steps=6", "trainer.warmup_steps=1", "recipe.spa3r.predict=[geo]"]
    )  # fmt: skip
    size = DataSize(source="rooms", scenes=3, views={}, classes=0, scene_views={"train": [40, 40], "val": [40]})
    found = drawn(config, [size])
    assert found is not None
    assert found.sets == {"train": 4, "val": 2, "test": 0}
    assert found.steps_per_epoch == 2  # four sets, two a step
    assert found.stored == {"views": 6}
    # Each of the four sets is asked for once an epoch: none is there in the first, all are in the others.
    assert found.hit_rates == (0.0, 1.0, 1.0)
    assert [epoch["views"] for epoch in found.encodings] == [4, 0, 0]
    # A set is three pictures in a row; the two of a scene may share two of theirs.
    assert 2 * 4 <= found.encodings[0]["patches"] <= 2 * 6
    assert found.encodings[1]["patches"] == 0
    # 6 steps of 2 samples over the 4 training sets of a plan of two, or 2 of one.
    text = describe_choices(config, found, {"views": 10**9})
    assert "2 of each scene" in text
    assert "1: 3 GB, each drawn 6 times; 2: 6 GB, each drawn 3 times; 4: 12 GB, each drawn 1.5 times" in text
    twice = configs.load(
        ["recipe=spa3r_pretrain", f"storage.root={tmp_path}", "recipe.view_set.views=[3,3]",
         "recipe.view_set.plans_per_scene=2", "recipe.view_set.interval=[1,1]", "recipe.view_set.partitions=2",
         "trainer.micro_batch=2", "trainer.accumulation=1", "recipe.spa3r.predict=[geo]"]
    )  # fmt: skip
    divided = drawn(twice, [size])
    assert divided is not None
    # Two partitions of each training set, and each set that is judged by once.
    assert divided.stored == {"views": 4 * 2 + 2}
