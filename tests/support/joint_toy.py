"""Two toy roles joined by an edge, inline and as plain processes: a writer that sends, a painter that receives."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.bridge.link import Link
from actors.bridge.local import LocalTransport, run_roles
from actors.bridge.rendezvous import Rendezvous, connect
from actors.trainers.backends.ddp import DdpBackend
from actors.trainers.backends.single import SingleBackend
from actors.trainers.checkpoint import Checkpoints, Identity, resume
from actors.trainers.joint import JointCheckpoints
from actors.trainers.loop import Hooks, TrainLoop
from configs.schema import BridgeConfig, RunConfig, TrainerConfig
from models.spec import EdgeSpec, EdgeTensor, RoleSpec, StepOutput, TensorSpec
from tests.support.toy_role import MicroBatch, Sample, Step

BATCH = 4
"""Samples of a global micro-batch."""
WRITER, PAINTER = "writer", "painter"


def edge(*, three: bool = False) -> EdgeSpec:
    """The edge; with ``three``, also a ragged tensor and one of which no gradient returns."""
    tensors = [EdgeTensor(name="h", spec=TensorSpec(shape=(4,), dtype="float32"))]
    if three:
        tensors += [
            EdgeTensor(name="words", spec=TensorSpec(shape=(None, 2), dtype="float32")),
            EdgeTensor(name="codes", spec=TensorSpec(shape=(2,), dtype="int64"), gradient=False),
        ]
    return EdgeSpec(source=WRITER, target=PAINTER, tensors=tuple(tensors), kinds=("g",))


def _fill(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


class Writer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body, self.words, self.head = nn.Linear(3, 4), nn.Linear(3, 6), nn.Linear(4, 1)
        self.dropout = nn.Dropout(dropout)
        _fill(self, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.dropout(torch.tanh(self.body(x)))
        return h, torch.tanh(self.words(x)).view(-1, 3, 2), self.head(h)[:, 0]


class Painter(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.mix, self.words, self.codes, self.out = (
            nn.Linear(4, 5),
            nn.Linear(2, 5),
            nn.Embedding(7, 5),
            nn.Linear(5, 1),
        )
        self.dropout = nn.Dropout(dropout)
        _fill(self, 4)

    def forward(self, received: Mapping[str, Tensor], keep: Tensor) -> Tensor:
        mixed = self.mix(received["h"] * keep[:, None])
        if "words" in received:
            places = torch.arange(received["words"].shape[1])
            valid = (places[None] < received["words_lengths"]).float()
            mixed = mixed + (self.words(received["words"]) * valid[..., None]).sum(1)
            mixed = mixed + self.codes(received["codes"]).sum(1)
        return self.out(self.dropout(torch.tanh(mixed)))[:, 0]


def write(module: nn.Module, batch: Mapping[str, Any], received: Mapping[str, Tensor]) -> StepOutput:
    assert not received
    h, words, guess = module(batch["x"])
    # The same local loss on micro-batches that cross and on those that do not.
    sums = {"guess": ((guess - batch["x"].sum(1)).square() * batch["weight"]).sum()}
    if batch["kind"] == "q":
        return StepOutput(sums={"guess": sums["guess"] + 0.0 * words.sum()})
    lengths = batch["lengths"]
    outputs = {"h": h, "words": words, "words_lengths": lengths, "codes": batch["codes"]}
    return StepOutput(sums=sums, outputs=outputs)


def paint(module: nn.Module, batch: Mapping[str, Any], received: Mapping[str, Tensor]) -> StepOutput:
    error = module(received, batch["keep"]) - batch["y"]
    return StepOutput(sums={"paint": (error.square() * batch["weight"]).sum()})


def count(batch: Mapping[str, Any], term: str = "") -> dict[str, float]:
    return {term: float(batch["weight"].sum())}


ROLES = {
    WRITER: RoleSpec(name=WRITER, step=write, counts=functools.partial(count, term="guess")),
    PAINTER: RoleSpec(name=PAINTER, step=paint, counts=functools.partial(count, term="paint"), kinds=("g",)),
}
LOSSES = {"guess": 0.3, "paint": 1.0}


def joint_step(step: int, kinds: str, *, rank: int = 0, world: int = 1) -> Step:
    """A rank's part of a step whose micro-batches are of ``kinds``, one letter each; the same data for both roles."""
    parts = []
    for index, kind in enumerate(kinds):
        generator = torch.Generator().manual_seed(1000 * step + index)
        x = torch.randn(BATCH, 3, generator=generator)
        data: dict[str, Any] = {
            "x": x,
            "y": x.square().sum(1) / 3,
            "lengths": torch.randint(1, 4, (BATCH, 1), generator=generator),
            "codes": torch.randint(0, 7, (BATCH, 2), generator=generator),
            "keep": (torch.rand(BATCH, generator=generator) > 0.3).float(),
            "weight": torch.ones(BATCH),
        }
        share = BATCH // world
        rows = slice(rank * share, (rank + 1) * share)
        samples = tuple(Sample(f"toy/{step}/{index}#{i}") for i in range(BATCH)[rows])
        batch = {name: value[rows].clone() for name, value in data.items()} | {"kind": kind}
        parts.append(MicroBatch(batch, samples, kind, index))
    return Step(step, parts)


Spoil = Callable[[str, Step], None]
"""(role, loaded step): what goes wrong with the data, in place."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A joint run."""

    kinds: str = "gq"
    steps: int = 20
    window: int = 2
    three: bool = False
    dropout: float = 0.0
    writers: int = 1
    painters: int = 1
    spoil: Spoil | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the trainer."""
    bridge: Mapping[str, Any] = field(default_factory=dict)

    @property
    def roles(self) -> dict[str, int]:
        """Ranks by role."""
        return {WRITER: self.writers, PAINTER: self.painters}


@dataclass(kw_only=True)
class Outcome:
    """What a rank of a role came to."""

    terms: list[dict[str, float]]
    weights: dict[str, Tensor]
    skipped: int = 0
    broken: list[dict[str, str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


def make_loop(case: Case, role: str, link: Any, backend: Any, hooks: Hooks | None = None) -> TrainLoop:
    settings = {"steps": case.steps, "lr": 0.02, "warmup_steps": 2, "clip_norm": 0.5, **case.settings}
    return TrainLoop(
        module=Writer(case.dropout) if role == WRITER else Painter(case.dropout),
        role=ROLES[role],
        config=TrainerConfig(**settings),
        backend=backend,
        loss_weights=LOSSES,
        seed=5,
        link=link,
        hooks=hooks,
    )


def train(case: Case, role: str, link: Any, backend: Any) -> Outcome:
    """Run a role of a case over an open link."""
    broken: list[dict[str, str]] = []
    loop = make_loop(case, role, link, backend, Hooks(broken=lambda part: broken.append(dict(part))))
    loop.module.train()
    terms = []
    for step in range(case.steps):
        loaded = joint_step(step, case.kinds, rank=backend.rank, world=backend.world_size)
        if case.spoil is not None:
            case.spoil(role, loaded)
        terms.append(loop.train_step(loaded))
    weights = {name: value.detach().clone() for name, value in loop.module.state_dict().items()}
    return Outcome(terms=terms, weights=weights, skipped=loop.state.skipped, broken=broken)


def train_saving(case: Case, role: str, link: Any, backend: Any, *, folder: Path, die_at: int = -1) -> Outcome:
    """Run a role with joint checkpoints in ``folder``, from the newest; the painter of generation 1 dies at a step."""
    own = Checkpoints(folder / role, Identity(settings={"lr": 0.02}, plan="toy"), keep=2)
    joint = JointCheckpoints(folder, own, link, keep=2)
    terms: list[dict[str, float]] = []
    loop = make_loop(case, role, link, backend)
    loop.hooks.save = lambda _, best: joint.save(loop, best=best)
    if case.steps < loop.config.steps:  # stopped by the coordinating rank before its end
        loop.hooks.directive = lambda: "stop" if loop.state.step == case.steps - 1 else "continue"
    found = joint.newest()
    if found is not None:
        resume(loop, found)

    def steps() -> Iterator[Step]:
        for step in range(loop.state.step, case.steps):
            if step == die_at and role == PAINTER and link.generation == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield joint_step(step, case.kinds)

    def note(_: int, split: str, numbers: Mapping[str, float]) -> None:
        if split == "train":
            terms.append({key: value for key, value in numbers.items() if key.startswith("loss")})

    loop.hooks.metrics = note
    loop.run(steps())  # type: ignore[arg-type]  # the toy's steps are as the loader's
    weights = {name: value.detach().clone() for name, value in loop.module.state_dict().items()}
    return Outcome(terms=terms, weights=weights, log=[str(found.step if found else 0)])


def inline(case: Case, work: Callable[..., Any] = train) -> dict[str, Any]:
    """Both roles in this process, as ``cluster=inline`` runs them."""

    def task(role: str, transport: LocalTransport) -> Any:
        link = Link(transport, role=role, rank=0, roles=case.roles, edges=[edge(three=case.three)], window=case.window)
        with link:
            return work(case, role, link, SingleBackend())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have: sums are taken in the same order
    try:
        return run_roles({role: functools.partial(task, role) for role in case.roles})
    finally:
        torch.set_num_threads(threads)


# -- plain processes -----------------------------------------------------------------------------------------

FAST = {"heartbeat_s": 0.2, "silence_s": 3.0, "phase_s": {"start": 60.0, "other": 60.0}}
"""Limits of the tests."""


def bridge_config(case: Case) -> RunConfig:
    return RunConfig(bridge=BridgeConfig(**{"window": case.window, **FAST, **case.bridge}))


def link_of(case: Case, role: str, rank: int, address: str, generation: int, backend: Any, mailbox: Any = None) -> Link:
    return connect(
        bridge_config(case),
        role=role,
        rank=rank,
        world_size=case.roles[role],
        roles=case.roles,
        edges=[edge(three=case.three)],
        address=address,
        generation=generation,
        backend=backend,
        mailbox=mailbox,
    )


def ray_role(case: Case, role: str, address: str, generation: int, mailbox: Any) -> tuple[Any, dict[str, Any]]:
    """A role as a Ray task: its loss terms, and its weights as arrays."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backend = SingleBackend()
    with link_of(case, role, 0, address, generation, backend, mailbox) as link:
        outcome = replace_tensors(train(case, role, link, backend))
    torch.set_num_threads(threads)
    return outcome.terms, outcome.weights


def _context() -> Any:
    """Children are forked from a server that has imported torch: they start at once, and without this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.joint_toy"])
    return context


def _many(place: int, places: int, address: str, first: int, cases: Sequence[Case], results: Any) -> None:
    """Process ``place`` of several: its part in one case after the other, each in a generation of its own."""
    torch.set_num_threads(1)
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("world", store), rank=place, world_size=places)
    for number, case in enumerate(cases):
        dist.barrier()
        if place == 0:
            store.set("generation", str(first + number))
        dist.barrier()
        groups = {
            WRITER: dist.new_group(list(range(case.writers))),
            PAINTER: dist.new_group(list(range(case.writers, case.writers + case.painters))),
        }
        if place >= case.writers + case.painters:
            continue
        role = WRITER if place < case.writers else PAINTER
        rank = place - (case.writers if role == PAINTER else 0)
        backend = DdpBackend(group=groups[role]) if case.roles[role] > 1 else SingleBackend()
        with link_of(case, role, rank, address, first + number, backend) as link:
            outcome = train(case, role, link, backend)
        if rank == 0:
            results.put((number, role, replace_tensors(outcome)))


def replace_tensors(outcome: Outcome) -> Outcome:
    """With weights as numpy arrays, which travel between processes without shared memory."""
    return replace(outcome, weights={name: value.numpy() for name, value in outcome.weights.items()})


def split(cases: Sequence[Case], timeout_s: float = 120.0) -> list[dict[str, Outcome]]:
    """Every case in plain processes, which they share one after the other."""
    context = _context()
    places = max(case.writers + case.painters for case in cases)
    found: list[dict[str, Outcome]] = [{} for _ in cases]
    with Rendezvous() as rendezvous:
        results = context.Queue()
        rendezvous.open(0)
        children = []
        for place in range(places):
            child = context.Process(
                target=_many, args=(place, places, rendezvous.address, 0, list(cases), results), daemon=True
            )
            child.start()
            children.append(child)
        try:
            for number, _ in enumerate(cases):
                while len(found[number]) < 2:
                    done, role, outcome = _next(results, children, timeout_s)
                    weights = {name: torch.from_numpy(value) for name, value in outcome.weights.items()}
                    found[done][role] = replace(outcome, weights=weights)
        finally:
            for child in children:
                child.kill()
                child.join()
    return found


def _next(results: Any, children: Sequence[Any], timeout_s: float) -> Any:
    """The next result; a child that ended with an error ends the wait."""
    waited = 0.0
    while waited < timeout_s:
        try:
            return results.get(timeout=0.5)
        except queue.Empty:
            waited += 0.5
            dead = [child.exitcode for child in children if child.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"a process of the joint run ended with {dead}") from None
    raise TimeoutError(f"no result of the joint run within {timeout_s} s")


Work = Callable[[Case, str, Link, Any], Any]


def _one(case: Case, role: str, address: str, generation: int, work: Work, answers: Any) -> None:
    torch.set_num_threads(1)
    try:
        backend = SingleBackend()
        with link_of(case, role, 0, address, generation, backend) as link:
            answers.put((role, "returned", work(case, role, link, backend)))
    except BaseException as error:  # what the test looks at
        answers.put((role, type(error).__name__, f"{error}\n{traceback.format_exc()}"))
        raise


@dataclass
class Pair:
    """A writer and a painter as processes, to be disturbed."""

    children: dict[str, Any]
    answers: Any

    def outcome(self, role: str, timeout_s: float = 60.0) -> tuple[str, Any]:
        """("returned", value) or (name of the error, its text)."""
        while role not in self.seen:
            who, kind, value = self.answers.get(timeout=timeout_s)
            self.seen[who] = (kind, value)
        return self.seen[role]

    def __post_init__(self) -> None:
        self.seen: dict[str, tuple[str, Any]] = {}


def start_pair(
    case: Case, rendezvous: Rendezvous, work: Work, *, generation: int = 1, generations: Mapping[str, int] | None = None
) -> Pair:
    """Start both; ``generations`` gives one of them another generation than the open one."""
    context = _context()
    rendezvous.open(generation)
    answers = context.Queue()
    children = {}
    for role in case.roles:
        mine = (generations or {}).get(role, generation)
        args = (case, role, rendezvous.address, mine, work, answers)
        children[role] = context.Process(target=_one, args=args, daemon=True)
        children[role].start()
    return Pair(children, answers)


def steps_for_ever(case: Case, role: str, link: Link, backend: Any) -> Iterator[int]:
    """Train until something happens; yields the step."""
    loop = make_loop(replace(case, settings={"steps": 10**6}), role, link, backend)
    step = 0
    while True:
        loop.train_step(joint_step(step, case.kinds))
        step += 1
        yield step


def nan_in(role: str, column: str, sample: int, at: int, who: str, loaded: Step) -> None:
    """A :data:`Spoil`: one value of a column of a role's first micro-batch of step ``at`` is NaN."""
    if who == role and loaded.step == at:
        loaded.micro_batches[0].batch[column].view(BATCH, -1)[sample, 0] = math.nan


def break_in(role: str, sample: int, at: int, who: str, loaded: Step) -> None:
    """A :data:`Spoil`: one sample of the first micro-batch of step ``at`` could not be loaded by ``role``."""
    if who == role and loaded.step == at:
        micro = loaded.micro_batches[0]
        for name, value in micro.batch.items():
            if isinstance(value, Tensor) and name != "lengths":
                value[sample] = 0
        loaded.broken = {micro.samples[sample].id: "truncated file"}
