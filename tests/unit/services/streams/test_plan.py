"""The plan's properties, over many configurations: that is what every later part leans on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import ConfigError, RunConfig
from configs.schema import DataConfig, RecipeConfig, SourceConfig, TrainerConfig, ViewSetConfig
from services.contracts import Role, Split
from services.errors import DataError
from services.streams.permutation import Permutation, largest_remainder
from services.streams.plan import EpochPlan, check_world_size, generator, micro_batch_kinds
from services.streams.sampler import Unit
from services.streams.sampling import ViewSetSampler
from tests.unit.services.streams.small_plan import Entry, Source


def scenes(name: str, views: list[int], split: Split = Split.TRAIN) -> Source:
    return Source(name, [Entry(f"{name}-{i:02d}", n, split=split) for i, n in enumerate(views)])


def config_of(
    weights: dict[str, float],
    quotas: dict[str, float] | None = None,
    micro_batch: int = 4,
    accumulation: int = 1,
    seed: int = 0,
    view_set: ViewSetConfig | None = None,
) -> RunConfig:
    return RunConfig(
        seed=seed,
        data=DataConfig(sources={name: SourceConfig(weight=weight) for name, weight in weights.items()}),
        recipe=RecipeConfig(quotas=quotas or {"view": 1.0}, view_set=view_set or ViewSetConfig()),
        trainer=TrainerConfig(micro_batch=micro_batch, accumulation=accumulation),
    )


def samples_of(plan: EpochPlan, steps: range) -> list:
    return [s for step in steps for batch in plan.step(step).micro_batches for s in batch.samples]


@st.composite
def cases(draw: st.DrawFn) -> tuple[RunConfig, dict[str, Source]]:
    """Random sources, weights, quotas and batch sizes; about half of them fill at least one step."""
    names = draw(st.lists(st.sampled_from(["alpha", "beta", "gamma"]), min_size=1, max_size=3, unique=True))
    sources = {name: scenes(name, draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))) for name in names}
    items = draw(st.integers(0, 40))
    quotas = {"view": draw(st.integers(1, 3)), "view_set": draw(st.integers(0, 2))}
    if items:
        sources["texts"] = Source("texts", [Entry(f"t{i}", 0, kind="item", length=i) for i in range(items)])
        quotas["item"] = draw(st.integers(1, 3))
    config = config_of(
        {name: draw(st.sampled_from([0.3, 1.0, 2.0])) for name in sources},
        {kind: float(share) for kind, share in quotas.items()},
        micro_batch=draw(st.sampled_from([1, 2, 4, 6])),
        accumulation=sum(quotas.values()) * draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**31)),
        view_set=ViewSetConfig(views=[2, 3], interval=[1, 2], stride=draw(st.integers(1, 3))),
    )
    return config, sources


def plan_or_none(config: RunConfig, sources: dict[str, Source], **options: object) -> EpochPlan | None:
    try:
        return EpochPlan(config, sources, **options)  # type: ignore[arg-type]
    except DataError:
        return None


@settings(max_examples=60, deadline=None)
@given(cases())
def test_properties_of_an_epoch(case: tuple[RunConfig, dict[str, Source]]) -> None:
    config, sources = case
    plan = plan_or_none(config, sources)
    if plan is None:
        return
    accumulation, batch = config.trainer.accumulation, config.trainer.micro_batch
    counts = largest_remainder(accumulation, config.recipe.quotas)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = []
        for step in steps:
            planned = plan.step(step)
            assert (planned.step, planned.epoch) == (step, epoch)
            assert Counter(b.kind for b in planned.micro_batches) == {k: n for k, n in counts.items() if n}
            assert all(len(b.samples) == batch and b.index == i for i, b in enumerate(planned.micro_batches))
            assert all(s.kind == b.kind and s.weight == 1.0 for b in planned.micro_batches for s in b.samples)
            seen.extend(s for b in planned.micro_batches for s in b.samples)
        assert len({s.id for s in seen}) == len(seen), "an id came twice in an epoch"
        content = [(s.kind, s.source, s.item, tuple(sorted(v.index for v in s.views))) for s in seen]
        assert len(set(content)) == len(content), "the same item and views came twice in an epoch"
        assert len({s.seed for s in seen}) == len(seen)
        for kind in set(plan.kinds):
            drawn = Counter(s.source for s in seen if s.kind == kind)
            shares = {
                name: config.data.sources[name].weight
                for name in sources
                if any(e.kind == ("item" if kind == "item" else "scene") for e in sources[name].entries)
                and (kind != "view_set" or any(e.n_views >= 2 for e in sources[name].entries))
            }
            expected = largest_remainder(sum(drawn.values()), shares)
            assert drawn == {name: n for name, n in expected.items() if n}


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 200))
def test_pure_and_resumable(case: tuple[RunConfig, dict[str, Source]], step: int) -> None:
    config, sources = case
    first = plan_or_none(config, sources)
    if first is None:
        return
    in_order = [first.step(i) for i in range(step + 1)][-1] if step < 30 else first.step(step)
    again = EpochPlan(config, dict(reversed(sources.items())))
    assert again.step(step) == in_order
    assert again.digest == first.digest
    assert pickle.loads(pickle.dumps(first)).step(step) == in_order


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 20))
def test_every_world_size_sees_the_same_global_batch(case: tuple[RunConfig, dict[str, Source]], step: int) -> None:
    config, sources = case
    plan = plan_or_none(config, sources)
    if plan is None:
        return
    whole = plan.step(step)
    for world in range(1, config.trainer.micro_batch + 1):
        if config.trainer.micro_batch % world:
            with pytest.raises(ConfigError, match=r"trainer\.micro_batch"):
                plan.local_step(step, 0, world)
            continue
        ranks = [plan.local_step(step, rank, world) for rank in range(world)]
        for index, batch in enumerate(whole.micro_batches):
            joined = tuple(s for rank in ranks for s in rank.micro_batches[index].samples)
            assert joined == batch.samples
            assert {rank.micro_batches[index].kind for rank in ranks} == {batch.kind}


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_quarantine_removes_exactly_those(case: tuple[RunConfig, dict[str, Source]], data: st.DataObject) -> None:
    config, sources = case
    everything = plan_or_none(config, sources, complete=True)
    if everything is None:
        return
    all_ids = {s.id for s in samples_of(everything, range(everything.steps_per_epoch)) if s.weight}
    assert len(all_ids) == everything.samples
    singles = frozenset(data.draw(st.lists(st.sampled_from(sorted(all_ids)), max_size=5)))
    items = sorted({entry.id for source in sources.values() for entry in source.entries})
    whole = frozenset(data.draw(st.lists(st.sampled_from(items), max_size=2)))
    plan = plan_or_none(config, sources, complete=True, quarantine=singles | whole | {"not/there#view3"})
    if plan is None:
        return
    kept = [s for s in samples_of(plan, range(plan.steps_per_epoch)) if s.weight]
    left = {s.id for s in kept}
    gone = {i for i in all_ids if i in singles or i.split("/")[1].split("#")[0] in whole}
    # A quarantined view may cost further units: the sets that cannot be made without it.
    assert left <= all_ids - gone
    assert {i for i in left if "#view_set" not in i} == {i for i in all_ids - gone if "#view_set" not in i}
    views = {f"{s.source}/{s.item}#view{view.index}" for s in kept for view in s.views}
    assert views.isdisjoint(singles)
    assert (plan.digest == everything.digest) is False


def test_no_set_of_views_holds_a_view_in_quarantine() -> None:
    view_set = ViewSetConfig(views=[2, 3], interval=[1, 2], stride=2)
    config = config_of({"rooms": 1.0}, {"view_set": 1.0}, micro_batch=1, view_set=view_set)
    source = scenes("rooms", [10, 3])
    bad = {"rooms/rooms-00#view3", "rooms/rooms-00#view4", "rooms/rooms-00#view5", "rooms/rooms-01#view1"}
    plain = EpochPlan(config, {"rooms": source})
    plan = EpochPlan(config, {"rooms": source}, quarantine=frozenset(bad))
    epochs = range(40 * plan.steps_per_epoch)
    drawn = samples_of(plan, epochs)
    assert {f"{s.source}/{s.item}#view{v.index}" for s in drawn for v in s.views}.isdisjoint(bad)
    # A second view is at most two frames on, so that none of the sets from frames 2 to 5 on can be made.
    units = {s.id for s in drawn}
    assert {s.id for s in samples_of(plain, epochs)} - units == {
        "rooms/rooms-00#view_set1",
        "rooms/rooms-00#view_set2",
    }
    # Of the short scene only the set of its first and last view is left.
    assert {tuple(v.index for v in s.views) for s in drawn if s.item == "rooms-01"} == {(0, 2)}
    # Scenes without such views are drawn from as ever.
    other = EpochPlan(config, {"rooms": source}, quarantine=frozenset({"rooms/rooms-01#view1"}))
    sets = {(s.id, s.seed): s.views for s in samples_of(plain, epochs) if s.item == "rooms-00"}
    same = [s for s in samples_of(other, epochs) if s.item == "rooms-00"]
    assert all(sets[s.id, s.seed] == s.views for s in same if (s.id, s.seed) in sets)
    assert any((s.id, s.seed) in sets for s in same)


def test_a_complete_pass_has_every_unit_once_in_order_and_fillers_without_weight() -> None:
    source = scenes("rooms", [3, 4], split=Split.VAL)
    plan = EpochPlan(config_of({"rooms": 1.0}, micro_batch=4), {"rooms": source}, split="val")
    samples = samples_of(plan, range(plan.steps_per_epoch))
    assert [s.id for s in samples[:7]] == [
        *(f"rooms/rooms-00#view{i}" for i in range(3)),
        *(f"rooms/rooms-01#view{i}" for i in range(4)),
    ]
    assert [s.weight for s in samples] == [1.0] * 7 + [0.0]
    assert samples[7].id == "rooms/rooms-00#view0+1"
    # Every pass is the same, so figures of validation are comparable.
    assert samples_of(plan, range(2, 4)) == samples


def test_a_large_source_is_walked_through_before_a_unit_comes_again() -> None:
    sources = {"big": scenes("big", [24]), "small": scenes("small", [8])}
    plan = EpochPlan(config_of({"big": 1.0, "small": 1.0}, micro_batch=8), sources)
    assert plan.steps_per_epoch == 2
    three = [s.id for s in samples_of(plan, range(6)) if s.source == "big"]
    assert sorted(three) == sorted(f"big/big-00#view{i}" for i in range(24))


def test_a_setting_of_view_sets_that_is_added_later_renames_no_run() -> None:
    source = {"rooms": scenes("rooms", [40])}
    config = config_of({"rooms": 1.0})
    wider = dataclasses.replace(config.recipe.view_set, stride=3)
    later = dataclasses.make_dataclass("Later", [("new", int, 7)], bases=(type(wider),), frozen=True, kw_only=True)
    digests = [
        EpochPlan(dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, view_set=found)), source).digest
        for found in (config.recipe.view_set, later(**dataclasses.asdict(config.recipe.view_set)), later(new=8), wider)
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_other_seeds_and_epochs_give_other_orders() -> None:
    source = {"rooms": scenes("rooms", [40])}
    one = EpochPlan(config_of({"rooms": 1.0}, seed=1), source)
    two = EpochPlan(config_of({"rooms": 1.0}, seed=2), source)
    epochs = [[s.id for s in samples_of(one, range(e * 10, e * 10 + 10))] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert [s.id for s in samples_of(two, range(10))] != epochs[0]
    assert one.digest != two.digest


def test_other_processes_with_other_hash_seeds_agree() -> None:
    code = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]);"
        "from test_plan import config_of, scenes, EpochPlan;"
        "p = EpochPlan(config_of({'b': 1.0, 'a': 0.5}, {'view_set': 1, 'view': 2}, accumulation=3),"
        " {n: scenes(n, [9, 5, 7]) for n in ('b', 'a')});"
        "print(p.digest, [[(s.id, s.seed, [v.index for v in s.views]) for s in b.samples]"
        " for i in (0, 3) for b in p.step(i).micro_batches])"
    )
    paths = json.dumps([str(Path(__file__).parent), str(Path.cwd())])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, paths],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert "view_set" in outputs.pop()


def test_quotas_that_cannot_be_met_name_the_key_and_what_would_do() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.accumulation=2.*raise trainer\.accumulation to 4"):
        micro_batch_kinds({"view": 9.0, "item": 1.0, "view_set": 0.0} | {"item": 1.5}, 2)
    assert micro_batch_kinds({"view": 1.0, "item": 0.0}, 2) == ("view", "view")
    # Two of three to one of three, spread over the step.
    assert micro_batch_kinds({"view": 2.0, "item": 1.0}, 3) == ("view", "item", "view")
    with pytest.raises(ConfigError, match=r"recipe\.quotas.*'view'.*-1"):
        micro_batch_kinds({"view": -1.0}, 1)
    with pytest.raises(ConfigError, match=r"recipe\.quotas.*all weights are 0"):
        micro_batch_kinds({"view": 0.0}, 1)


def test_errors_name_what_to_change() -> None:
    rooms = {"rooms": scenes("rooms", [3])}
    with pytest.raises(
        ConfigError, match=r"'views'.*allowed are \['conversation', 'generation', 'item', 'pair', 'view', 'view_set'\]"
    ):
        EpochPlan(config_of({"rooms": 1.0}, {"views": 1.0}), rooms)
    with pytest.raises(DataError, match=r"draws 4 samples.*lower trainer\.micro_batch"):
        EpochPlan(config_of({"rooms": 1.0}), rooms)
    with pytest.raises(DataError, match=r"no samples of kind 'item'.*recipe\.quotas\.item=0"):
        EpochPlan(config_of({"rooms": 1.0}, {"item": 1.0}), rooms)
    with pytest.raises(DataError, match="no samples of kind 'view' in split 'test'"):
        EpochPlan(config_of({"rooms": 1.0}), rooms, split="test")
    with pytest.raises(ConfigError, match=r"3 workers.*trainer\.micro_batch=8.*\[1, 2, 4, 8\]"):
        check_world_size(8, 3)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 5),
    st.floats(0, 0.9),
)
def test_view_sets_fit_their_scene_and_differ(
    n_views: int, least: int, more: int, low: int, wider: int, stride: int, ratio: float
) -> None:
    ratio = ratio if least > 1 else 0.0
    sampler = ViewSetSampler(
        ViewSetConfig(views=[least, least + more], interval=[low, low + wider], stride=stride, target_ratio=ratio)
    )
    units = sampler.units(Entry("a", n_views))
    sets = [sampler.draw(Unit(n_views=n_views, number=unit), np.random.default_rng(unit)) for unit in range(units)]
    for drawn in sets:
        index = [view.index for view in drawn.views]
        assert least <= len(index) <= least + more
        assert index[0] >= 0
        assert index[-1] < n_views
        assert len({b - a for a, b in itertools.pairwise(index)} - set(range(low, low + wider + 1))) == 0
        targets = sum(view.role is Role.TARGET for view in drawn.views)
        assert (targets > 0) == (ratio > 0)
        assert targets < len(index)
    assert len({tuple(v.index for v in s.views) for s in sets}) == units
    assert (units > 0) == (n_views > (least - 1) * low)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": [3, 2]}, r"recipe\.view_set\.views is \[3, 2\]"),
        ({"views": [2]}, r"recipe\.view_set\.views"),
        ({"interval": [0, 1]}, r"recipe\.view_set\.interval"),
        ({"stride": 0}, r"recipe\.view_set\.stride is 0"),
        ({"target_ratio": 1.0}, r"recipe\.view_set\.target_ratio is 1\.0"),
        ({"views": [1, 2]}, "at least 2 views"),
    ],
)
def test_view_set_settings_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViewSetSampler(dataclasses.replace(ViewSetConfig(), **changes))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_is_one(n: int, key: int) -> None:
    image = Permutation(n, key)(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_a_permutation_of_many_needs_no_table_and_looks_shuffled() -> None:
    n = 10**11 + 7
    shuffle = Permutation(n, 3)
    places = np.arange(20_000)
    image = shuffle(places)
    assert len(np.unique(image)) == len(places)
    # Uniform over the range, and neighbours are unrelated.
    histogram = np.histogram(image, bins=10, range=(0, n))[0]
    assert abs(histogram - 2000).max() < 250
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.03
    with pytest.raises(ValueError, match="outside"):
        shuffle(np.array([n]))


@given(st.integers(0, 1000), st.dictionaries(st.text("abcd", min_size=1, max_size=3), st.integers(1, 50), min_size=1))
def test_largest_remainder_is_exact_and_fair(total: int, weights: dict[str, int]) -> None:
    counts = largest_remainder(total, {name: float(weight) for name, weight in weights.items()})
    assert sum(counts.values()) == total
    for name, count in counts.items():
        assert abs(count - total * weights[name] / sum(weights.values())) < 1


def test_draws_are_keyed_by_everything() -> None:
    def draw(*key: object) -> float:
        return float(torch.rand((), generator=generator(*key), dtype=torch.float64))  # type: ignore[arg-type]

    base = (1, 2, "rooms/a#view0", "noise")
    others = [(2, 2, *base[2:]), (1, 3, *base[2:]), (1, 2, "rooms/a#view1", "noise"), (*base[:3], "drop")]
    assert draw(*base) == draw(*base)
    assert len({draw(*base), *(draw(*other) for other in others)}) == 5
