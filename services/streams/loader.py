"""The loader of a rank: steps of the plan as torch batches, prepared ahead by a thread of its own.

It reads ready records and copies them into buffers that it uses again. All micro-batches of a step are loaded
before the step is handed out, so that what turned out broken is known before the first forward.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from configs import RunConfig
from services.contracts import FeatureKey, FeatureRequest, Lookups, MicroBatch, PlanSample, Record
from services.errors import CacheError, DataError, PackedError
from services.streams.collate import Collate, Slot
from services.streams.inputs import Inputs, augmented_kinds, kind_inputs
from services.streams.ledger import Ledger
from services.streams.plan import EpochPlan, check_world_size, draw_key
from services.streams.requests import ColumnRequests, column_requests
from services.streams.rows import PlannedStep
from services.streams.targets import Targets
from services.telemetry import events


class Client(Protocol):
    """What the loader asks of ``services.features.client.FeatureClient``."""

    def get(  # noqa: D102
        self, requests: Sequence[FeatureRequest], step: int, lookups: Lookups | None = None
    ) -> list[Record | BaseException]: ...
    def prefetch(self, requests: Sequence[FeatureRequest], step: int) -> None: ...  # noqa: D102
    def passed(self, step: int) -> None: ...  # noqa: D102


class Texts(Protocol):
    """Reader of text columns; :class:`services.streams.columns.Texts` is one."""

    def get(self, samples: Sequence[PlanSample], seen: Sequence[Record] = ()) -> list[Record | DataError]:
        """Token columns of every sample, of which ``seen`` is known; a DataError for one that cannot be tokenised."""
        ...


class Steps(Protocol):
    """Planned steps of a rank in order; :class:`services.streams.pipeline.PlanStream` is one."""

    def __next__(self) -> PlannedStep: ...
    def arrived(self) -> list[PlannedStep]:
        """Steps that came in since this was last called; what they miss is asked for at once."""
        ...


class PlanSteps:
    """The steps [start, stop) of a rank, read from the plan. Nothing arrives ahead: nobody is there to be asked."""

    def __init__(self, plan: EpochPlan, rank: int, world_size: int, start: int, stop: int) -> None:
        self._steps = plan.local_steps(rank, world_size, start, stop)

    def __next__(self) -> PlannedStep:
        return PlannedStep(plan=next(self._steps))

    def arrived(self) -> list[PlannedStep]:
        """None."""
        return []


@dataclass(frozen=True, kw_only=True)
class LoadedMicroBatch:
    """A rank's part of a micro-batch. The tensors live in the loader's buffers: see :class:`Loader`."""

    index: int
    """Its place among all micro-batches of the step, those that this role does not read among them."""
    kind: str
    batch: dict[str, Any]
    samples: tuple[PlanSample, ...]
    weights: tuple[float, ...]
    """1, or 0 for a broken sample or a filler; the same as the column ``weight``."""


@dataclass(kw_only=True)
class LoadedStep:
    """A step of a rank, all of it loaded."""

    step: int
    epoch: int
    micro_batches: list[LoadedMicroBatch]
    broken: dict[str, str] = field(default_factory=dict)
    """Sample id -> reason; these samples are zeros with weight 0."""
    load_s: float = 0.0
    """Seconds that the loader's thread took."""
    wait_s: float = 0.0
    """Seconds that the consumer waited for this step."""
    hit_rate: float = 0.0
    """Share of this step's records that the store had."""
    bytes: int = 0
    """Bytes of the batches."""


class Loader:
    """Iterates :class:`LoadedStep` for the steps [start_step, stop_step); use it as a context manager.

    The tensors of a step are overwritten after the next step has been asked for: clone what is to be kept, or give
    ``reuse=False``. An exception in the loading thread is raised where the step is asked for.

    Args:
        plan: the plan; also of what arrives through ``steps``.
        rank, world_size: this rank's place; ConfigError unless the micro-batch can be shared evenly.
        client: feature client; a DataError that it gives in place of a record makes the sample broken.
        manifests: by source, as the plan's.
        collate: makes columns of records; the default knows no shapes before the first good sample.
        config: the run; ``trainer.prefetch_steps`` steps are prepared ahead.
        steps: planned steps of this rank as a stream delivers them; by default read from the plan.
        targets: reader of targets; None for batches of features alone.
        inputs: what kinds are made of, by default as the recipe's first role reads them; micro-batches of other
            kinds are left out.
        texts: reader of text columns; None where no kind has text.
        ledger: where broken samples are recorded and counted; None for nowhere.
        reuse: whether buffers are used again.
    """

    def __init__(
        self,
        plan: EpochPlan,
        *,
        rank: int,
        world_size: int,
        client: Client,
        manifests: Mapping[str, Any],
        config: RunConfig,
        start_step: int,
        stop_step: int,
        collate: Collate | None = None,
        steps: Steps | None = None,
        targets: Targets | None = None,
        inputs: Inputs | None = None,
        texts: Texts | None = None,
        ledger: Ledger | None = None,
        reuse: bool = True,
    ) -> None:
        check_world_size(plan.micro_batch, world_size)
        self._client = client
        self._manifests = manifests
        self._config = config
        self._collate = collate or Collate()
        self._targets = targets
        self._inputs = kind_inputs(config) if inputs is None else inputs
        self._texts = texts
        # A pass over a whole split judges; what it judges by does not change.
        augmented = targets is not None and not plan.complete
        self._augmented = augmented_kinds(config, self._inputs) if augmented else frozenset[str]()
        self._seed = plan.seed
        self._drawn = not plan.complete
        self._ledger = ledger
        self._reuse = reuse
        self._steps = steps or PlanSteps(plan, rank, world_size, start_step, stop_step)
        self._wanted: dict[tuple[int, str], list[ColumnRequests] | DataError] = {}
        self._lookups = Lookups()
        self._culprits: dict[str, str] = {}
        """Broken sample of the step -> the part of it that is, under its own id."""
        self._expected = start_step
        self._stop_step = stop_step
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ready: deque[tuple[Slot, Future[LoadedStep | None]]] = deque()
        self._lent: Slot | None = None
        for _ in range(max(1, config.trainer.prefetch_steps)):
            self._submit(Slot())

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> LoadedStep:
        """The next step; what the last one gave is used again from here on."""
        if self._closing.is_set():
            raise StopIteration
        slot, self._lent = self._lent, None
        self._submit(slot if slot is not None and self._reuse else Slot())
        t0 = time.monotonic()
        self._lent, future = self._ready.popleft()
        with ExitStack() as on_error:
            on_error.callback(self.close)
            step = future.result()
            on_error.pop_all()
        if step is None:
            self.close()
            raise StopIteration
        step.wait_s = time.monotonic() - t0
        return step

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop after the step that is being loaded. Safe to call twice."""
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    # -- in the loader's thread -----------------------------------------------------------------------------

    def _submit(self, slot: Slot) -> None:
        self._ready.append((slot, self._thread.submit(self._load_next, slot)))

    def _load_next(self, slot: Slot) -> LoadedStep | None:
        """The next planned step, loaded; None after the last."""
        if self._closing.is_set():
            return None
        planned = next(self._steps, None)
        if planned is None:
            if self._expected < self._stop_step:
                raise DataError(f"the stream of plan rows ended before step {self._expected} of {self._stop_step}")
            return None
        if planned.plan.step != self._expected:
            raise DataError(f"the stream gave step {planned.plan.step} where step {self._expected} was due")
        self._expected += 1
        arrived = self._steps.arrived()
        for ahead in arrived:
            self._ask_for(ahead)
        if arrived:
            self._client.passed(planned.plan.step)
        t0 = time.time()
        with events.span("prepare", step=planned.plan.step) as fields:
            step = self._load(planned, slot)
            fields |= {"bytes": step.bytes, "hit_rate": step.hit_rate}
        step.load_s = time.time() - t0
        return step

    def _ask_for(self, planned: PlannedStep) -> None:
        """Have the service make what this step misses, before it is due."""
        if planned.plan.step < self._expected - 1:
            return
        requests: list[FeatureRequest] = []
        for batch in self._mine(planned):
            if batch.kind in self._augmented:
                continue  # what the encoders will be asked for is only known when the pictures are made
            for sample in batch.samples:
                self._wanted[planned.plan.step, sample.id] = found = self._requests(sample)
                if not isinstance(found, DataError):
                    requests.extend(request for column in found for request in column.requests)
        self._client.prefetch(requests, planned.plan.step)

    def _mine(self, planned: PlannedStep) -> list[MicroBatch]:
        """The micro-batches of kinds that this role reads."""
        return [batch for batch in planned.plan.micro_batches if batch.kind in self._inputs]

    def _requests(self, sample: PlanSample, made: Record | None = None) -> list[ColumnRequests] | DataError:
        """What the sample needs of encoders; of its augmented pictures, where it has ``made`` some."""
        pixels = None
        if made and "image" in made:
            # A kind of one view has no axis for it.
            pixels = made["image"].data.reshape(-1, *made["image"].data.shape[-3:])
        try:
            manifest = self._manifests[sample.source]
            return column_requests(sample, manifest, self._config, self._inputs, pixels=pixels, drawn=self._drawn)
        except DataError as error:
            return error

    def _load(self, planned: PlannedStep, slot: Slot) -> LoadedStep:
        plan = planned.plan
        self._lookups, self._culprits = Lookups(), {}
        broken: dict[str, str] = {}
        micro_batches = [
            self._micro_batch(batch, plan.step, planned.keys, slot, broken) for batch in self._mine(planned)
        ]
        if broken and self._ledger is not None:
            self._ledger.add({self._culprits.get(name, name): why for name, why in broken.items()}, plan.step)
        return LoadedStep(
            step=plan.step,
            epoch=plan.epoch,
            micro_batches=micro_batches,
            broken=broken,
            hit_rate=self._lookups.hit_rate,
            bytes=sum(
                column.nbytes
                for micro in micro_batches
                for column in micro.batch.values()
                if isinstance(column, torch.Tensor)
            ),
        )

    def _micro_batch(
        self, batch: MicroBatch, step: int, keys: Mapping[str, Sequence[FeatureKey]], slot: Slot, broken: dict[str, str]
    ) -> LoadedMicroBatch:
        draws = [draw_key(self._seed, step, sample.id) for sample in batch.samples]
        records = self._records(batch.samples, draws, step, keys, broken)
        prefix = f"{batch.index}."
        columns = self._collate(batch.kind, batch.samples, records, slot, prefix=prefix)
        columns["kind"] = batch.kind
        columns["draw"] = slot.take(f"{prefix}draw", (len(draws),), torch.int64)
        columns["draw"].copy_(torch.tensor(draws, dtype=torch.int64))
        return LoadedMicroBatch(
            index=batch.index,
            kind=batch.kind,
            batch=columns,
            samples=batch.samples,
            weights=tuple(columns["weight"].tolist()),
        )

    def _records(
        self,
        samples: Sequence[PlanSample],
        draws: Sequence[int],
        step: int,
        keys: Mapping[str, Sequence[FeatureKey]],
        broken: dict[str, str],
    ) -> list[Record | None]:
        """Features, targets and text of each sample; None where one is broken, with the reason in ``broken``."""
        good: dict[str, Record] = {sample.id: {} for sample in samples}
        kind = samples[0].kind
        augment = kind in self._augmented
        wanted: dict[str, list[ColumnRequests]] = {}
        if not augment:
            wanted = self._wanted_of(samples, step, good, broken)
            _check_keys(wanted, keys)
            self._add_features(wanted, step, good, broken)
        if self._targets is not None:
            left = [(sample, draw) for sample, draw in zip(samples, draws, strict=True) if sample.id in good]
            found = self._targets.get([sample for sample, _ in left], [draw for _, draw in left], augment=augment)
            _add(good, [sample for sample, _ in left], found, broken)
        if augment:
            # Of the changed pictures, which are in no file.
            left_over = [sample for sample in samples if sample.id in good]
            wanted = self._wanted_of(left_over, step, good, broken)
            self._add_features(wanted, step, good, broken)
        if self._texts is not None and self._inputs[kind].text:
            readers = [sample for sample in samples if sample.id in good]
            found = self._texts.get(readers, [good[sample.id] for sample in readers])
            self._culprits |= {
                sample.id: answer.culprit
                for sample, answer in zip(readers, found, strict=True)
                if isinstance(answer, PackedError)
            }
            _add(good, readers, found, broken)
        return [good.get(sample.id) for sample in samples]

    def _wanted_of(
        self, samples: Sequence[PlanSample], step: int, good: dict[str, Record], broken: dict[str, str]
    ) -> dict[str, list[ColumnRequests]]:
        """Sample id -> requests; a sample for which none can be made is no longer good."""
        wanted: dict[str, list[ColumnRequests]] = {}
        for sample in samples:
            requests = self._wanted.pop((step, sample.id), None)
            if requests is None:
                requests = self._requests(sample, good[sample.id])
            if isinstance(requests, DataError):
                broken[sample.id] = str(requests)
                del good[sample.id]
            else:
                wanted[sample.id] = requests
        return wanted

    def _add_features(
        self,
        wanted: Mapping[str, Sequence[ColumnRequests]],
        step: int,
        good: dict[str, Record],
        broken: dict[str, str],
    ) -> None:
        """Join the features to the samples' records. One call to the client for all of them."""
        flat = [request for columns in wanted.values() for column in columns for request in column.requests]
        answers = iter(self._client.get(flat, step, self._lookups) if flat else ())
        for sample_id, columns in wanted.items():
            for column in columns:
                mine: list[Record] = []
                for answer in itertools.islice(answers, len(column.requests)):
                    if isinstance(answer, DataError):
                        broken.setdefault(sample_id, str(answer))
                    elif isinstance(answer, BaseException):
                        raise answer
                    else:
                        mine.append(answer)
                if sample_id in broken:
                    good.pop(sample_id, None)
                else:
                    good[sample_id] |= column.record(mine)


def _add(
    good: dict[str, Record],
    samples: Sequence[PlanSample],
    found: Sequence[Record | DataError],
    broken: dict[str, str],
) -> None:
    """Join what was ``found`` of each sample to its record; a sample of which something is broken is no longer good."""
    for sample, answer in zip(samples, found, strict=True):
        if isinstance(answer, DataError):
            broken[sample.id] = str(answer)
            del good[sample.id]
        else:
            good[sample.id] |= answer


def _check_keys(wanted: Mapping[str, Sequence[ColumnRequests]], keys: Mapping[str, Sequence[FeatureKey]]) -> None:
    """Whoever asked the service for these samples must have meant the same content as this rank."""
    for sample_id, columns in wanted.items():
        planned = keys.get(sample_id)
        if planned is None:
            continue
        here = [request.key for column in columns for request in column.requests]
        if list(planned) != here:
            raise CacheError(
                f"{sample_id}: its content on this machine has the keys {[key.hex() for key in here]}, where the "
                f"plan's rows were made {[key.hex() for key in planned]}; the copies of the data differ, index the "
                "sources again on every machine"
            )
