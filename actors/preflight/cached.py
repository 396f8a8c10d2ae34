"""What the cache of a run will hold and give: records of pictures, and of sets of pictures encoded together.

A record is kept once whatever asks for it: a picture that several conversations show, a set of frames that many
questions are about. How sets of views are drawn from scenes, and what that costs, is :mod:`actors.preflight.view_sets`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from actors.preflight.encoders import EncoderCost, record_bytes
from actors.preflight.plan import CachePlan
from actors.preflight.sizes import DataSize
from actors.preflight.view_sets import Drawn
from configs.schema import RunConfig
from services.contracts import Split
from services.features.encode import ragged_length
from services.streams.inputs import ITEM_KINDS, behind, wanted_features
from services.streams.requests import reads_one_by_one

TRAIN = Split.TRAIN.value


def cache_plan(
    config: RunConfig, encoders: Mapping[str, EncoderCost], data: Sequence[DataSize], drawn: Drawn | None
) -> CachePlan:
    """Records, bytes and hit rates. Admission keeps what is there, so a budget gives its share of hits."""
    cache, records, sizes, inputs = config.cache, dict[str, int](), dict[str, int](), dict[str, float]()
    sets = Counter[int]()
    for size in data:
        sets.update(size.sets)
    for name, encoder in encoders.items():
        if drawn and name in drawn.stored:
            records[name] = drawn.stored[name]
        elif reads_one_by_one(name, config) or "item" not in _entries(name, config):
            records[name] = _pictures(data, _entries(name, config))
        else:
            records[name] = sets.total()
            sizes[name] = sum(n * record_bytes(encoder.outputs, cache.codec, views) for views, n in sets.items())
            inputs[name] = sum(n * views for views, n in sets.items()) / ragged_length(name, config)
        sizes.setdefault(name, records[name] * encoder.record_bytes)
        inputs.setdefault(name, records[name])
    total = sum(sizes.values())
    share = 1.0 if not cache.budget_bytes or not total else min(1.0, cache.budget_bytes / total)
    share = 0.0 if cache.mode == "never" else share
    rates = drawn.hit_rates if drawn else (_first_epoch(config, data), 1.0, 1.0)
    return CachePlan(
        mode=cache.mode,
        encoders=records,
        sizes=sizes,
        inputs=inputs,
        bytes=total,
        budget_bytes=cache.budget_bytes,
        hit_rates=tuple(share * rate for rate in rates),
    )


def _entries(encoder: str, config: RunConfig) -> set[str]:
    """What the run reads with an encoder, or with one that reads from it: scenes, items."""
    return {
        "item" if kind in ITEM_KINDS else "scene"
        for kind, feature in wanted_features(config)
        if any(encoder in behind(name, config) for name in feature.encoders)
    }


def _pictures(data: Sequence[DataSize], entries: set[str]) -> int:
    """Different pictures of these entries. What is shown of another source's scenes is among these."""
    total = sum(size.pictures_of("scene") for size in data) if "scene" in entries else 0
    if "item" not in entries:
        return total
    total += sum(size.pictures_of("item") for size in data if not size.of)
    if "scene" in entries:
        return total
    about = {size.of for size in data if size.of}
    return total + sum(max(size.pictures_of("item") for size in data if size.of == of) for of in about)


def _first_epoch(config: RunConfig, data: Sequence[DataSize]) -> float:
    """Share of an epoch's look-ups that an earlier one of the same epoch has made: of pictures, and of sets of them, by
    several conversations. 0 where conversations are not known, or are not all that is drawn.
    """
    features = [feature for kind, feature in wanted_features(config) if kind == "conversation"]
    spoken = [size for size in data if size.items or size.of]
    if not features or len(features) != len([*wanted_features(config)]) or not all(size.known for size in spoken):
        return 0.0
    asked = made = 0
    for size in spoken:
        for views, conversations, sets in size.groups.get(TRAIN, ()):
            samples = -(-conversations // size.packed)
            for feature in features:
                each = sets * (views if reads_one_by_one(feature.encoder, config) else 1)
                asked, made = asked + samples * each, made + each
    return 1 - made / asked if asked else 0.0
