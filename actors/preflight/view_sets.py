"""What the plan of view sets makes of the cache: sets, bytes, and the share of look-ups that hit, by drawing them.

The plan of the epochs is drawn on scenes that have nothing but a number of views, and look-ups are counted as the
loader makes them; a large source is represented by some of its scenes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.preflight.sizes import DataSize
from configs.schema import RunConfig
from services.contracts import PlanSample, Role, Split
from services.errors import DataError
from services.features.requests import encoder_config
from services.streams.inputs import ALL, FeatureInput, kind_inputs, wanted_kinds
from services.streams.plan import EpochPlan
from services.streams.requests import comes_once, reads_one_by_one, role_views
from services.streams.sampling import sampler

KIND = "view_set"
EPOCHS = 3
CHOICES = (1, 4, 16, 64)
"""Sets of a scene for which a note says what they cost."""
_STEPS = 4
"""Steps of an epoch that the scenes which stand for a source must fill at least."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What drawing view sets gives."""

    sets: Mapping[str, int]
    """Split -> sets of an epoch."""
    scenes: int
    steps_per_epoch: int
    stored: Mapping[str, int]
    """Encoder of view sets -> records that stay in the cache, of all splits."""
    hit_rates: tuple[float, ...]
    """Of epochs 1 to 3, beginning with an empty cache that holds everything."""
    encodings: tuple[Mapping[str, float], ...]
    """Encoder -> inputs that are encoded, in each of these epochs."""


@dataclass(frozen=True)
class _Scene:
    id: str
    n_views: int
    split: Split
    kind: str = "scene"
    length: int = 0


class _Scenes:
    """As much of a manifest as a plan reads."""

    digest = ""

    def __init__(self, scenes: Sequence[_Scene]) -> None:
        self.entries = scenes

    def of_split(self, split: Split) -> list[_Scene]:
        return [scene for scene in self.entries if scene.split == split]


def drawn(config: RunConfig, data: Sequence[DataSize]) -> Drawn | None:
    """See the module. None where the run draws no planned walks, or the number of views of some scenes is not known."""
    if config.recipe.view_set.scheme != "walks" or wanted_kinds(config) != (KIND,):
        return None
    if not data or any(not size.scene_views for size in data):
        return None
    scenes = {size.source: _scenes(size) for size in data}
    samplers = {name: sampler(KIND, config, source=name) for name in scenes}
    sets = {
        split.value: sum(
            samplers[name].units(scene) for name in scenes for scene in _Scenes(scenes[name]).of_split(split)
        )
        for split in Split
    }
    try:
        whole = EpochPlan(config, {name: _Scenes(found) for name, found in scenes.items()})
    except DataError:
        return None  # said by the check of the kinds, and by the run
    some = {name: _some(found, config) for name, found in scenes.items()}
    trained = sum(scene.split is Split.TRAIN for found in scenes.values() for scene in found)
    share = sum(map(len, some.values())) / trained
    plan = EpochPlan(config, {name: _Scenes(found) for name, found in some.items()})
    rates, encodings = _count(config, plan)
    return Drawn(
        sets=sets,
        scenes=sum(map(len, scenes.values())),
        steps_per_epoch=whole.steps_per_epoch,
        stored=_stored(config, sets),
        hit_rates=rates,
        encodings=tuple({name: epoch[name] / share for name in set().union(*encodings)} for epoch in encodings),
    )


def describe_choices(config: RunConfig, found: Drawn, record_bytes: Mapping[str, int]) -> str:
    """What a few numbers of sets of a scene would cost: bytes on disk, and how often the run draws each."""
    draws = config.trainer.steps * config.trainer.micro_batch * config.trainer.accumulation
    mine = config.recipe.view_set.plans_per_scene
    fixed = max(1, mine)
    train, every = found.sets["train"] // fixed, sum(found.sets.values()) // fixed
    each = sum(record_bytes[name] * parts for name, parts in _records_of_a_set(config).items())
    texts = [
        f"{plans}: {plans * every * each / 1e9:.3g} GB, each drawn {draws / max(1, train * plans):.3g} times"
        for plans in sorted({*CHOICES, *([mine] if mine else [])})
    ]
    now = f"{mine} of each scene" if mine else "new ones in every epoch, none of which is stored while training"
    return f"view sets: {now} (recipe.view_set.plans_per_scene); on disk with " + "; ".join(texts)


def _scenes(size: DataSize) -> list[_Scene]:
    return [
        _Scene(f"{split}{number}", views, Split(split))
        for split, all_views in size.scene_views.items()
        for number, views in enumerate(all_views)
    ]


def _some(scenes: list[_Scene], config: RunConfig) -> list[_Scene]:
    """Training scenes enough for a few steps of every number of views."""
    sets, trainer = config.recipe.view_set, config.trainer
    train = [scene for scene in scenes if scene.split is Split.TRAIN]
    parts = len(range(sets.views[0], sets.views[-1] + 1)) if sets.plans_per_scene else 1
    needed = _STEPS * trainer.micro_batch * trainer.accumulation * parts // max(1, sets.plans_per_scene)
    return train[: max(32, needed)]


def _count(config: RunConfig, plan: EpochPlan) -> tuple[tuple[float, ...], list[Counter[str]]]:
    """Hit rate and encodings of each epoch, micro-batch by micro-batch as the loader asks."""
    features = kind_inputs(config)[KIND].features
    store: set[tuple[str, object]] = set()
    rates, encodings = [], []
    for epoch in range(EPOCHS):
        hits = total = 0
        encoded: Counter[str] = Counter()
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            for micro in plan.step(step).micro_batches:
                asked = [
                    (key, once) for sample in micro.samples for f in features for key, once in _keys(f, sample, config)
                ]
                total += len(asked)
                hits += sum(key in store for key, _ in asked)
                for key, once in {key: once for key, once in asked if key not in store}.items():
                    encoded[key[0]] += 1
                    _upstream(key, config, store, encoded)
                    if not once:
                        store.add(key)
        rates.append(0.0 if config.cache.mode == "never" else hits / max(1, total))
        encodings.append(encoded)
    return tuple(rates), encodings


def _keys(feature: FeatureInput, sample: PlanSample, config: RunConfig) -> list[tuple[tuple[str, object], bool]]:
    """What the loader asks of one encoder for a sample, and whether it will not be kept."""
    views = role_views(sample, feature.views)
    if reads_one_by_one(feature.encoder, config):
        return [((feature.encoder, (sample.source, sample.item, view.index)), False) for view in views]
    roles = tuple((view.index, Role.CONTEXT if feature.plain else view.role) for view in views)
    return [((feature.encoder, (sample.source, sample.item, roles)), comes_once(feature, config))]


def _upstream(
    key: tuple[str, object], config: RunConfig, store: set[tuple[str, object]], encoded: Counter[str]
) -> None:
    """The pictures that a missing set asks the encoder before it for."""
    name, content = key
    before = encoder_config(name, config).upstream
    if not before or not isinstance(content, tuple):
        return
    source, item, views = content
    for index in [view[0] for view in views] if isinstance(views, tuple) else [views]:
        needed = (before, (source, item, index))
        if needed not in store:
            store.add(needed)
            encoded[before] += 1
            _upstream(needed, config, store, encoded)


def _records_of_a_set(config: RunConfig) -> dict[str, int]:
    """Encoder of view sets -> records that one planned set has in all, over its partitions."""
    partitions = max(1, config.recipe.view_set.partitions)
    found: Counter[str] = Counter()
    for feature in kind_inputs(config)[KIND].features:
        if not reads_one_by_one(feature.encoder, config):
            found[feature.encoder] += 1 if feature.plain and feature.views == ALL else partitions
    return dict(found)


def _stored(config: RunConfig, sets: Mapping[str, int]) -> dict[str, int]:
    """Records that are kept: of all splits, where sets are planned; else of those that are judged by."""
    judged = sum(count for split, count in sets.items() if split != Split.TRAIN.value)
    kept: Counter[str] = Counter()
    for feature in kind_inputs(config)[KIND].features:
        if reads_one_by_one(feature.encoder, config):
            continue
        once = comes_once(feature, config)
        alone = once or (feature.plain and feature.views == ALL)
        partitions = 1 if alone else max(1, config.recipe.view_set.partitions)
        kept[feature.encoder] += judged + (0 if once else sets["train"] * partitions)
    return dict(kept)
