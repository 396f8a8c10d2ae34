"""The training loop of one role on one rank. No ray: it runs inline and inside a worker alike.

A step, in order: all micro-batches are loaded; the ranks of all roles exchange one message (counts per loss term,
broken samples); every micro-batch goes forward and backward in the link's order, its loss already a share of the global
mean, with activations and gradients crossing between roles; the backend sums gradients once; all ranks vote, and so
decide alike whether to step or to skip; clip, step, average.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actors.bridge.link import Alone, Links, Micro
from actors.bridge.vote import Directive, Verdict, sum_counts
from actors.trainers.backends.base import Backend
from actors.trainers.nonfinite import find_culprits
from actors.trainers.optim import MovingAverage, learning_rate
from actors.trainers.randomness import RoleRandom, Snapshot
from configs.schema import TrainerConfig
from models.spec import RoleSpec, StepOutput
from services.errors import NonFiniteError
from services.streams.loader import LoadedMicroBatch, LoadedStep
from services.telemetry import events

Metrics = dict[str, float]
Batch = dict[str, Any]
Received = Mapping[str, Tensor]

_log = logging.getLogger("loom3d")


def _nothing(*_: Any) -> None:
    """A hook that nobody asked for."""


@dataclass(kw_only=True)
class Hooks:
    """What a run attaches to the loop; plain callables, all optional. Called on every rank."""

    metrics: Callable[[int, str, Metrics], None] = _nothing
    """(steps done, split, numbers) at every ``log_every`` steps and after a validation."""
    broken: Callable[[Mapping[str, str]], None] = _nothing
    """Sample ids that could not be loaded anywhere in this step, with the reasons."""
    validate: Callable[[nn.Module], Metrics] | None = None
    """Numbers of the validation split; the module is in eval mode and holds the averaged weights, if any."""
    save: Callable[[int, bool], Any] = _nothing
    """Write a checkpoint of the state after ``step`` steps; ``best``: validation says it is the best so far."""
    directive: Callable[[], Directive] | None = None
    """What all ranks do after this step. Set it on all ranks of a role; only the coordinating rank's is asked."""


@dataclass(kw_only=True)
class LoopState:
    """What the loop has to remember beside weights and optimiser."""

    step: int = 0
    """Optimiser steps done or skipped."""
    samples: int = 0
    skipped: int = 0
    best: float | None = None
    best_step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dict(vars(self))


@dataclass(kw_only=True)
class _Interval:
    """Sums since metrics were last logged."""

    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    samples: int = 0
    wait_s: float = 0.0
    hit_rate: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0


@dataclass(kw_only=True)
class _Pass:
    """A micro-batch between its forward and its backward pass."""

    micro: Micro
    output: StepOutput
    received: Mapping[str, Tensor]


class TrainLoop:
    """Trains ``module`` as ``role`` says, placed by the backend, which owns gradients and optimiser.

    ``link`` joins it with the other roles of the run. The state can be saved after any step and loaded before the next.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        role: RoleSpec,
        config: TrainerConfig,
        backend: Backend,
        loss_weights: Mapping[str, float],
        seed: int,
        hooks: Hooks | None = None,
        link: Links | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module = backend.prepare(module, role, config, weights)
        self.role, self.config, self.backend = role, config, backend
        self.loss_weights = dict(loss_weights)
        self.hooks = hooks or Hooks()
        self.link: Links = link or Alone(backend)
        self.ended: Directive = "continue"
        """"stop" or "resize" once the coordinating rank has said so."""
        self.average = MovingAverage(self.module, config.ema) if config.ema else None
        self.random = RoleRandom(seed, role.name, backend.rank)
        self.state = LoopState()
        self._directive: Directive = "continue"
        self._interval = _Interval()
        self._autocast = torch.autocast(
            backend.device.type,
            dtype=torch.bfloat16,
            enabled=config.precision == "bfloat16",
            # Casts of all weights would else live until the forward pass ends, when blocks keep nothing but inputs.
            cache_enabled=not config.activation_checkpointing,
        )

    def run(self, steps: Iterable[LoadedStep]) -> LoopState:
        """Train on every loaded step, from the one that follows the state's; then validate and save a last time.

        Ends early, saved but not validated, when the coordinating rank says stop or resize; :attr:`ended` says which.
        """
        self.module.train()
        self._interval = _Interval()
        iterator = iter(steps)
        while self.state.step < self.config.steps and self.ended == "continue":
            self.link.phase("load", self.state.step)
            with events.span("load", step=self.state.step):
                loaded = next(iterator)
            assert loaded.step == self.state.step, f"step {loaded.step} was loaded, {self.state.step} is due"
            self.train_step(loaded)
            self._after_step()
        return self.state

    def train_step(self, loaded: LoadedStep) -> dict[str, float]:
        """One optimiser step; returns the global mean of each of this role's loss terms.

        Skips the step if a loss or gradient of any role is not finite.
        """
        counts = self._agree(loaded)
        self.backend.zero_grad()
        sums = dict.fromkeys(counts, 0.0)
        before = self.random.snapshot()
        with self.random.active():
            self._passes(loaded, counts, sums)
        self.link.phase("step", loaded.step)
        with events.span("step", step=loaded.step):
            terms, norm, finite = self._reduce(sums, counts)
            verdict = self.link.vote(loaded.step, finite, self._ask())
            if verdict.finite:
                self._update(loaded.step, norm)
            else:
                self._skip(loaded, before, verdict)
        self._account(loaded, terms, norm)
        self._directive = verdict.directive
        self.state.step = loaded.step + 1
        return terms

    def forward_only(
        self, loaded: LoadedStep, compute: Callable[[Batch, Received], Mapping[str, Tensor] | None]
    ) -> None:
        """Pass the micro-batches of a step through all roles without gradients, as validation does.

        Every role calls it with the same step of the same plan. ``compute`` gets a batch on the device and what
        came on edges, which it must not keep, and returns what leaves on edges.
        """
        for micro, batch in self._parts(loaded, "validate"):
            received = self.link.receive(micro, gradients=False)
            with torch.no_grad(), self._autocast:
                outputs = compute(batch, received)
            self.link.send(micro, outputs or {}, gradients=False)
            self.link.done(micro)
        if self.link.joint:  # a sender that never waits would pile up the whole split
            self.link.exchange("passed", loaded.step, None)

    # -- parts of a step -------------------------------------------------------------------------------------

    def _agree(self, loaded: LoadedStep) -> dict[str, float]:
        """The one message before the first forward: counts per loss term over the global batch, broken samples.

        What broke for one role weighs nothing for all; then, and only then, the counts are summed once more.
        """
        agreed = self.link.agree(loaded.step, self._count(loaded), loaded.broken)
        if agreed.broken:
            self.hooks.broken(agreed.broken)
            if self.link.joint:
                weigh_nothing(loaded, agreed.broken)
                agreed = self.link.agree(loaded.step, self._count(loaded), {})
        return dict(agreed.counts)

    def _count(self, loaded: LoadedStep) -> dict[str, float]:
        return sum_counts(
            self.role.counts(micro_batch.batch)
            for micro_batch in loaded.micro_batches
            if self.role.takes_part(micro_batch.kind)
        )

    def _passes(self, loaded: LoadedStep, counts: Mapping[str, float], sums: dict[str, float]) -> None:
        """Add the step's loss sums to ``sums`` and its gradient to the module's, in the link's order."""
        kinds = [m.kind if self.role.takes_part(m.kind) else "" for m in loaded.micro_batches]
        passes: dict[int, _Pass] = {}
        for op in self.link.ops(kinds):
            self.link.phase(op.action, loaded.step, op.micro)
            if op.action == "forward":
                passes[op.micro] = self._forward(loaded, op.micro, sums)
            else:
                self._backward(passes.pop(op.micro), counts)

    def _forward(self, loaded: LoadedStep, index: int, sums: dict[str, float]) -> _Pass:
        micro_batch = loaded.micro_batches[index]
        micro = _micro(loaded.step, micro_batch)
        batch = to_device(micro_batch.batch, self.backend.device)
        with events.span("receive", step=loaded.step, micro=index) if self.link.joint else nullcontext():
            received = self.link.receive(micro)
        with events.span("forward", step=loaded.step, micro=index), self._autocast:
            output = self.role.step(self.module, batch, received)
        self.link.send(micro, output.outputs)
        for term, value in output.sums.items():
            sums[term] += float(value.detach())
        return _Pass(micro=micro, output=output, received=received)

    def _backward(self, passed: _Pass, counts: Mapping[str, float]) -> None:
        micro = passed.micro
        with events.span("receive", step=micro.step, micro=micro.index) if self.link.joint else nullcontext():
            edges = self.link.gradients(micro)
        with events.span("backward", step=micro.step, micro=micro.index):
            self.backend.backward(self._loss(passed.output.sums, counts), edges)
        self.link.answer(micro, passed.received, scale=1.0 / self.backend.loss_scale)
        self.link.done(micro)

    def _parts(self, loaded: LoadedStep, phase: str) -> Iterator[tuple[Micro, dict[str, Any]]]:
        """The micro-batches in which this role takes part, in order, on the device."""
        for index, micro_batch in enumerate(loaded.micro_batches):
            if self.role.takes_part(micro_batch.kind):
                self.link.phase(phase, loaded.step, index)
                yield _micro(loaded.step, micro_batch), to_device(micro_batch.batch, self.backend.device)

    def _ask(self) -> Directive | None:
        """The coordinating rank's directive; None where nobody gives any."""
        if self.hooks.directive is None:
            return None
        return self.hooks.directive() if self.link.coordinator else "continue"

    def _loss(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> Tensor | None:
        """The share of the global mean loss that lies here: weighted sums over global counts."""
        shares = [self.loss_weights[term] / max(counts[term], 1.0) * value for term, value in sums.items()]
        return torch.stack(shares).sum() if shares else None

    def _reduce(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> tuple[dict[str, float], Tensor, bool]:
        """Sum gradients over the ranks. Returns global mean terms, the gradient norm, and whether all is finite.

        The loss sums and a flag travel with the gradients, so every rank reads the same and votes the same.
        """
        mine = torch.tensor([*sums.values()], dtype=torch.float64)
        flag = (~torch.isfinite(mine)).any().double()[None]
        total, norm = self.backend.reduce(torch.cat([torch.nan_to_num(mine), flag]))
        finite = bool(total[-1] == 0) and bool(torch.isfinite(norm))
        terms = {term: float(value) / max(counts[term], 1.0) for term, value in zip(sums, total, strict=False)}
        return terms, norm, finite

    def _update(self, step: int, norm: Tensor) -> None:
        self.backend.update(learning_rate(step, self.config), norm, self.config.clip_norm)
        if self.average is not None:
            self.average.update(self.module)

    def _skip(self, loaded: LoadedStep, before: Snapshot, verdict: Verdict) -> None:
        """Leave the weights alone, name the samples, and give up when it happens too often. All roles do."""
        self.backend.zero_grad()
        self.state.skipped += 1
        after = self.random.snapshot()
        self.random.rewind(before)
        with self.random.active():
            mine = find_culprits(
                self.module, self.role, self._parts(loaded, "step"), self.backend, self._autocast, self.link
            )
        self.random.rewind(after)
        culprits = [
            f"{name}: {why}" for part in self.link.exchange("culprits", loaded.step, mine) for name, why in part.items()
        ]
        named = "; ".join(sorted(culprits)) or self._nobody()
        if verdict.blame:
            named = f"of {' and '.join(verdict.blame)}; {named}"
        now = time.time()
        events.emit(
            "non_finite", now, now, step=loaded.step, samples=sorted({text.partition(": ")[0] for text in culprits})
        )
        if self.backend.rank == 0:
            self.hooks.metrics(loaded.step + 1, "train", {"skipped_steps": float(self.state.skipped)})
            _log.warning(f"step {loaded.step}: loss or gradient is not finite, step skipped ({named})")
        if self.state.skipped > self.config.max_skipped_steps:
            raise NonFiniteError(
                f"step {loaded.step}: loss or gradient is not finite for the {self.state.skipped}. time, "
                f"trainer.max_skipped_steps allows {self.config.max_skipped_steps}. Samples: {named}. "
                "Look at them with `loom3d data show`, leave them out with data.quarantine, or lower trainer.lr"
            )

    def _nobody(self) -> str:
        """What is said where every sample alone is finite."""
        if self.backend.sharded:
            return (
                "the loss of every single sample is finite; their gradients are not looked at one by one where the "
                "backend shards the model; with backend=ddp they are"
            )
        return "no single sample; the sum of the batch overflowed"

    # -- between steps ---------------------------------------------------------------------------------------

    def _account(self, loaded: LoadedStep, terms: Mapping[str, float], norm: Tensor) -> None:
        """Add a step to what the next log line says."""
        interval = self._interval
        samples = sum(len(micro_batch.samples) for micro_batch in loaded.micro_batches) * self.backend.world_size
        interval.steps += 1
        interval.samples += samples
        interval.wait_s += loaded.wait_s
        interval.hit_rate += loaded.hit_rate
        interval.norm = float(norm)
        for term, value in terms.items():
            interval.terms[term] = interval.terms.get(term, 0.0) + value
        self.state.samples += samples

    def _after_step(self) -> None:
        step, config, said = self.state.step, self.config, self._directive
        if said in ("stop", "resize"):
            self.ended = said
        last = step >= config.steps
        over = last or self.ended != "continue"
        if over or step % config.log_every == 0:
            self._log()
        best = False
        due = last or said == "evaluate" or (self.ended == "continue" and _due(step, config.validate_every))
        if due and (self.hooks.validate is not None or self.link.joint):
            self.link.phase("validate", step)
            best = self._validate()
            self._interval.began = time.perf_counter()
        if over or best or said == "checkpoint" or _due(step, config.checkpoint_every):
            self.link.phase("checkpoint", step)
            with events.span("checkpoint", step=step):
                self.hooks.save(step, best)

    def _log(self) -> None:
        interval, self._interval = self._interval, _Interval()
        if not interval.steps:
            return
        elapsed = max(time.perf_counter() - interval.began, 1e-9)
        terms = {term: value / interval.steps for term, value in interval.terms.items()}
        numbers = {
            "loss": weighted(terms, self.loss_weights),
            **{f"loss/{term}": value for term, value in terms.items()},
            "lr": learning_rate(self.state.step - 1, self.config),
            "grad_norm": interval.norm,
            "samples_per_s": interval.samples / elapsed,
            "wait_share": interval.wait_s / elapsed,
            "hit_rate": interval.hit_rate / interval.steps,
        }
        self.hooks.metrics(self.state.step, "train", numbers)

    def _validate(self) -> bool:
        """Run the validation hook on the averaged weights; returns whether the result is the best so far.

        With several roles, ``loss`` is the sum of theirs, and the best metric may be any role's.
        """
        numbers: Metrics = {}
        if self.hooks.validate is not None:
            with events.span("validate", step=self.state.step):
                self.module.eval()
                if self.average is not None:
                    self.average.swap(self.module)
                with self.random.active(), torch.no_grad():
                    numbers = self.hooks.validate(self.module)
                if self.average is not None:
                    self.average.swap(self.module)
                self.module.train()
            self.hooks.metrics(self.state.step, "val", numbers)
        if self.link.joint:
            numbers = _of_all_roles(self.link.exchange("validated", self.state.step, [self.role.name, numbers]))
            if not numbers:  # no role has anything to validate on
                return False
        value = numbers.get(self.config.best_metric)
        if value is None:
            raise KeyError(
                f"trainer.best_metric={self.config.best_metric!r} is not among the validation metrics {sorted(numbers)}"
            )
        better = self.state.best is None or (
            value < self.state.best if self.config.best_mode == "min" else value > self.state.best
        )
        if better:
            self.state.best, self.state.best_step = value, self.state.step
        return better


def weigh_nothing(loaded: LoadedStep, broken: Collection[str]) -> None:
    """Give the samples named ``broken`` the weight 0, wherever they are in a step."""
    for micro_batch in loaded.micro_batches:
        for index, sample in enumerate(micro_batch.samples):
            if sample.id in broken:
                micro_batch.batch["weight"][index] = 0.0


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``; other columns as they are."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def weighted(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The loss that is minimised, from its terms."""
    return float(sum(weights[term] * value for term, value in terms.items()))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _micro(step: int, micro_batch: LoadedMicroBatch) -> Micro:
    """Numbered as in the plan: a role that reads fewer kinds has fewer micro-batches."""
    weight = micro_batch.batch.get("weight")
    return Micro(
        step=step,
        index=micro_batch.index,
        kind=micro_batch.kind,
        ids=tuple(sample.id for sample in micro_batch.samples),
        zero=() if weight is None else tuple(value == 0 for value in weight.tolist()),
    )


def _of_all_roles(messages: Iterable[tuple[str, Metrics]]) -> Metrics:
    """Validation numbers of rank 0 of every role as one; ``loss`` is the sum."""
    by_role: dict[str, Metrics] = {}
    for role, numbers in messages:
        by_role.setdefault(role, numbers)
    merged: Metrics = {}
    for numbers in by_role.values():
        for name, value in numbers.items():
            merged[name] = merged[name] + value if name == "loss" and name in merged else merged.get(name, value)
    return merged
