"""A service of several encoders: shared weights, records that were just made, pictures that pass by, warming."""

from __future__ import annotations

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from configs import ConfigError
from models.encoders import families
from models.encoders.base import InputKind
from services.contracts import PlanSample, Split, View, ViewRole
from services.features import maintain
from services.features.client import FeatureClient
from services.features.encode import Encoder
from services.features.requests import feature_requests
from services.features.sink import Recent, StoredUpstream, StoreSink, open_store
from services.features.worker import EncoderWorker
from services.streams import inputs as declared
from services.streams.inputs import FeatureInput, KindInputs


def test_a_chain_runs_on_the_weights_that_serve_requests(make_config, make_requests):
    config, made = make_config(), []

    def make(name, config, upstream=None):
        made.append(name)
        return Encoder(name, config, upstream=upstream)

    sink = StoreSink(config, open_store(config))

    def upstream(name):
        before = config.encoders[name].upstream
        return StoredUpstream(name, config, sink, encoders=worker.encoder) if before else None

    worker = EncoderWorker(config, sink, make_encoder=make, upstream=upstream)
    chained, plain = make_requests(3, encoder="small"), make_requests(3)
    pooled = worker.encode(chained, 0)
    tokens = worker.encode(plain, 0)
    assert sorted(made) == ["features", "small"]
    for small, whole in zip(pooled, tokens, strict=True):
        full = whole["tokens"].data
        mean = full.reshape(1, 2, 2, 2, 2, -1).mean(axis=(2, 4))
        np.testing.assert_allclose(small["tokens"].data, mean, atol=1e-5)
    worker.close()


def test_what_was_just_made_is_not_made_again(make_config, make_requests):
    config = make_config(cache={"seal_s": 30.0})  # nothing is committed within this test
    encoded = []

    class Counting(Encoder):
        def encode(self, requests):
            encoded.append((self.name, len(requests)))
            return super().encode(requests)

    client = FeatureClient(config, open_store(config), make_encoder=Counting)
    plain, chained = make_requests(4), make_requests(4, encoder="small")
    first = client.get(plain, 0)
    client.get(chained, 0)
    again = client.get([*plain, *chained], 1)
    assert encoded == [("features", 4), ("small", 4)]
    for a, b in zip(first, again, strict=False):
        assert a["tokens"].data.tobytes() == b["tokens"].data.tobytes()
    assert (client.stats.hits, client.stats.misses) == (4 + 8, 4 + 4)  # the chain found what it reads
    client.prefetch(plain, 2)
    time.sleep(0.1)
    assert encoded == [("features", 4), ("small", 4)]
    client.close()


def test_recent_records_are_bounded_in_bytes_and_time(make_requests):
    record = {"x": SimpleNamespace(data=np.zeros(100, np.uint8))}
    requests = make_requests(5)
    small = Recent(keep_s=60.0, most_bytes=250)
    for request in requests:
        small.add(request, record)
    assert [small.get("features", r.key) is not None for r in requests] == [False, False, False, True, True]
    assert small.get("other", requests[4].key) is None
    brief = Recent(keep_s=0.01)
    brief.add(requests[0], record)
    time.sleep(0.03)
    brief.add(requests[1], record)
    assert brief.get("features", requests[0].key) is None
    assert brief.get("features", requests[1].key) is record


def test_pictures_that_pass_by_leave_nothing_in_the_store(make_config, make_requests, tmp_path):
    config = make_config()
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 56, 56, 3), np.uint8)
    sample = PlanSample(
        id="s#pair0", source="s", item="i", kind="pair", views=tuple(ViewRole(index=i) for i in range(3)), seed=0
    )
    plain, chained = (feature_requests(sample, None, name, config, pixels=pictures) for name in ("features", "small"))
    assert all(request.passing for request in (*plain, *chained))
    assert len({request.key for request in plain}) == 3
    other = feature_requests(sample, None, "features", config, pixels=pictures[:, ::-1])
    assert not {request.key for request in plain} & {request.key for request in other}
    same = feature_requests(sample, None, "features", config, pixels=pictures.copy())
    assert [request.key for request in plain] == [request.key for request in same]
    sink = StoreSink(config, open_store(config))
    records = StoredUpstream("small", config, sink)(plain)
    client = FeatureClient(config, open_store(config))
    for _ in range(2):
        answers = client.get([*plain, *chained], 0)
        assert all(isinstance(answer, dict) for answer in answers)
    for a, b in zip(records, answers, strict=False):
        np.testing.assert_allclose(a["tokens"].data, b["tokens"].data, atol=1e-5)
    assert client.stats.hits == 0
    client.close()
    sink.close()
    with open_store(config) as store:
        assert sum(info.stats.records for info in store.namespaces()) == 0


def test_pictures_that_pass_by_are_for_encoders_of_single_pictures(make_config, monkeypatch):
    monkeypatch.setattr(families, "INPUT_KINDS", {**families.INPUT_KINDS, "views": InputKind.VIEWS})
    config = make_config(encoder={"family": "views"})
    sample = PlanSample(id="s#pair0", source="s", item="i", kind="pair", views=(ViewRole(index=0),), seed=0)
    with pytest.raises(ConfigError, match=r"'features' reads views; data\.augment is for encoders of single pictures"):
        feature_requests(sample, None, "features", config, pixels=np.zeros((1, 56, 56, 3), np.uint8))


def test_two_threads_that_ask_for_a_chain_and_its_source_do_not_wait_for_each_other(make_config, make_requests):
    config = make_config(service={"deadline_s": 5.0}, cache={"mode": "never"})
    client = FeatureClient(config, None)
    plain, chained = make_requests(6), make_requests(6, encoder="small")
    found: list[list[object]] = []

    def ask(requests: list[object]) -> None:
        for step in range(5):
            found.append(client.get(requests, step))

    threads = [
        threading.Thread(target=ask, args=(requests,))
        for requests in ([*chained, *plain], [*plain[::-1], *chained[::-1]], chained)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(found) == 15
    assert all(isinstance(answer, dict) for answers in found for answer in answers)
    client.close()


def test_warming_takes_the_entries_that_the_recipe_reads_an_encoder_for(make_config, make_requests, monkeypatch):
    def two(config, role):
        conversation = FeatureInput(encoder="features", columns={"tokens": "tokens"})
        pairs = FeatureInput(encoder="small", columns={"tokens": "latent"})
        return {"conversation": KindInputs(features=(conversation,)), "pair": KindInputs(features=(pairs,))}

    monkeypatch.setitem(declared.INPUTS, "two", two)
    base = make_config()
    recipe = dataclasses.replace(base.recipe, name="two", quotas={"conversation": 1.0, "pair": 1.0})
    config = dataclasses.replace(base, recipe=recipe)
    requests = make_requests(5)
    kinds = {"scene": requests[:3], "item": requests[3:]}

    class Source:
        entries = tuple(
            SimpleNamespace(id=name, kind=name, split=Split.TRAIN, n_views=len(part)) for name, part in kinds.items()
        )

        def views(self, item, places):
            return [View(image=kinds[item][place].images[0]) for place in places]

        def digests(self, item, places):
            return [kinds[item][place].digests[0] for place in places]

    assert maintain.chosen_encoders(config) == ("features", "small")
    assert maintain.chosen_encoders(config, "small") == ("small",)
    with pytest.raises(ConfigError, match="there is no encoder 'large'"):
        maintain.chosen_encoders(config, "large")
    with open_store(config) as store:
        talks = maintain.warm(config, store, "s", Source(), encoder="features")
        scenes = maintain.warm(config, store, "s", Source(), encoder="small")
        again = maintain.warm(config, store, "s", Source(), encoder="small")
        checked = maintain.verify(config, store, encoder="small", sample=3)
    assert (talks.inputs, talks.broken) == (2, {})
    assert (scenes.inputs, scenes.stored) == (3, 0)
    assert (again.inputs, again.stored, again.encoded) == (3, 3, 0)
    assert checked.ok
    assert checked.checked == 3
