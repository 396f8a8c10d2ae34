"""The plan of a run: what it needs, where it goes, how long it takes, and whether it fits. Nothing is started."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from actors.preflight.encoders import EncoderCost
from actors.preflight.roles import RoleCost
from actors.preflight.sizes import DataSize


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """One worker group: its size, what each worker asks for, where each goes, and the memory of one."""

    role: str
    workers: int
    asks: dict[str, float]
    nodes: tuple[str, ...]
    """Node of each worker; empty where they do not fit, or without Ray."""
    host_bytes: int
    device_bytes: int
    """0 for a role without GPUs."""


@dataclass(frozen=True, kw_only=True)
class NodePlan:
    """One machine, and the memory that the workers placed on it are expected to use."""

    name: str
    offers: dict[str, float]
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, kw_only=True)
class EdgePlan:
    """What crosses between two roles in a step, all workers together."""

    source: str
    target: str
    tensors: tuple[str, ...]
    kinds: tuple[str, ...]
    forward_bytes: int
    backward_bytes: int
    """Gradients, which go the other way."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What the feature cache will hold and give."""

    mode: str
    encoders: dict[str, int]
    """Encoder -> records of all splits."""
    sizes: dict[str, int]
    """Encoder -> bytes of these records."""
    inputs: dict[str, float]
    """Encoder -> how many inputs of the size that its cost is of take as much work as making them all."""
    bytes: int
    """Of all records."""
    budget_bytes: int
    """0: no limit."""
    hit_rates: tuple[float, ...]
    """Expected share of look-ups that hit in epochs 1, 2 and 3, beginning with an empty cache."""

    @property
    def records(self) -> int:
        """Records of all encoders."""
        return sum(self.encoders.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes that will be on disk."""
        if self.mode == "never":
            return 0
        return min(self.bytes, self.budget_bytes) if self.budget_bytes else self.bytes


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps and time."""

    steps: int
    samples_per_step: int
    steps_per_epoch: int
    """0 where the size of the data is not known."""
    epochs: float
    encode_s: float
    """Of every feature once, over all replicas."""
    train_s: float
    """Computing all steps, without waiting for data."""
    role_s: dict[str, float]
    """Role -> seconds that it computes in all steps, at given rates."""
    read_s: float
    """Reading the features of all steps."""
    validate_s: float
    """Validation while training, and the last evaluation (a pass over each split)."""
    total_s: float
    """Encoding, reading and training run beside each other, so an epoch lasts as long as the slowest; then validation.

    Making data, starting processes and writing the report are left out."""
    bottlenecks: tuple[str, str]
    """Of the first epoch and of the later ones: encoding | reading | training (of
    several roles: training ROLE)."""
    rates: str
    """Where the rates come from."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One role on one backend, trained whole or with low-rank updates; the other roles as the run has them."""

    role: str
    peft: str
    backend: str
    offload: str
    trainable: int
    device_bytes: int
    """Of one worker on its GPU; 0 for a role without GPUs."""
    host_bytes: int
    """Of one worker."""
    room_bytes: int
    """Of the worker's share of a GPU; 0 where it has none, or its size is not known."""
    problems: tuple[str, ...]
    """Why it does not fit; empty where it does."""
    chosen: bool
    """Whether it is what the run has."""

    @property
    def fits(self) -> bool:
        """Whether GPUs and nodes have the memory."""
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that ``loom3d plan`` says."""

    name: str
    model: str
    roles: tuple[RolePlan, ...]
    nodes: tuple[NodePlan, ...]
    steps: dict[str, RoleCost]
    """Role -> cost of one worker's step."""
    samples: dict[str, int]
    """Role -> samples of one worker's micro-batch."""
    peaks: dict[str, int]
    """Role -> peak bytes of tensors of one worker."""
    edges: tuple[EdgePlan, ...]
    encoders: tuple[EncoderCost, ...]
    data: tuple[DataSize, ...]
    cache: CachePlan
    schedule: Schedule
    problems: tuple[str, ...] = ()
    """Why the run cannot start; empty when it can."""
    missing: tuple[str, ...] = ()
    """What the run starts from that is not on this machine. A plan may be made before; the run cannot start."""
    notes: tuple[str, ...] = ()
    strategies: tuple[Strategy, ...] = ()
    """Where they were asked for."""

    @property
    def fits(self) -> bool:
        """Whether the run can start."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; unlimited resources are left out."""
        tree = dataclasses.asdict(self)
        tree["fits"] = self.fits
        tree["cache"] |= {"records": self.cache.records, "stored_bytes": self.cache.stored_bytes}
        for role, cost in self.steps.items():
            tree["steps"][role] |= {"trainable": cost.trainable, "frozen": cost.frozen, "flops": cost.flops}
        for strategy, found in zip(tree["strategies"], self.strategies, strict=True):
            strategy["fits"] = found.fits
        for node in tree["nodes"]:
            node["offers"] = {k: v for k, v in node["offers"].items() if v != float("inf")}
        return tree
