"""View sets drawn by walks: one number of views a micro-batch, intervals that stay, planned sets that come again."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from configs import ConfigError, RunConfig
from configs.schema import DataConfig, RecipeConfig, SourceConfig, TrainerConfig, ViewSetConfig
from services.contracts import PlanSample, Role, Split, ViewRole
from services.errors import DataError
from services.streams import sampling
from services.streams.plan import EpochPlan
from services.streams.sampler import Draw, EntryLike, Sampler, Unit
from services.streams.view_walks import WalkSampler
from tests.unit.services.streams.small_plan import Entry, Source

WALKS = ViewSetConfig(scheme="walks", views=[4, 6], interval=[1, 3], target_ratio=0.5)


def config_of(sets: ViewSetConfig, sources: Mapping[str, SourceConfig] | None = None, **trainer: int) -> RunConfig:
    return RunConfig(
        seed=trainer.pop("seed", 0),
        data=DataConfig(sources=dict(sources or {"rooms": SourceConfig()})),
        recipe=RecipeConfig(quotas={"view_set": 1.0}, view_set=sets),
        trainer=TrainerConfig(**{"micro_batch": 4, "accumulation": 2, **trainer}),
    )


def rooms(count: int = 24, views: int = 20, split: Split = Split.TRAIN, name: str = "rooms") -> dict[str, Source]:
    return {name: Source(name, [Entry(f"{name}{i}", views, split=split) for i in range(count)])}


def planned(**changes: Any) -> ViewSetConfig:
    return dataclasses.replace(WALKS, **{"plans_per_scene": 3, **changes})


def drawn(plan: EpochPlan, steps: range) -> list[PlanSample]:
    return [s for step in steps for batch in plan.step(step).micro_batches for s in batch.samples]


def frames(sample: PlanSample) -> tuple[int, ...]:
    return tuple(view.index for view in sample.views)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 60), st.integers(2, 5), st.integers(0, 4), st.integers(1, 6), st.integers(0, 40), st.integers(0, 99)
)
def test_a_walk_goes_on_in_time_by_steps_of_the_interval(n_views, least, more, low, wider, seed) -> None:
    sampler = WalkSampler(ViewSetConfig(scheme="walks", views=[least, least + more], interval=[low, low + wider]))
    size = least + more
    if not sampler.units(Entry("a", n_views)):
        assert n_views < size
        return
    draw = sampler.draw(Unit(n_views=n_views, item="a", size=size), np.random.default_rng(seed))
    index = [view.index for view in draw.views]
    gaps = [b - a for a, b in itertools.pairwise(index)]
    assert len(index) == size
    assert index[0] >= 0
    assert index[-1] < n_views
    assert min(gaps) >= 1
    if n_views > (size - 1) * low:
        # A scene too short for the widest steps has narrower ones, none below the interval.
        assert low <= min(gaps) <= max(gaps) <= low + wider
    assert draw.views[0].role is Role.CONTEXT
    assert sum(view.role is Role.CONTEXT for view in draw.views) == size // 2


def test_short_scenes_leave_the_interval_of_others_as_it_is() -> None:
    sampler = WalkSampler(ViewSetConfig(scheme="walks", views=[4, 4], interval=[2, 60]))
    random = np.random.default_rng(0)
    for n_views in (7, 8, 7):
        sampler.draw(Unit(n_views=n_views, size=4), random)
    widest = max(
        b.index - a.index
        for _ in range(50)
        for a, b in itertools.pairwise(sampler.draw(Unit(n_views=1000, size=4), random).views)
    )
    assert sampler.interval == (2, 60)
    assert widest > 50


def test_each_source_has_its_own_interval() -> None:
    sources = {"slow": SourceConfig(interval=[2, 3]), "fast": SourceConfig(interval=[20, 30]), "any": SourceConfig()}
    manifests = {name: rooms(8, 200, name=name)[name] for name in sources}
    plan = EpochPlan(config_of(WALKS, sources), manifests)
    gaps: dict[str, set[int]] = {name: set() for name in sources}
    for sample in drawn(plan, range(6)):
        gaps[sample.source] |= {b - a for a, b in itertools.pairwise(frames(sample))}
    assert gaps["slow"] <= {2, 3}
    assert gaps["fast"] <= set(range(20, 31))
    assert gaps["any"] <= {1, 2, 3}
    assert all(gaps.values())


@pytest.mark.parametrize("sets", [WALKS, planned()], ids=["fresh", "planned"])
def test_a_micro_batch_has_one_number_of_views_on_all_ranks(sets) -> None:
    plan = EpochPlan(config_of(sets), rooms())
    seen = Counter()
    for step in range(2 * plan.steps_per_epoch):
        whole = plan.step(step)
        for batch in whole.micro_batches:
            (size,) = {len(sample.views) for sample in batch.samples}
            seen[size] += 1
        shares = [plan.local_step(step, rank, 2) for rank in range(2)]
        for batch, *mine in zip(whole.micro_batches, *(s.micro_batches for s in shares), strict=True):
            assert tuple(itertools.chain(*(m.samples for m in mine))) == batch.samples
            assert all(len(m.samples[0].views) == len(batch.samples[0].views) for m in mine)
    assert set(seen) == {4, 5, 6}


@pytest.mark.parametrize("sets", [WALKS, planned(partitions=2)], ids=["fresh", "planned"])
def test_the_plan_is_a_function_of_the_step_alone(sets) -> None:
    first, second = (EpochPlan(config_of(sets), rooms()) for _ in range(2))
    assert first.digest == second.digest
    steps = [9, 2, 5, 0]
    assert [first.step(step) for step in steps] == [second.step(step) for step in reversed(steps)][::-1]
    assert EpochPlan(config_of(sets, seed=1), rooms()).step(0) != first.step(0)


def test_planned_sets_come_again_and_there_are_no_others() -> None:
    plan = EpochPlan(config_of(planned(partitions=2)), rooms(12))
    by_scene: dict[str, set[tuple[int, ...]]] = {}
    whole: dict[str, set[object]] = {}
    for epoch in range(12):
        units = [s.id for s in drawn(plan, range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch))]
        assert len(units) == len(set(units)), "an epoch draws a set at most once"
    for sample in drawn(plan, range(12 * plan.steps_per_epoch)):
        by_scene.setdefault(sample.item, set()).add(frames(sample))
        whole.setdefault(sample.id, set()).add(sample.views)
    assert len(by_scene) == 12
    assert max(len(found) for found in by_scene.values()) <= 3
    assert max(len(found) for found in whole.values()) == 2, "partitions of a set"
    assert {len({tuple(v.index for v in views) for views in found}) for found in whole.values()} == {1}


def test_sets_do_not_depend_on_the_seed_of_the_run_nor_on_other_scenes() -> None:
    few, many = EpochPlan(config_of(planned()), rooms(8)), EpochPlan(config_of(planned(), seed=7), rooms(24))
    known = {sample.id: sample.views for sample in drawn(few, range(few.steps_per_epoch))}
    again = {s.id: s.views for s in drawn(many, range(3 * many.steps_per_epoch)) if s.id in known}
    assert len(again) > 5
    assert again == {name: known[name] for name in again}
    other = EpochPlan(config_of(planned(seed=1)), rooms(8))
    assert {s.id: s.views for s in drawn(other, range(other.steps_per_epoch))} != known


def test_fresh_sets_differ_from_epoch_to_epoch() -> None:
    plan = EpochPlan(config_of(WALKS, accumulation=1), rooms(8, 200))
    sets = [(s.item, frames(s)) for s in drawn(plan, range(10 * plan.steps_per_epoch))]
    assert len(set(sets)) > 0.95 * len(sets)


def test_partitions_of_zero_divide_a_planned_set_anew() -> None:
    plan = EpochPlan(config_of(planned(partitions=0, views=[6, 6], plans_per_scene=1), accumulation=1), rooms(4))
    found: dict[str, set[object]] = {}
    for sample in drawn(plan, range(12 * plan.steps_per_epoch)):
        found.setdefault(frames(sample), set()).add(tuple(view.role for view in sample.views))
    assert len(found) == 4
    assert min(len(roles) for roles in found.values()) > 3


@pytest.mark.parametrize("sets", [WALKS, planned()], ids=["fresh", "planned"])
def test_a_pass_over_a_split_has_every_set_once_and_one_size_a_micro_batch(sets) -> None:
    plan = EpochPlan(config_of(sets), rooms(7, split=Split.VAL), split=Split.VAL)
    batches = [b for step in range(plan.steps_per_epoch) for b in plan.step(step).micro_batches]
    assert all(len({len(sample.views) for sample in batch.samples}) == 1 for batch in batches)
    real = [sample.id for batch in batches for sample in batch.samples if sample.weight]
    assert sorted(real) == sorted(
        {f"rooms/rooms{i}#view_set{n}" for i in range(7) for n in range(max(1, sets.plans_per_scene))}
    )
    again = EpochPlan(config_of(sets), rooms(7, split=Split.VAL), split=Split.VAL)
    assert [b.samples for b in batches] == [
        b.samples for s in range(plan.steps_per_epoch) for b in again.step(s).micro_batches
    ]


def test_broken_views_are_walked_around() -> None:
    gone = frozenset({f"rooms/rooms0#view{index}" for index in (2, 5, 6)})
    plan = EpochPlan(config_of(planned(), accumulation=1), rooms(8, 12), quarantine=gone)
    mine = [s for s in drawn(plan, range(4 * plan.steps_per_epoch)) if s.item == "rooms0"]
    assert mine
    assert not {2, 5, 6} & {index for sample in mine for index in frames(sample)}
    left = frozenset({f"rooms/rooms0#view{index}" for index in range(7)})
    plan = EpochPlan(config_of(planned(), accumulation=1), rooms(8, 12), quarantine=left)
    assert "rooms0" not in {sample.item for sample in drawn(plan, range(4 * plan.steps_per_epoch))}


def test_scenes_with_too_few_views_are_left_out_and_said() -> None:
    with pytest.raises(DataError, match=r"rooms: a scene needs at least 6 views, the largest set of recipe\.view_set"):
        EpochPlan(config_of(WALKS), rooms(9, 5))
    with pytest.raises(DataError, match=r"fewer numbers: recipe\.view_set\.views; more sets: recipe"):
        EpochPlan(config_of(planned(plans_per_scene=1)), rooms(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": [3, 2]}, r"recipe\.view_set\.views is \[3, 2\]"),
        ({"views": [1, 4]}, r"a set of 1 views has int\(1 x 0\.5\) = 0 context views"),
        ({"views": [4, 6], "target_ratio": 0.8}, r"a set of 4 views has int\(4 x 0\.2\) = 0 context"),
        ({"interval": [0, 1]}, r"recipe\.view_set\.interval is \[0, 1\]"),
    ],
)
def test_settings_are_checked(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        WalkSampler(dataclasses.replace(WALKS, **changes), "rooms")


@pytest.mark.parametrize(("ratio", "contexts"), [(0.25, 9), (0.5, 6), (0.75, 3), (0.9, 1)])
def test_context_counts_are_those_of_the_paper(ratio, contexts) -> None:
    assert WalkSampler(ViewSetConfig(scheme="walks", views=[12, 12], target_ratio=ratio)).contexts(12) == contexts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe.view_set.views=[1,4]"], "a set of one view has nothing to predict"),
        (["recipe.view_set.scheme=windows", "recipe.view_set.plans_per_scene=0"], "needs walks"),
        (["recipe.view_set.scheme=windows"], "has no plans_per_scene and no partitions"),
        (["recipe.view_set.target_ratio=0.0"], "needs targets"),
        (["recipe.spa3r.asymmetric=false"], "set recipe.spa3r.targets=symmetric"),
        (["recipe.spa3r.predict=[geo,dino]"], "must be some of geo, sem, clip"),
        (["recipe.spa3r.predict=[]"], "must be some of geo, sem, clip"),
        (["data.sources.rooms.interval=[3,2]"], r"data.sources.rooms.interval=[3, 2] must be"),
        (["encoders.semantic.window=[3]"], "encoders.semantic.window=[3] must be [height,width]"),
        (["encoders.patches.window=[3,4]"], "vggt_patches has none"),
    ],
)
def test_the_config_says_what_contradicts_itself(overrides, message) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(["recipe=spa3r_pretrain", *overrides])
    assert message in str(caught.value)


def test_the_released_variant_is_a_preset() -> None:
    paper, released = (configs.load(["recipe=spa3r_pretrain", f"variant={v}"]) for v in ("paper", "released"))
    assert dataclasses.astuple(paper.recipe.spa3r)[:5] == ("l1", "targets", True, "joint", "auto")
    assert dataclasses.astuple(released.recipe.spa3r)[:5] == ("smooth_l1", "all", False, "symmetric", "auto")


class Towers(Sampler):
    """Sets of a kind of its own: unit n of a scene is its first 2 or 3 views."""

    sizes = (2, 3)
    planned = True

    def units(self, entry: EntryLike) -> int:
        return 4

    def spoiled(self, entry: EntryLike, broken: frozenset[int]) -> tuple[int, ...]:
        return ()

    def size_of(self, item: str, unit: int) -> int:
        return self.sizes[unit % 2]

    def draw(self, unit: Unit, random: np.random.Generator) -> Draw:
        views = tuple(ViewRole(index=index) for index in range(self.size_of(unit.item, unit.number)))
        return Draw(views=views, item=f"{unit.item}-{unit.number}")


def test_any_sampler_may_have_sets_of_planned_sizes_and_names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sampling.SAMPLERS, "view_set", lambda *_: Towers())
    plan = EpochPlan(config_of(WALKS), rooms())
    batches = [batch for step in range(plan.steps_per_epoch) for batch in plan.step(step).micro_batches]
    sizes = [{len(sample.views) for sample in batch.samples} for batch in batches]
    assert {2} in sizes
    assert {3} in sizes
    assert all(len(found) == 1 for found in sizes), "one number of views a micro-batch"
    names = [sample.id for batch in batches for sample in batch.samples]
    assert len(set(names)) == len(names)
    assert all(name.startswith("rooms/rooms") and name.endswith("#view_set0") for name in names)
