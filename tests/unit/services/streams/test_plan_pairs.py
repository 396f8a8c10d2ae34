"""The plan with kinds that are made of pairs of views: `pair` and `generation`."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from configs import RunConfig
from configs.schema import DataConfig, RecipeConfig, SourceConfig, StorageConfig, TrainerConfig
from services.contracts import PlanSample, Role, Split
from services.data.pairs import PairIndex
from services.data.pairs_scene import SceneFacts, ScenePairs
from services.errors import DataError
from services.streams.plan import EpochPlan
from services.streams.sampling import needs_pairs, sampler
from tests.unit.services.streams.small_plan import Entry, Source


def index_of(source: str, scenes: Mapping[str, list[tuple[int, int]]], key: str = "key") -> PairIndex:
    """An index of these pairs; what the plan does not read is zero."""
    parts = [
        ScenePairs(
            facts=SceneFacts(id=name, views=6, pairs=len(found)),
            views=np.array(found, np.int32).reshape(-1, 2),
            overlap=np.zeros((len(found), 2), np.float32),
            angle=np.zeros(len(found), np.float32),
            distance=np.zeros(len(found), np.float32),
        )
        for name, found in scenes.items()
    ]
    return PairIndex(source, key, parts)


SCENES = {
    "a": [(0, 1), (0, 2), (1, 3)],
    "b": [],
    "c": [(2, 4), (3, 5), (0, 5), (1, 2)],
    "d": [(0, 1)],
}
ENTRIES = [Entry(name, 6, split=Split.VAL if name == "d" else Split.TRAIN) for name in SCENES]
TRAIN = {(name, *pair) for name in "ac" for pair in SCENES[name]}


def config_of(
    quotas: dict[str, float], micro_batch: int = 2, root: Path | str = "/nowhere", **weights: float
) -> RunConfig:
    return RunConfig(
        storage=StorageConfig(root=str(root)),
        data=DataConfig(sources={name: SourceConfig(weight=w) for name, w in (weights or {"rooms": 1.0}).items()}),
        recipe=RecipeConfig(quotas=quotas),
        trainer=TrainerConfig(micro_batch=micro_batch, accumulation=len(quotas)),
    )


def plan_of(
    kind: str, micro_batch: int = 2, scenes: Mapping[str, list[tuple[int, int]]] = SCENES, **options: object
) -> EpochPlan:
    return EpochPlan(
        config_of({kind: 1.0}, micro_batch),
        {"rooms": Source("rooms", ENTRIES)},
        pairs={"rooms": index_of("rooms", scenes)},
        **options,  # type: ignore[arg-type]
    )


def samples_of(plan: EpochPlan, steps: range) -> list[PlanSample]:
    return [s for step in steps for batch in plan.step(step).micro_batches for s in batch.samples]


def views_of(sample: PlanSample) -> tuple[str, int, int]:
    return sample.item, sample.views[0].index, sample.views[1].index


def test_an_epoch_draws_each_pair_at_most_once_and_all_in_turn() -> None:
    plan = plan_of("pair", micro_batch=2)
    assert plan.steps_per_epoch == 3
    assert plan.samples == len(TRAIN) == 7
    seen: Counter[tuple[str, int, int]] = Counter()
    for epoch in range(7):
        drawn = samples_of(plan, range(3 * epoch, 3 * epoch + 3))
        found = [views_of(sample) for sample in drawn]
        assert len(set(found)) == len({sample.id for sample in drawn}) == 6
        assert set(found) <= TRAIN
        assert all(role.role is Role.CONTEXT for sample in drawn for role in sample.views)
        seen.update(found)
    # A permutation of the 7 units gives one epoch of 6 (the rest would not fill one), and a new one begins.
    assert set(seen) == TRAIN


def test_a_generation_sample_is_an_ordered_pair() -> None:
    plan = plan_of("generation", micro_batch=2)
    assert plan.samples == 14
    assert plan.steps_per_epoch == 7
    drawn = samples_of(plan, range(7))
    both = TRAIN | {(name, j, i) for name, i, j in TRAIN}
    assert {views_of(sample) for sample in drawn} == both
    for sample in drawn:
        assert [view.role for view in sample.views] == [Role.CONTEXT, Role.TARGET]
        number = int(sample.id.removeprefix(f"rooms/{sample.item}#generation"))
        assert views_of(sample)[1:] == tuple(SCENES[sample.item][number // 2][:: -1 if number % 2 else 1])


def test_the_plan_is_pure_and_small() -> None:
    many = {f"scene{n}": [(i, j) for i in range(40) for j in range(i + 1, 40)] for n in range(20)}
    source = {"rooms": Source("rooms", [Entry(name, 40) for name in many])}
    config = config_of({"pair": 1.0, "generation": 1.0}, micro_batch=8)
    plan = EpochPlan(config, source, pairs={"rooms": index_of("rooms", many)})
    again = EpochPlan(config, source, pairs={"rooms": index_of("rooms", many)})
    sent = pickle.dumps(plan)
    steps = [0, 3, plan.steps_per_epoch + 1]
    for other in (again, pickle.loads(sent)):
        assert other.digest == plan.digest
        assert [other.step(step) for step in steps] == [plan.step(step) for step in steps]
    # Two kinds with two int32 for each of 15600 pairs, and little else: no paths, no tables of units.
    assert len(sent) < 2 * 15600 * 8 + 50_000


def test_the_digest_holds_the_pairs_where_they_count() -> None:
    plan = plan_of("pair")
    fewer = plan_of("pair", scenes={**SCENES, "c": SCENES["c"][:3]})
    assert plan.digest != fewer.digest
    source = {"rooms": Source("rooms", ENTRIES)}
    config = config_of({"view": 1.0})
    assert not needs_pairs(config)
    plain = EpochPlan(config, source)
    assert EpochPlan(config, source, pairs={"rooms": index_of("rooms", SCENES)}).digest == plain.digest


@pytest.mark.parametrize("kind", ["pair", "generation"])
def test_a_broken_view_takes_its_pairs_along(kind: str) -> None:
    orders = 2 if kind == "generation" else 1
    bad = frozenset({"rooms/c#view2", "rooms/a#view1", "rooms/elsewhere#view0"})
    plan = plan_of(kind, micro_batch=1, quarantine=bad)
    kept = {("a", 0, 2), ("c", 3, 5), ("c", 0, 5)}
    assert plan.samples == orders * len(kept)
    drawn = samples_of(plan, range(plan.steps_per_epoch))
    assert {(name, *sorted(views)) for name, *views in map(views_of, drawn)} == kept
    assert plan.digest != plan_of(kind, micro_batch=1).digest


def test_a_single_sample_and_a_scene_in_quarantine() -> None:
    plan = plan_of("pair", micro_batch=1, quarantine=frozenset({"rooms/c#pair1", "rooms/a"}))
    assert {views_of(s) for s in samples_of(plan, range(plan.steps_per_epoch))} == {
        ("c", 2, 4), ("c", 0, 5), ("c", 1, 2),
    }  # fmt: skip


def test_a_pass_over_a_whole_split_is_in_order_with_fillers() -> None:
    plan = plan_of("generation", micro_batch=4, complete=True)
    assert plan.steps_per_epoch == 4
    drawn = samples_of(plan, range(4))
    real = [sample for sample in drawn if sample.weight > 0]
    assert [sample.id for sample in real] == [
        *(f"rooms/a#generation{n}" for n in range(6)),
        *(f"rooms/c#generation{n}" for n in range(8)),
    ]
    assert len(drawn) == 16
    assert len({sample.id for sample in drawn}) == 16
    held_out = plan_of("pair", micro_batch=1, split="val")
    assert [views_of(sample) for sample in samples_of(held_out, range(1))] == [("d", 0, 1)]


def test_ranks_share_a_micro_batch() -> None:
    plan = plan_of("pair", micro_batch=2)
    whole = plan.step(1).micro_batches[0].samples
    parts = [plan.local_step(1, rank, 2).micro_batches[0].samples for rank in (0, 1)]
    assert parts[0] + parts[1] == whole


def test_sources_without_pairs_take_no_part_in_the_kind() -> None:
    sources = {
        "rooms": Source("rooms", ENTRIES),
        "pictures": Source("pictures", [Entry(f"p{n}", 1, kind="item") for n in range(9)]),
    }
    config = config_of({"pair": 1.0, "item": 1.0}, rooms=1.0, pictures=1.0)
    indices = {"rooms": index_of("rooms", SCENES), "pictures": index_of("pictures", {})}
    plan = EpochPlan(config, sources, pairs=indices)
    by_kind = {kind: {s.source for s in samples_of(plan, range(3)) if s.kind == kind} for kind in ("pair", "item")}
    assert by_kind == {"pair": {"rooms"}, "item": {"pictures"}}
    with pytest.raises(DataError, match=r"no index of pairs of the sources \['pictures'\]; .*`loom3d data pairs`"):
        EpochPlan(config, sources, pairs={"rooms": indices["rooms"]})


def test_what_is_missing_for_pairs_is_named() -> None:
    facts = SceneFacts(id="a", views=6, without_depth=6)
    empty = np.zeros((0, 2))
    bare = ScenePairs(facts=facts, views=empty.astype(np.int32), overlap=empty, angle=empty[:, 0], distance=empty[:, 0])
    index = PairIndex("rooms", "key", [bare])
    with pytest.raises(DataError, match=r"(?s)no samples of kind 'pair' .*of their 6 views 6 have no depth"):
        EpochPlan(config_of({"pair": 1.0}), {"rooms": Source("rooms", ENTRIES)}, pairs={"rooms": index})


def test_without_indices_the_stored_ones_are_read(tmp_path: Path) -> None:
    from services.data.pairs import pairs_key, pairs_path

    config, source = config_of({"pair": 1.0}, root=tmp_path), Source("rooms", ENTRIES)
    with pytest.raises(DataError, match=r"there is no such file of pairs; make it with `loom3d data pairs`"):
        EpochPlan(config, {"rooms": source})
    index = index_of("rooms", SCENES, pairs_key(source.digest, config.data.pairs))
    index.save(pairs_path(config, "rooms", source.digest))
    plan = EpochPlan(config, {"rooms": source})
    assert plan.digest == EpochPlan(config, {"rooms": source}, pairs={"rooms": index}).digest
    # A source of weight 0 is not drawn from and needs no index.
    weights = {"rooms": SourceConfig(), "other": SourceConfig(weight=0.0)}
    more = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=weights))
    assert EpochPlan(more, {"rooms": source, "other": Source("other", [])}).samples == plan.samples


def test_a_sampler_of_pairs_needs_pairs() -> None:
    with pytest.raises(ValueError, match="'pair' is drawn from pairs of views"):
        sampler("pair", config_of({"pair": 1.0}))
