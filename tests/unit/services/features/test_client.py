"""Cache-through reads, fallback, look-ahead, and the measured rule."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from services.contracts import ImageRef, Lookups
from services.errors import DataError, ServiceError, WeightsError
from services.features import journal
from services.features.client import FeatureClient
from services.features.encode import Encoder
from services.features.rule import MeasuredRule
from services.features.sink import open_store
from services.telemetry import events


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n].data, b[n].data) and a[n].dtype == b[n].dtype for n in a)


class FakePool:
    """Answers with an encoder of its own until ``alive`` is cleared."""

    def __init__(self, config):
        self.encoder, self.alive, self.asked, self.reports = Encoder("features", config), True, [], []

    def encode(self, requests, step, *, keep):
        self.asked.append((len(requests), step, keep))
        if not self.alive:
            return [ServiceError("no replica answers")] * len(requests)
        return self.encoder.encode(requests)

    def report(self, hits, misses):
        self.reports.append((hits, misses))


class SlowEncoder:
    """Counts what it encodes, once ``gate`` is open."""

    def __init__(self, config):
        self.real, self.gate, self.seen, self.order = Encoder("features", config), threading.Event(), [], []
        self.gate.set()

    def __call__(self, name, config, *, upstream=None):
        return self

    def encode(self, requests):
        self.gate.wait(10)
        self.seen += [request.key for request in requests]
        return self.real.encode(requests)

    def close(self):
        self.real.close()


def test_a_miss_is_answered_at_once_and_a_later_run_hits_with_the_same_bits(make_config, make_requests):
    config, requests = make_config(), make_requests(6)
    first = FeatureClient(config, open_store(config))
    encoded = first.get(requests, 0)
    assert (first.stats.hits, first.stats.misses, first.stats.encoded) == (0, 6, 6)
    first.close()
    second = FeatureClient(config, open_store(config))
    read = second.get(requests, 0)
    assert (second.stats.hits, second.stats.misses, second.stats.encoded) == (6, 0, 0)
    assert all(same(a, b) for a, b in zip(encoded, read, strict=True))
    assert second._encoders == {}
    second.close()


def test_the_same_key_twice_in_a_batch_is_encoded_once(make_config, make_requests):
    config, (request,) = make_config(), make_requests(1)
    encoder = SlowEncoder(config)
    client = FeatureClient(config, open_store(config), make_encoder=encoder)
    a, b = client.get([request, dataclasses.replace(request, sample_id="other")], 0)
    assert same(a, b)
    assert len(encoder.seen) == 1
    client.close()


def test_two_threads_that_need_a_key_share_one_encode(make_config, make_requests, monkeypatch):
    config, requests = make_config(), make_requests(2)
    encoder = SlowEncoder(config)
    encoder.gate.clear()
    client = FeatureClient(config, open_store(config), make_encoder=encoder)
    answers, waiting, real = {}, [], client._await
    monkeypatch.setattr(client, "_await", lambda flight: (waiting.append(flight), real(flight))[1])
    threads = [threading.Thread(target=lambda i=i: answers.update({i: client.get(requests, 0)})) for i in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(waiting) == 2)  # each for its first answer; the third thread encodes
    encoder.gate.set()
    for thread in threads:
        thread.join(20)
    assert len(encoder.seen) == 2
    assert all(same(answers[0][k], answers[i][k]) for i in answers for k in range(2))
    assert len(answers) == 3
    client.close()


def test_a_broken_picture_is_an_error_in_its_place(make_config, make_requests, tmp_path):
    config, requests = make_config(), make_requests(3)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG broken")
    requests[1] = dataclasses.replace(requests[1], images=(ImageRef(path=str(tmp_path / "bad.png")),))
    client = FeatureClient(config, open_store(config))
    good, bad, also_good = client.get(requests, 0)
    assert isinstance(good, dict)
    assert isinstance(also_good, dict)
    assert isinstance(bad, DataError)
    assert "bad.png" in str(bad)
    client.close()


def test_without_a_cache_nothing_is_kept(make_config, make_requests):
    config, requests = make_config(cache={"mode": "never"}), make_requests(2)
    assert open_store(config) is None
    client = FeatureClient(config, None)
    a, b = client.get(requests, 0), client.get(requests, 1)
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert (client.stats.hits, client.stats.misses) == (0, 4)
    assert not client.caching
    client.close()


def test_a_service_that_is_gone_is_replaced_here_with_the_same_bits_and_said_once(
    make_config, make_requests, tmp_path, caplog
):
    config, requests = make_config(cache={"mode": "never"}), make_requests(8)
    events.configure(tmp_path / "events", "test")
    pool = FakePool(config)
    client = FeatureClient(config, None, pool=pool)
    from_service = client.get(requests, 0)
    assert client._encoders == {}
    pool.alive = False
    from_here = client.get(requests, 1)
    client.get(requests, 2)
    assert all(same(a, b) for a, b in zip(from_service, from_here, strict=True))
    assert [asked for asked in pool.asked if asked[1] == 2] == []  # not asked again at once
    assert len([r for r in caplog.records if "encodes itself" in r.message]) == 1
    assert [e["what"] for e in events.read(tmp_path / "events")].count("service_gone") == 1
    client._pool_again_at, pool.alive = 0.0, True
    client.get(requests, 3)
    assert any("answers again" in r.message for r in caplog.records)
    events.configure(None, "")
    client.close()


def test_only_what_the_service_left_unanswered_is_encoded_here(make_config, make_requests):
    config, requests = make_config(cache={"mode": "never"}), make_requests(4)
    pool, encoder = FakePool(config), SlowEncoder(config)
    half = pool.encode

    def answer_half(asked, step, *, keep):
        return half(asked, step, keep=keep)[:2] + [ServiceError("dead")] * (len(asked) - 2)

    pool.encode = answer_half
    client = FeatureClient(config, None, pool=pool, make_encoder=encoder)
    answers = client.get(requests, 0)
    assert all(isinstance(answer, dict) for answer in answers)
    assert encoder.seen == [request.key for request in requests[2:]]
    client.close()


def test_those_who_share_a_client_have_counts_of_their_own(make_config, make_requests):
    config, requests = make_config(), make_requests(4)
    client = FeatureClient(config, open_store(config))
    training, validation = Lookups(), Lookups()
    client.get(requests[:3], 0, training)
    client.sink.flush()
    client.get(requests, 0, validation)
    assert (training, training.hit_rate) == (Lookups(0, 3), 0.0)
    assert (validation, validation.hit_rate) == (Lookups(3, 1), 0.75)
    assert (client.stats.hits, client.stats.misses) == (3, 4)
    client.close()


def test_pinned_features_of_a_chain_survive_the_budget_of_another_run(make_config, make_requests):
    """Before anything is read, and after the process that wrote them is gone."""
    config, requests = make_config(), make_requests(4, encoder="small")
    writer = FeatureClient(config, open_store(config))
    writer.get(requests, 0)
    writer.close()
    store = open_store(config)
    client = FeatureClient(config, store)
    client.pin("small")
    held = {client.sink.namespace(name).fingerprint for name in ("small", "features")}
    assert store.gc(budget=0).shards == 0
    assert {info.fingerprint for info in store.namespaces() if info.pinned} == held
    client.close()
    assert store.gc(budget=0).shards == 2
    store.close()


def test_the_service_hears_the_hit_rate(make_config, make_requests):
    config, requests = make_config(cache={"mode": "never"}), make_requests(3)
    pool = FakePool(config)
    client = FeatureClient(config, None, pool=pool)
    for step in range(25):
        client.get(requests, step)
    client.close()
    assert sum(misses for _, misses in pool.reports) == 75
    assert len(pool.reports) == 2  # one when enough had come together, the rest at the end


def test_an_encoder_that_cannot_be_built_stops_the_run(make_config, make_requests, tmp_path):
    config, requests = make_config(encoder={"weights": str(tmp_path / "nowhere")}), make_requests(1)
    config = dataclasses.replace(
        config, encoders={"features": dataclasses.replace(config.encoders["features"], arch={})}
    )
    client = FeatureClient(config, open_store(config))
    with pytest.raises(WeightsError, match="nowhere"):
        client.get(requests, 0)
    assert client._flights == {}
    client.close()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_prefetched_features_are_there_and_count_as_misses(make_config, make_requests):
    config, requests = make_config(), make_requests(6)
    encoder = SlowEncoder(config)
    client = FeatureClient(config, open_store(config), make_encoder=encoder)
    client.prefetch(requests, 3)
    wait_for(lambda: len(encoder.seen) == 6 and not client._queued)
    answers = client.get(requests, 3)
    assert all(isinstance(answer, dict) for answer in answers)
    assert len(encoder.seen) == 6
    assert (client.stats.hits, client.stats.misses) == (0, 6)
    assert client._ahead_bytes == 0
    client.close()


def test_look_ahead_is_bounded_in_bytes_and_takes_the_smallest_step_first(make_config, make_requests):
    config, requests = make_config(cache={"mode": "never"}), make_requests(12)
    one = 32 * 4 * (1 + 16)  # float32 summary and 4 x 4 tokens of 32 channels
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, lookahead_bytes=3 * one + 1))
    encoder = SlowEncoder(config)
    encoder.gate.clear()
    client = FeatureClient(config, None, make_encoder=encoder)
    client.prefetch(requests[:1], 9)  # taken at once, waits at the gate
    wait_for(lambda: client._ahead_bytes == one)
    client.prefetch(requests[1:6], 8)
    client.prefetch(requests[6:], 2)
    encoder.gate.set()
    wait_for(lambda: len(encoder.seen) == 3)
    time.sleep(0.05)
    assert client._ahead_bytes == 3 * one
    assert encoder.seen[1:3] == [request.key for request in requests[6:8]]
    client.get(requests[6:8], 2)
    wait_for(lambda: len(encoder.seen) == 5)
    assert encoder.seen[3:] == [request.key for request in requests[8:10]]
    client.close()


def test_what_the_consumer_passed_by_is_dropped(make_config, make_requests):
    config, requests = make_config(cache={"mode": "never"}), make_requests(5)
    encoder = SlowEncoder(config)
    client = FeatureClient(config, None, make_encoder=encoder)
    client.prefetch(requests[:4], 1)
    wait_for(lambda: len(client._flights) == 4 and all(flight.answer.done() for flight in client._flights.values()))
    client.get(requests[4:], 2)  # of another consumer, whose steps are others
    assert len(client._flights) == 4
    client.passed(1)
    assert len(client._flights) == 4
    client.passed(2)
    assert client._ahead_bytes == 0
    assert client._flights == {}
    client.close()


def test_prefetch_leaves_out_what_is_stored(make_config, make_requests):
    config, requests = make_config(), make_requests(4)
    filled = FeatureClient(config, open_store(config))
    filled.get(requests, 0)
    filled.close()
    encoder = SlowEncoder(config)
    client = FeatureClient(config, open_store(config), make_encoder=encoder)
    client.prefetch(requests, 1)
    wait_for(lambda: not client._queued)
    client.get(requests, 1)
    assert encoder.seen == []
    assert client.stats.hit_rate == 1.0
    client.close()


def test_a_chain_reads_its_upstream_through_the_cache(make_config, make_requests):
    config = make_config()
    images, pooled = make_requests(3), make_requests(3, encoder="small")
    client = FeatureClient(config, open_store(config))
    tokens = [answer["tokens"].data for answer in client.get(images, 0)]
    small = client.get(pooled, 0)
    for whole, part in zip(tokens, small, strict=True):
        assert part["tokens"].data.shape == (1, 2, 2, 32)
        windows = whole.reshape(1, 2, 2, 2, 2, 32).mean(axis=(2, 4))
        np.testing.assert_allclose(part["tokens"].data, windows, atol=1e-5)
    client.close()
    again = FeatureClient(config, open_store(config))
    assert all(same(a, b) for a, b in zip(small, again.get(pooled, 1), strict=True))
    assert again.stats.hits == 3
    again.close()


def test_with_a_lossy_codec_a_miss_and_a_hit_are_the_same_numbers(make_config, make_requests):
    config, requests = make_config(cache={"codec": "fp8_e4m3"}), make_requests(3)
    first = FeatureClient(config, open_store(config))
    encoded = first.get(requests, 0)
    exact = Encoder("features", config).encode(requests)
    first.close()
    second = FeatureClient(config, open_store(config))
    assert all(same(a, b) for a, b in zip(encoded, second.get(requests, 0), strict=True))
    assert second.stats.hits == 3
    assert not same(encoded[0], exact[0])
    second.close()


def test_the_inputs_are_in_the_journal(make_config, make_requests):
    config, requests = make_config(), make_requests(3)
    client = FeatureClient(config, open_store(config))
    client.get(requests, 0)
    folder = client.sink.namespace("features").folder
    client.close()
    with (folder / journal.NAME).open("a") as file:
        file.write('{"key": "torn')
    assert list(journal.read(folder)) == requests


def test_a_cache_that_refuses_does_not_stop_the_run(make_config, make_requests, caplog):
    config, requests = make_config(), make_requests(2)
    client = FeatureClient(config, open_store(config))
    folder = client.sink.namespace("features").folder
    (folder / journal.NAME).mkdir()  # opening it for writing fails, for root as well
    answers = client.get(requests, 0)
    assert all(isinstance(answer, dict) for answer in answers)
    assert client.stats.refused == 2
    assert any("keeps nothing more" in record.message for record in caplog.records)
    client.close()


def test_the_rule_says_both_figures_once_it_saw_enough():
    rule = MeasuredRule(enough=3)
    assert rule.encoded(100.0, 1) == ""  # loading the encoder does not count
    for _ in range(3):
        assert rule.encoded(0.004, 4) == ""
    assert [rule.read(0.002, 1) for _ in range(2)] == ["", ""]
    verdict = rule.read(0.002, 1)
    assert "do not cache" in verdict
    assert "2 ms" in verdict
    assert "1 ms" in verdict


def test_the_rule_keeps_a_cache_that_pays():
    rule = MeasuredRule(enough=2)
    verdicts = [rule.encoded(0.5, 1) for _ in range(4)] + [rule.read(0.01, 1) for _ in range(4)]
    assert verdicts == [""] * 8
    assert rule.figures() == (0.01, 0.5)


def test_auto_mode_stops_caching_on_the_verdict(make_config, make_requests, tmp_path, caplog):
    config, requests = make_config(cache={"mode": "auto"}), make_requests(2)
    events.configure(tmp_path / "events", "test")
    client = FeatureClient(config, open_store(config))
    name = requests[0].encoder
    rule = client._rules[name] = MeasuredRule(enough=1)
    for figures in ((9.0, 1), (1e-9, 1)):
        client._judge(name, rule.encoded(*figures))
    client.get(requests, 0)
    client.sink.flush()
    assert client.caching
    rule._encodes = [1e-9]
    client.get(requests, 1)  # a read, slower than that
    assert not client.caching
    client.get(requests, 2)
    assert client.stats.hits == 2
    assert client.stats.misses == 4
    said = [e for e in events.read(tmp_path / "events") if e["what"] == "do_not_cache"]
    assert len(said) == 1
    assert said[0]["encoder"] == name
    assert "ms" in said[0]["reason"]
    events.configure(None, "")
    client.close()
