"""The training loop of one role on one rank. No ray: it runs inline and inside a worker alike.

A step, in order: all micro-batches are loaded; the ranks exchange one message (counts per loss term, broken samples);
every micro-batch goes forward and backward, its loss already a share of the global mean; the backend sums gradients
once; all ranks see the same numbers and so decide alike whether to step or to skip; clip, step, average.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actors.trainers.backends.base import Backend
from actors.trainers.nonfinite import find_culprits
from actors.trainers.optim import MovingAverage, learning_rate
from actors.trainers.randomness import RoleRandom, Snapshot
from configs.schema import TrainerConfig
from models.spec import RoleSpec
from services.errors import NonFiniteError
from services.streams.loader import LoadedMicroBatch, LoadedStep
from services.telemetry import events

Metrics = dict[str, float]

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


class TrainLoop:
    """Trains ``module`` as ``role`` says, placed by the backend, which owns gradients and optimiser.

    The state can be saved after any step and loaded before the next.
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
    ) -> None:
        self.module = backend.prepare(module, role, config)
        self.role, self.config, self.backend = role, config, backend
        self.loss_weights = dict(loss_weights)
        self.hooks = hooks or Hooks()
        self.average = MovingAverage(self.module, config.ema) if config.ema else None
        self.random = RoleRandom(seed, role.name, backend.rank)
        self.state = LoopState()
        self._interval = _Interval()
        self._autocast = torch.autocast(
            backend.device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16"
        )

    def run(self, steps: Iterable[LoadedStep]) -> LoopState:
        """Train on every loaded step, from the one that follows the state's; then validate and save a last time."""
        self.module.train()
        self._interval = _Interval()
        iterator = iter(steps)
        while self.state.step < self.config.steps:
            with events.span("load", step=self.state.step):
                loaded = next(iterator)
            assert loaded.step == self.state.step, f"step {loaded.step} was loaded, {self.state.step} is due"
            self.train_step(loaded)
            self._after_step()
        return self.state

    def train_step(self, loaded: LoadedStep) -> dict[str, float]:
        """One optimiser step; returns the global mean of each loss term. Skips the step if it is not finite."""
        counts = self._agree(loaded)
        self.backend.zero_grad()
        sums = dict.fromkeys(counts, 0.0)
        before = self.random.snapshot()
        with self.random.active():
            for index, micro_batch in enumerate(loaded.micro_batches):
                self._forward_backward(loaded.step, index, micro_batch, counts, sums)
        with events.span("step", step=loaded.step):
            terms, norm, finite = self._reduce(sums, counts)
            if finite:
                self._update(loaded.step, norm)
            else:
                self._skip(loaded, before)
        self._account(loaded, terms, norm)
        self.state.step = loaded.step + 1
        return terms

    # -- parts of a step -------------------------------------------------------------------------------------

    def _agree(self, loaded: LoadedStep) -> dict[str, float]:
        """The one message before the first forward: counts per loss term over the global batch, broken samples."""
        mine: dict[str, float] = {}
        for micro_batch in loaded.micro_batches:
            for term, count in self.role.counts(micro_batch.batch).items():
                mine[term] = mine.get(term, 0.0) + count
        messages = self.backend.exchange((mine, dict(loaded.broken)))
        terms = list(dict.fromkeys(term for counts, _ in messages for term in counts))
        broken = {sample: reason for _, part in messages for sample, reason in part.items()}
        if broken:
            self.hooks.broken(broken)
        return {term: sum(counts.get(term, 0.0) for counts, _ in messages) for term in terms}

    def _forward_backward(
        self, step: int, index: int, micro_batch: LoadedMicroBatch, counts: Mapping[str, float], sums: dict[str, float]
    ) -> None:
        """Add this micro-batch's loss sums to ``sums`` and its gradient to the module's."""
        batch = to_device(micro_batch.batch, self.backend.device)
        with events.span("forward", step=step, micro=index), self._autocast:
            output = self.role.step(self.module, batch, {})
        for term, value in output.sums.items():
            sums[term] += float(value.detach())
        with events.span("backward", step=step, micro=index):
            self.backend.backward(self._loss(output.sums, counts))

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

    def _skip(self, loaded: LoadedStep, before: Snapshot) -> None:
        """Leave the weights alone, name the samples, and give up when it happens too often."""
        self.backend.zero_grad()
        self.state.skipped += 1
        after = self.random.snapshot()
        self.random.rewind(before)
        with self.random.active():
            mine = find_culprits(self.module, self.role, loaded.micro_batches, self.backend, self._autocast)
        self.random.rewind(after)
        culprits = {name: why for part in self.backend.exchange(mine) for name, why in part.items()}
        named = "; ".join(f"{name}: {why}" for name, why in sorted(culprits.items())) or (
            "no single sample; the sum of the batch overflowed"
        )
        now = time.time()
        events.emit("non_finite", now, now, step=loaded.step, samples=sorted(culprits))
        if self.backend.rank == 0:
            self.hooks.metrics(loaded.step + 1, "train", {"skipped_steps": float(self.state.skipped)})
            _log.warning(f"step {loaded.step}: loss or gradient is not finite, step skipped ({named})")
        if self.state.skipped > self.config.max_skipped_steps:
            raise NonFiniteError(
                f"step {loaded.step}: loss or gradient is not finite for the {self.state.skipped}. time, "
                f"trainer.max_skipped_steps allows {self.config.max_skipped_steps}. Samples: {named}. "
                "Look at them with `loom3d data show`, leave them out with data.quarantine, or lower trainer.lr"
            )

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
        step, config = self.state.step, self.config
        last = step >= config.steps
        if last or step % config.log_every == 0:
            self._log()
        best = False
        if self.hooks.validate is not None and (last or _due(step, config.validate_every)):
            best = self._validate()
            self._interval.began = time.perf_counter()
        if last or best or _due(step, config.checkpoint_every):
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
        """Run the validation hook on the averaged weights; returns whether the result is the best so far."""
        assert self.hooks.validate is not None
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


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``; other columns as they are."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def weighted(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The loss that is minimised, from its terms."""
    return float(sum(weights[term] * value for term, value in terms.items()))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
