"""The Ray Data pipeline of a role: plan rows in plan order, ahead of the ranks. The only file here with Ray.

One actor a role, the *feed*, runs the pipeline and hands each rank the rows of its samples. Rows are ids, numbers and
feature keys; features never pass through Ray Data, each rank reads them from the store (measured: payload through
Ray Data is five times slower). A stage of the pipeline makes the rows of some steps and the keys of what they need.
It waits before blocks of steps that begin further ahead of the slowest rank than ``trainer.lookahead_steps``, and that
bounds the whole pipeline, whose rows are far too small for Ray Data's own back-pressure, which counts bytes.

Rows that arrive at a rank make its loader ask the service for what is missing, before the step is due. The rank asks
itself, and not the stage, because a miss is answered with the tensors: in the stage's process they would have to be
committed before anybody could use them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import pyarrow as pa

from configs import RunConfig
from services.contracts import FeatureKey, StepPlan
from services.errors import DataError, DeadlineError
from services.runtime import calls
from services.streams import rows
from services.streams.inputs import augmented_kinds, kind_inputs
from services.streams.plan import EpochPlan, check_world_size
from services.streams.requests import sample_requests
from services.streams.rows import PlannedStep

_BLOCKS_A_SEGMENT = 1000
"""Blocks of one Ray Data execution; a long run has several in turn, since each block is a task to plan."""
_STAGE_CPUS = 0.1
_WAIT_S = 5.0
"""Longest a single call waits at the feed; it is then repeated."""


KeysOf = Callable[[StepPlan], Mapping[str, tuple[FeatureKey, ...]]]
"""Feature keys of a step's samples by id; a broken sample has none."""


class FeatureKeys:
    """The keys that the ranks of a role will ask the feature service for, from this machine's manifests."""

    def __init__(self, config: RunConfig, role: str = "") -> None:
        from services.data.sources import open_sources

        self._config = config
        inputs = kind_inputs(config, role)
        # What is made of augmented pictures has no key before the pictures are made.
        self._inputs = {k: made for k, made in inputs.items() if k not in augmented_kinds(config, inputs)}
        self._manifests = open_sources(config, revalidate=False)

    def __call__(self, plan: StepPlan) -> Mapping[str, tuple[FeatureKey, ...]]:
        """See :data:`KeysOf`."""
        found: dict[str, tuple[FeatureKey, ...]] = {}
        for batch in plan.micro_batches:
            if batch.kind not in self._inputs:
                continue
            for sample in batch.samples:
                try:
                    requests = sample_requests(sample, self._manifests[sample.source], self._config, self._inputs)
                except DataError:
                    continue  # the rank that gets this sample finds it broken, says why and records it
                found[sample.id] = tuple(request.key for request in requests)
        return found


class _Stage:
    """Ray Data stage: a block of step numbers -> the rows of these steps."""

    def __init__(self, plan: Any, feed: Any, lookahead: int, timeout_s: float, make_keys: Callable[[], KeysOf]) -> None:
        self._plan: EpochPlan = calls.call(plan, "the epoch plan from the object store", timeout_s)
        self._feed, self._lookahead, self._timeout_s = feed, lookahead, timeout_s
        self._keys = make_keys()

    def __call__(self, block: Any) -> Any:
        steps = block["step"].to_pylist()
        if steps:
            # Once a block: a call to the feed costs ten times what making the rows of a step does.
            self._wait_until(steps[0] - self._lookahead)
        planned = [self._plan.step(step) for step in steps]
        tables = [rows.to_table(step, self._keys(step)) for step in planned]
        return rows.joined(tables)

    def _wait_until(self, step: int) -> None:
        """Until every rank has asked for ``step``; as long as it takes, so a rank may validate for an hour."""
        while not calls.call(
            self._feed.wait_until.remote(step, _WAIT_S), "the feed: how far the ranks are", self._timeout_s
        ):
            continue


class Feed:
    """Runs the pipeline from step ``start`` on and keeps the rows of the next steps for all ranks.

    A plain class; :func:`start_feed` makes an actor of it. Each rank must ask for steps in order, and all ranks for
    every step. ``tables`` gives the pipeline's tables of whole steps, in order.
    """

    def __init__(
        self,
        *,
        start: int,
        world_size: int,
        lookahead: int,
        tables: Callable[[], Iterator[pa.Table]],
    ) -> None:
        self._world_size = world_size
        self._lookahead = max(1, lookahead)
        self._positions = dict.fromkeys(range(world_size), start)
        self._ready: dict[int, pa.Table] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pull")
        self._pulling: Future[None] = self._executor.submit(self._pull, tables)
        # Those who wait must see the end, or the error.
        self._pulling.add_done_callback(lambda _: self._wake())

    def take(self, rank: int, step: int, most: int, wait_s: float) -> pa.Table | None:
        """The rows of ``rank`` for up to ``most`` steps from ``step`` on; empty after the last step.

        None when ``wait_s`` seconds passed without any. What the pipeline raised is raised here.
        """
        with self._changed:
            self._positions[rank] = step
            self._forget()
            self._changed.notify_all()
            self._changed.wait_for(lambda: step in self._ready or self._pulling.done(), wait_s)
            chosen: list[pa.Table] = []
            while step in self._ready and len(chosen) < most:
                chosen.append(rows.rank_slice(self._ready[step], rank, self._world_size))
                step += 1
        if chosen:
            return rows.joined(chosen)
        if not self._pulling.done():
            return None
        self._pulling.result()
        return rows.SCHEMA.empty_table()

    def wait_until(self, step: int, wait_s: float) -> bool:
        """Whether every rank has asked for ``step`` or a later one; waits for it up to ``wait_s`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: min(self._positions.values()) >= step, wait_s)

    def close(self) -> None:
        """Stop pulling."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._executor.shutdown(wait=True)

    def _forget(self) -> None:
        behind = min(self._positions.values())
        for step in [step for step in self._ready if step < behind]:
            del self._ready[step]

    def _pull(self, tables: Callable[[], Iterator[pa.Table]]) -> None:
        """In the feed's thread: cut the pipeline's tables into steps and keep a bounded number of them."""
        for table in tables():
            steps = table["step"].to_numpy()
            for step in dict.fromkeys(steps.tolist()):
                mine = table.filter(pa.array(steps == step))
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._lookahead)
                    if self._closed:
                        return
                    self._ready[step] = mine
                    self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def ray_tables(
    plan: Any,
    start: int,
    stop: int,
    lookahead: int,
    timeout_s: float,
    make_keys: Callable[[], KeysOf],
    feed: Any,
) -> Iterator[pa.Table]:
    """Tables of rows of the steps [start, stop) in order, from Ray Data. ``plan`` and ``feed`` live in Ray."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    # Of this process alone, which is the feed's.
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # They would advise on the memory of a stage of which there is one, in the middle of the progress line.
    context.issue_detectors_config.detectors = []
    block = block_steps(lookahead)
    segment = block * _BLOCKS_A_SEGMENT
    for begin in range(start, stop, segment):
        count = min(segment, stop - begin)
        numbers = ray.data.range(count, override_num_blocks=-(-count // block))
        dataset = numbers.map_batches(
            cast(Any, _offset),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_STAGE_CPUS,
            fn_kwargs={"begin": begin},
        ).map_batches(
            _Stage,
            fn_constructor_args=(plan, feed, lookahead, timeout_s, make_keys),
            compute=ActorPoolStrategy(size=1),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_STAGE_CPUS,
        )
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _offset(block: Any, begin: int) -> Any:
    """Numbers from 0 -> step numbers."""
    return pa.table({"step": pa.array(block["id"].to_numpy() + begin, pa.int64())})


class _RemoteFeed(Feed):
    """The feed as an actor."""

    def __init__(
        self,
        plan: list[Any],
        start: int,
        stop: int,
        world_size: int,
        lookahead: int,
        timeout_s: float,
        make_keys: Callable[[], KeysOf],
    ) -> None:
        import ray

        me = ray.get_runtime_context().current_actor
        # The plan comes as a reference in a list, so that Ray does not unpack it here, where it is not needed.
        super().__init__(
            start=start,
            world_size=world_size,
            lookahead=lookahead,
            tables=lambda: ray_tables(plan[0], start, stop, lookahead, timeout_s, make_keys, me),
        )


def start_feed(
    config: RunConfig,
    plan: EpochPlan,
    *,
    start_step: int,
    stop_step: int,
    world_size: int = 1,
    role: str = "",
    make_keys: Callable[[], KeysOf] | None = None,
) -> Any:
    """Start the pipeline of a role (by default the recipe's only, or first, one); returns the handle that every rank
    gives to :class:`PlanStream`.

    Call it in one process of the role (rank 0 of a worker group, or the driver) and hand the handle to the others;
    the feed ends with the process that started it, so a restarted group starts a new one at its own step.
    """
    import functools

    import ray

    check_world_size(plan.micro_batch, world_size)
    # Ranks may wait in ``take`` all at once, and the stage in ``wait_until``: none may hold up the others.
    remote = ray.remote(_RemoteFeed).options(num_cpus=0, max_concurrency=world_size + 4)
    return remote.remote(
        [ray.put(plan)],
        start_step,
        stop_step,
        world_size,
        config.trainer.lookahead_steps,
        deadline(config),
        make_keys or functools.partial(FeatureKeys, config, role),
    )


def block_steps(lookahead: int) -> int:
    """Steps that travel together: half of what may lie ahead, so that one block is made while the other is used."""
    return max(1, lookahead // 2)


def deadline(config: RunConfig) -> float:
    """Seconds before an unanswered call to the feed is an error."""
    return config.cluster.start_timeout_s + config.service.deadline_s


class PlanStream:
    """The planned steps of one rank, from a feed: what :class:`services.streams.loader.Loader` takes as ``steps``.

    DeadlineError when the feed has nothing for as long as a cluster may take to start plus one request; ServiceError
    when it died; and what the pipeline raised.
    """

    def __init__(self, config: RunConfig, feed: Any, *, rank: int, start_step: int, stop_step: int) -> None:
        self._feed, self._rank = feed, rank
        self._asked, self._stop = start_step, stop_step
        self._lookahead = max(1, config.trainer.lookahead_steps)
        self._deadline_s = deadline(config)
        self._buffer: deque[PlannedStep] = deque()
        self._new: list[PlannedStep] = []
        self._pending: Any = None
        self._answered: Future[Any] | None = None

    def __iter__(self) -> Iterator[PlannedStep]:
        return self

    def __next__(self) -> PlannedStep:
        """The next step; waits for it."""
        empty = 0
        while not self._buffer:
            self._ask()
            if self._pending is None:
                raise StopIteration
            empty += not self._receive()
            # The first empty answer may date from a pause of all ranks, such as a validation.
            if empty > 1:
                raise DeadlineError(
                    f"rank {self._rank} waits for rows of step {self._asked}: none in {self._deadline_s:g} s; the "
                    f"pipeline waits for CPUs (its stages need {_STAGE_CPUS} of one) or for a rank that does not read"
                )
        self._ask()
        return self._buffer.popleft()

    def arrived(self) -> list[PlannedStep]:
        """Steps that came in since this was last called, those already given out too; does not wait."""
        self._ask()
        while self._answered is not None and self._answered.done():
            self._receive()
            self._ask()
        new, self._new = self._new, []
        return new

    def _ask(self) -> None:
        """Have one call for further steps under way, unless enough are here."""
        if self._pending is None and self._asked < self._stop and len(self._buffer) < self._lookahead:
            self._pending = self._feed.take.remote(
                self._rank, self._asked, block_steps(self._lookahead), self._deadline_s
            )
            self._answered = self._pending.future()

    def _receive(self) -> bool:
        """Take in the answer of the feed; False when it had nothing before its deadline."""
        what = f"the feed: rows of step {self._asked} for rank {self._rank}"
        # The feed gives up a little earlier and says that it has none; this deadline is for one that hangs.
        table = calls.call(self._pending, what, self._deadline_s + _WAIT_S)
        self._pending = self._answered = None
        if table is None:
            return False
        steps = list(rows.from_table(table))
        if not steps:
            self._stop = self._asked
            return True
        self._asked = steps[-1].plan.step + 1
        self._buffer.extend(steps)
        self._new.extend(steps)
        return True
