"""The service without Ray: urgency, bounds, leases, failover, release and return of replicas."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest

from configs.schema import EncoderConfig
from services.contracts import FeatureRequest, Tensor
from services.errors import CacheError, DataError, DeadlineError, ServiceError
from services.features.keys import feature_key
from services.features.router import PoolRouter
from services.features.worker import EncoderWorker, QueueFullError


class Fake:
    """An encoder that notes its batches and waits for ``gate``."""

    def __init__(self):
        self.gate, self.batches, self.fail = threading.Event(), [], None
        self.started = threading.Event()

    def __call__(self, name, config, *, upstream=None):
        return self

    def encode(self, requests):
        self.started.set()
        assert self.gate.wait(10)
        if self.fail is not None:
            raise self.fail
        self.batches.append([request.sample_id for request in requests])
        return [DataError("broken") if r.sample_id == "bad" else {"x": Tensor(data=None, dtype="n")} for r in requests]

    def close(self):
        pass


class Sink:
    def __init__(self):
        self.kept, self.error, self.closed = [], None, False

    def put(self, requests, records):
        if self.error:
            raise self.error
        self.kept += [request.sample_id for request in requests]

    def close(self):
        self.closed = True


def request(name, encoder="features"):
    return FeatureRequest(key=feature_key((), text=name), encoder=encoder, sample_id=name)


@pytest.fixture
def parts(make_config):
    config = make_config(service={"queue": 8, "batch_wait_s": 0.0})
    config = dataclasses.replace(config, encoders={**config.encoders, "other": EncoderConfig(batch_size=4)})
    fake, sink = Fake(), Sink()
    worker = EncoderWorker(config, sink, make_encoder=fake)
    yield worker, fake, sink
    fake.gate.set()
    worker.close()


def ask(worker, names, step, **options):
    """In a thread of its own; returns the thread and the list its answers will be in."""
    answers: list = []

    def body():
        try:
            answers.extend(worker.encode([request(name) for name in names], step, **options))
        except ServiceError as error:
            answers.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, answers


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def queued(worker, count):
    wait_for(lambda: worker.stats().queued == count)


def test_the_smallest_step_goes_first_in_full_micro_batches(parts):
    worker, fake, _ = parts
    first, _ = ask(worker, ["now"], 9)
    assert fake.started.wait(10)
    late, _ = ask(worker, ["l1", "l2", "l3"], 7)
    queued(worker, 3)
    soon, _ = ask(worker, ["s1", "s2"], 2)
    queued(worker, 5)
    fake.gate.set()
    for thread in (first, late, soon):
        thread.join(10)
    assert fake.batches == [["now"], ["s1", "s2", "l1", "l2"], ["l3"]]


def test_a_key_in_flight_is_not_encoded_again_and_takes_the_higher_urgency(parts):
    worker, fake, sink = parts
    first, one = ask(worker, ["busy"], 0)
    assert fake.started.wait(10)
    second, two = ask(worker, ["busy", "x", "y"], 5)
    queued(worker, 2)
    third, three = ask(worker, ["y"], 1)
    wait_for(lambda: 1 in [job.step for job in worker._queue])
    assert worker.stats().queued == 2
    fake.gate.set()
    for thread in (first, second, third):
        thread.join(10)
    assert fake.batches == [["busy"], ["y", "x"]]
    assert one[0] is two[0]
    assert two[2] is three[0]
    assert sink.kept == ["busy", "y", "x"]


def test_a_full_queue_refuses_all_or_nothing(parts):
    worker, fake, _ = parts
    first, _ = ask(worker, ["busy"], 0)
    assert fake.started.wait(10)
    second, _ = ask(worker, [str(i) for i in range(7)], 0)
    queued(worker, 7)
    with pytest.raises(QueueFullError, match=r"7 of service\.queue=8 and 2 more"):
        worker.encode([request("a"), request("b")], 0)
    assert worker.stats().queued == 7
    fake.gate.set()
    first.join(10)
    second.join(10)


def test_broken_inputs_and_what_nobody_wants_kept_stay_out_of_the_sink(parts):
    worker, fake, sink = parts
    fake.gate.set()
    good, bad = worker.encode([request("good"), request("bad")], 0)
    assert isinstance(good, dict)
    assert isinstance(bad, DataError)
    worker.encode([request("unkept")], 0, keep=False)
    assert sink.kept == ["good"]
    stats = worker.stats()
    assert (stats.encoded, stats.failed, stats.queued) == (2, 1, 0)


def test_a_sink_that_refuses_loses_no_answer(parts):
    worker, fake, sink = parts
    fake.gate.set()
    sink.error = CacheError("the disk is full")
    (answer,) = worker.encode([request("a")], 0)
    assert isinstance(answer, dict)


def test_a_failing_encoder_answers_and_the_replica_lives(parts):
    worker, fake, _ = parts
    fake.gate.set()
    fake.fail = RuntimeError("out of memory")
    (answer,) = worker.encode([request("a")], 0)
    assert isinstance(answer, ServiceError)
    assert "out of memory" in str(answer)
    fake.fail = None
    (answer,) = worker.encode([request("a")], 0)
    assert isinstance(answer, dict)


def test_a_deadline_says_what_is_waited_for(parts):
    worker, *_ = parts
    with pytest.raises(DeadlineError, match="step 3 waits for 1 inputs"):
        worker.encode([request("a")], 3, timeout_s=0.05)


def test_closing_fails_what_is_queued_and_commits(parts):
    worker, fake, sink = parts
    first, _ = ask(worker, ["busy"], 0)
    assert fake.started.wait(10)
    second, answers = ask(worker, ["waits"], 0)
    queued(worker, 1)
    closing = threading.Thread(target=worker.close)
    closing.start()
    time.sleep(0.05)
    fake.gate.set()
    for thread in (closing, first, second):
        thread.join(10)
    assert isinstance(answers[0], ServiceError)
    assert sink.closed
    with pytest.raises(ServiceError, match="closed"):
        worker.encode([request("a")], 0)


# --- router ----------------------------------------------------------------------------------------------------------


class World:
    def __init__(self):
        self.now, self.started, self.stopped = 0.0, [], []

    def router(self, replicas=2, **changes):
        settings = {"lease_s": 10.0, "release_at": 0.9, "batch_size": 4, "window": 20, **changes}
        return PoolRouter(
            replicas, start=self.started.append, stop=self.stopped.append, clock=lambda: self.now, **settings
        )


@pytest.fixture
def world():
    return World()


def keys(*names):
    return [name.encode() for name in names]


def test_a_key_has_one_holder_until_it_is_done(world):
    router = world.router()
    first = router.assign(keys("a", "b", "c", "d"))
    assert sorted(first) == [0, 0, 1, 1]
    assert router.assign(keys("d", "a")) == [first[3], first[0]]
    router.done(keys("a"), 1 - first[0])  # not its holder
    assert router.stats().leases == 4
    router.done(keys("a"), first[0])
    assert router.stats().leases == 3


def test_a_lease_ends_with_its_deadline(world):
    router = world.router()
    (holder,) = router.assign(keys("a"))
    world.now = 9.9
    assert router.assign(keys("a")) == [holder]
    router.failed(holder)
    (other,) = router.assign(keys("a"))
    assert other != holder
    world.now = 25.0
    assert router.assign(keys("b")) == [0]
    assert router.stats().leases == 1


def test_requests_of_a_dead_replica_go_elsewhere_and_come_back(world):
    router = world.router()
    router.failed(0)
    assert set(router.assign(keys("a", "b", "c"))) == {1}
    world.now = PoolRouter.SHUN_S + 0.1
    assert 0 in router.assign(keys("d", "e", "f", "g"))


def test_the_only_replica_is_asked_even_after_a_failure(world):
    router = world.router(replicas=1)
    router.failed(0)
    assert router.assign(keys("a")) == [0]


def test_idle_replicas_go_when_the_cache_answers_and_return_with_misses(world):
    router = world.router(replicas=3)
    assert world.started == [0, 1, 2]
    assert router.report(0, 15) == 0
    assert router.report(17, 3) == 0  # a whole window, and too many misses
    (busy,) = router.assign(keys("a"))
    assert router.report(20, 0) == 2
    assert router.live() == [busy]
    router.done(keys("a"), busy)
    assert router.report(5, 0) == 1
    assert router.stats().live == 0
    assert router.assign(keys("b")) == [0]
    assert router.live() == [0]
    router.assign(keys(*"cdefg"))  # more than a batch: a second one
    assert router.live() == [0, 1]
    assert router.stats().released == 3


def test_a_replica_that_was_released_forgets_nothing_it_owed(world):
    router = world.router(replicas=1)
    router.assign(keys("a"))
    world.now = 11.0  # the lease is over, whoever held it
    assert router.report(20, 0) == 1
    router.done(keys("a"), 0)
    router.failed(0)
    assert router.stats().leases == 0
