"""Conversations about the same pictures, packed: each comes once a turn, and what quarantine names is left out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError, RunConfig
from configs.convert import refuse
from configs.schema import EncoderConfig, RecipeConfig, SourceConfig, Spa3VlmConfig
from configs.validate import problems
from services.contracts import PlanSample, Split
from services.streams.inputs import kind_inputs, needed_encoders, used_encoders
from services.streams.packs import PackSampler, picture_groups
from services.streams.plan import EpochPlan
from tests.unit.services.streams.small_world import small_config

NAMES = {"a": 7, "b": 3, "c": 1}
"""Video -> questions about it."""


@dataclass(frozen=True)
class Entry:
    id: str
    digests: tuple[str, ...]
    kind: str = "item"
    split: Split = Split.TRAIN
    length: int = 9
    n_views: int = 2


class Videos:
    """As much of a manifest as a plan reads."""

    digest = "videos"

    def __init__(self) -> None:
        # Questions about one video do not stand side by side.
        self.entries = [
            Entry(f"{video}{n}", (f"{video} 1", f"{video} 2"))
            for n in range(7)
            for video, asked in NAMES.items()
            if n < asked
        ]
        self.entries += [Entry("text0", (), n_views=0), Entry("text1", (), n_views=0), Entry("mute", (), length=0)]

    def of_split(self, split: Split) -> list[Entry]:
        return [entry for entry in self.entries if entry.split == split]


def config_of(root: Path, size: int, **trainer: int) -> RunConfig:
    config = small_config(root, quotas={"conversation": 1.0}, **{"micro_batch": 2, "accumulation": 1, **trainer})
    recipe = RecipeConfig(
        name="spa3_vlm", quotas={"conversation": 1.0}, spa3_vlm=Spa3VlmConfig(questions_per_sample=size)
    )
    data = dataclasses.replace(config.data, sources={"qa": SourceConfig(format="corpus")})
    return dataclasses.replace(config, recipe=recipe, data=data)


def samples(plan: EpochPlan, epoch: int = 0) -> list[PlanSample]:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [s for step in steps for batch in plan.step(step).micro_batches for s in batch.samples if s.weight]


def members(sample: PlanSample) -> tuple[str, ...]:
    return sample.questions or (sample.item,)


def test_every_conversation_is_in_one_pack_of_its_own_pictures(tmp_path: Path) -> None:
    groups = picture_groups(Videos().entries, "qa", frozenset())
    assert {first: len(ids) for first, ids in groups.items()} == {"a0": 7, "b0": 3, "c0": 1, "text0": 1, "text1": 1}
    plan = EpochPlan(config_of(tmp_path, 3), {"qa": Videos()}, complete=True)
    packs = [members(sample) for sample in samples(plan)]
    # ceil(7 / 3) packs of a, as even as can be; text has no picture to share.
    assert sorted(len(pack) for pack in packs) == [1, 1, 1, 2, 2, 3, 3]
    assert Counter(name for pack in packs for name in pack) == Counter(
        [*(f"{video}{n}" for video, asked in NAMES.items() for n in range(asked)), "text0", "text1"]
    )
    assert all(len({name.rstrip("0123456789") for name in pack}) == 1 for pack in packs)
    assert packs[0] == ("a0", "a1", "a2"), "a pass over a split keeps the order"
    assert [len(sample.views) for sample in samples(plan)][:5] == [2] * 5


def test_training_packs_anew_in_each_turn_and_repeats_nothing_within_one(tmp_path: Path) -> None:
    plan = EpochPlan(config_of(tmp_path, 3, micro_batch=7), {"qa": Videos()})
    turns = [[members(sample) for sample in samples(plan, epoch)] for epoch in range(4)]
    for packs in turns:
        assert set(Counter(name for pack in packs for name in pack).values()) == {1}
        assert sum(map(len, packs)) == 13
    assert len({frozenset(map(frozenset, packs)) for packs in turns}) > 1
    again = EpochPlan(config_of(tmp_path, 3, micro_batch=7), {"qa": Videos()})
    assert [samples(again, epoch) for epoch in range(4)] == [samples(plan, epoch) for epoch in range(4)]
    first = samples(plan)[0]
    assert first.id == f"qa/{members(first)[0]}#conversation0"
    assert first.item == members(first)[0]


def test_an_epoch_of_a_part_of_the_packs_goes_on_with_the_others(tmp_path: Path) -> None:
    plan = EpochPlan(config_of(tmp_path, 3, micro_batch=3), {"qa": Videos()})
    assert plan.steps_per_epoch == 2, "7 packs are two steps of three"
    seen = Counter(name for sample in samples(plan) for name in members(sample))
    assert set(seen.values()) == {1}


def test_one_question_a_sample_is_as_before_and_another_plan(tmp_path: Path) -> None:
    alone = EpochPlan(config_of(tmp_path, 1), {"qa": Videos()}, complete=True)
    assert [len(members(sample)) for sample in samples(alone)] == [1] * 13
    assert all(not sample.questions for sample in samples(alone))
    assert alone.digest != EpochPlan(config_of(tmp_path, 2), {"qa": Videos()}, complete=True).digest
    with pytest.raises(ValueError, match="at least one"):
        PackSampler({}, 0)


@pytest.mark.parametrize("name", ["a0", "qa/a0", "qa/a0#conversation0", "qa/a0#view1"])
def test_what_quarantine_names_is_left_out_and_the_others_stay(tmp_path: Path, name: str) -> None:
    plan = EpochPlan(config_of(tmp_path, 3), {"qa": Videos()}, complete=True, quarantine=frozenset({name}))
    left = {asked for sample in samples(plan) for asked in members(sample)}
    assert "a0" not in left
    assert len(left) == 12


def encoders(**more: Any) -> dict[str, EncoderConfig]:
    made = {name: EncoderConfig(height=28, width=56) for name in ("visual", "patches", "views", "spa3r")}
    return made | more


def test_geometry_decides_what_is_read(tmp_path: Path) -> None:
    def reading(geometry: str) -> RunConfig:
        config = config_of(tmp_path, 1)
        recipe = dataclasses.replace(config.recipe, spa3_vlm=Spa3VlmConfig(geometry=geometry))
        chained = {
            "views": EncoderConfig(family="vggt", upstream="patches"),
            "spa3r": EncoderConfig(family="spa3r", upstream="views"),
        }
        return dataclasses.replace(config, recipe=recipe, encoders=encoders(**chained))

    assert used_encoders(reading("none")) == ("visual",)
    assert used_encoders(reading("vggt")) == ("visual", "views")
    assert used_encoders(reading("cross")) == ("visual", "spa3r")
    assert needed_encoders(reading("none")) == ("visual",)
    assert needed_encoders(reading("append")) == ("visual", "spa3r", "views", "patches")
    made = kind_inputs(reading("append"))["conversation"]
    assert (made.frames, made.appended) == (True, "latents")
    assert kind_inputs(reading("cross"))["conversation"].appended == ""
    lacking = dataclasses.replace(reading("cross"), encoders={"visual": EncoderConfig(height=28, width=56)})
    with pytest.raises(ConfigError, match=r"reads encoders\.spa3r, which there is not"):
        kind_inputs(lacking)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    config = config_of(tmp_path, 0)
    told = "\n".join(problems(dataclasses.replace(config, encoders=encoders(visual=EncoderConfig(side=20)))))
    assert "recipe.spa3_vlm.questions_per_sample=0 is out of range: it must be at least 1" in told
    assert "encoders.visual.side=20: pictures of any shape are for qwen2_5_vl, not dinov2" in told
    assert "encoders.visual.side=20 must be a multiple of 14, or 0" in told
    recipe = dataclasses.replace(config.recipe, spa3_vlm=Spa3VlmConfig(geometry="plane"))
    with pytest.raises(ConfigError, match=r"recipe\.spa3_vlm\.geometry"):
        refuse([text for text in problems(dataclasses.replace(config, recipe=recipe)) if "geometry" in text])
