"""``joint_overlap``: a joint step split over two processes with one core each, beside what the longer role needs alone.

Both processes run the training loop with UniUGG's roles on batches of noise, joined by the process group's link. Alone,
a role runs the same loop on the same batches, with what came from the other one in an earlier step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.bridge.link import Alone, Link, Micro
from actors.bridge.schedule import Op
from infra.bench.harness import Bench, Context, Measured, Target
from infra.bench.joint_peers import ROLES, Peers

GENERATION, CONVERSATION = "generation", "conversation"
IMAGE, RAY = 261, 264
"""Placeholders of the tiny vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Networks and batches of a step."""

    grid: int = 7
    micro_batch: int = 2
    pairs: int = 6
    """Micro-batches of each kind in a step; they alternate."""
    text: int = 64
    """Tokens of a question and its answer."""
    width: int = 256
    layers: int = 3
    channels: tuple[int, ...] = (96, 192)
    steps: int = 3
    """Steps of one figure."""


FULL = Size()
QUICK = Size(grid=3, micro_batch=2, pairs=2, text=8, width=32, layers=1, channels=(32, 32), steps=1)


class RoleEnd:
    """One role with its training loop, joined with the other one or alone."""

    def __init__(self, role: str, address: str, settings: dict[str, Any]) -> None:
        import torch

        from actors.bridge.rendezvous import connect
        from actors.trainers.backends.single import SingleBackend
        from actors.trainers.loop import TrainLoop
        from configs.schema import RunConfig, TrainerConfig

        self.size: Size = settings["size"]
        torch.manual_seed(0)
        module, spec, edges = _build(role, self.size)
        self.backend = SingleBackend()
        link = connect(
            RunConfig(),
            role=role,
            rank=0,
            world_size=1,
            roles=ROLES,
            edges=edges,
            address=address,
            generation=0,
            backend=self.backend,
        )
        self.link = _Recorder(link)
        self.loop = TrainLoop(
            module=module.train(),
            role=spec,
            config=TrainerConfig(steps=10_000, lr=1e-4),
            backend=self.backend,
            loss_weights={"ce": 1.0, "noise": 1.0},
            seed=0,
            link=self.link,
        )
        self.micro_batches = _micro_batches(self.size)

    def joint(self) -> float:
        """Median seconds of a step with the other role."""
        self.loop.link = self.link
        return self._steps()

    def alone(self) -> float:
        """Median seconds of a step with what the last joint one brought."""
        self.loop.link = _Replay(self.backend, self.link)
        return self._steps()

    def _steps(self) -> float:
        from services.streams.loader import LoadedStep

        took = []
        for _ in range(self.size.steps):
            loaded = LoadedStep(step=self.loop.state.step, epoch=0, micro_batches=self.micro_batches)
            began = time.perf_counter()
            self.loop.train_step(loaded)
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    def parameters(self) -> int:
        """Of this role."""
        return sum(parameter.numel() for parameter in self.loop.module.parameters())


class _Recorder:
    """A link that keeps what came in the last step, by micro-batch. Otherwise it is the link."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.received: dict[int, dict[str, Any]] = {}
        self.gradients_of: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def receive(self, micro: Micro, *, gradients: bool = True) -> dict[str, Any]:
        """What came, copied once: its memory is received into again."""
        came = self.link.receive(micro, gradients=gradients)
        if came and micro.index not in self.received:
            self.received[micro.index] = {name: tensor.detach().clone() for name, tensor in came.items()}
        return came

    def gradients(self, micro: Micro) -> list[Any]:
        """What came back, copied once."""
        edges = self.link.gradients(micro)
        if edges and micro.index not in self.gradients_of:
            ((_, gradient),) = edges
            self.gradients_of[micro.index] = gradient.clone()
        return edges


class _Replay(Alone):
    """The other role's part from a record, in the order of the joint step."""

    def __init__(self, backend: Any, record: _Recorder) -> None:
        super().__init__(backend)
        self._record = record
        self._left: dict[int, Any] = {}

    def ops(self, kinds: Sequence[str]) -> tuple[Op, ...]:
        return self._record.link.ops(kinds)

    def send(self, micro: Micro, tensors: Mapping[str, Any], *, gradients: bool = True) -> None:  # noqa: ARG002
        if tensors:
            self._left[micro.index] = tensors["condition"]

    def receive(self, micro: Micro, *, gradients: bool = True) -> dict[str, Any]:  # noqa: ARG002
        came = self._record.received.get(micro.index, {})
        return {name: tensor.detach().requires_grad_(name == "condition") for name, tensor in came.items()}

    def gradients(self, micro: Micro) -> list[Any]:
        if micro.index not in self._left:
            return []
        return [(self._left.pop(micro.index), self._record.gradients_of[micro.index])]


def _build(role: str, size: Size) -> tuple[Any, Any, Any]:
    """Module, its RoleSpec with the objective, and the edges of the model."""
    import models
    from models.registry import spec
    from models.uniugg.objectives import DiffusionObjective, LanguageObjective

    whole = spec("uniugg-tiny")
    if role == "llm":
        language = {
            **spec("uniugg-llm-tiny").defaults["language"],
            "hidden_size": size.width,
            "intermediate_size": 3 * size.width,
            "num_hidden_layers": size.layers,
        }
        module = models.build("uniugg-llm-tiny", language=language, grid=(size.grid, size.grid))
        return module, whole.role(role).bind(objective=LanguageObjective(translation_scale="metres")), whole.edges
    unet = {**spec("uniugg-unet-tiny").defaults["unet"], "block_out_channels": size.channels}
    objective = DiffusionObjective(latent="sample", condition_dropout=0.1, min_snr=0.0, offset_noise=0.0)
    return (
        models.build("uniugg-unet-tiny", width=size.width, unet=unet),
        whole.role(role).bind(objective=objective),
        whole.edges,
    )


def _micro_batches(size: Size) -> list[Any]:
    """A step's micro-batches, generation and conversation in turns; the same for both roles."""
    import torch

    from services.contracts import PlanSample
    from services.streams.loader import LoadedMicroBatch

    made = []
    generator = torch.Generator().manual_seed(0)
    for index in range(2 * size.pairs):
        kind = (GENERATION, CONVERSATION)[index % 2]
        names = [f"noise/{index}#{place}" for place in range(size.micro_batch)]
        batch = (_generation if kind == GENERATION else _conversation)(size, generator)
        common = {"kind": kind, "id": names, "weight": torch.ones(size.micro_batch)}
        samples = tuple(PlanSample(id=n, source="noise", item=n, kind=kind, views=(), seed=0) for n in names)
        made.append(
            LoadedMicroBatch(
                index=index,
                kind=kind,
                batch={**common, "draw": torch.arange(size.micro_batch) + 1000 * index, **batch},
                samples=samples,
                weights=(1.0,) * size.micro_batch,
            )
        )
    return made


def _generation(size: Size, generator: Any) -> dict[str, Any]:
    import torch

    number, patches, side = size.micro_batch, size.grid**2, 16 * size.grid
    ids = [5, *[IMAGE] * patches, 6, *[RAY] * patches, 7]
    pose = torch.eye(4).repeat(number, 2, 1, 1)
    pose[:, 1, :3, 3] = torch.randn(number, 3, generator=generator) * 0.3
    K = torch.tensor([[0.9 * side, 0.0, (side - 1) / 2], [0.0, 0.9 * side, (side - 1) / 2], [0.0, 0.0, 1.0]])
    latent = (number, 4, 2 * size.grid, 2 * size.grid)
    return {
        "tokens": torch.randn(number, 1, size.grid, size.grid, 96, generator=generator),
        "mean": torch.randn(latent, generator=generator),
        "logvar": torch.randn(latent, generator=generator) - 2,
        "K": K.repeat(number, 2, 1, 1),
        "pose": pose,
        "input_ids": torch.tensor(ids).repeat(number, 1),
        "supervised": torch.zeros(number, len(ids), dtype=torch.bool),
    }


def _conversation(size: Size, generator: Any) -> dict[str, Any]:
    import torch

    number, patches = size.micro_batch, size.grid**2
    text = torch.randint(20, 250, (number, size.text), generator=generator)
    ids = torch.cat([torch.full((number, patches), IMAGE), text], dim=1)
    supervised = torch.zeros(ids.shape, dtype=torch.bool)
    supervised[:, -size.text // 2 :] = True
    return {
        "tokens": torch.randn(number, 1, 1, size.grid, size.grid, 96, generator=generator),
        "tokens_lengths": torch.ones(number, 1, dtype=torch.int64),
        "input_ids": ids,
        "input_ids_lengths": torch.full((number, 1), ids.shape[1]),
        "supervised": supervised,
    }


def prepare_overlap(context: Context) -> Measured:
    """Seconds of a joint step; the baseline is the longer of both roles, one after the other, each on its core."""
    size = QUICK if context.quick else FULL
    peers = context.cleanup.enter_context(Peers(RoleEnd, {"size": size}, pinned=True))
    alone: dict[str, list[float]] = {role: [] for role in ROLES}

    def ideal() -> float:
        took = {role: float(peers.call("alone", roles=(role,))[role]) for role in ROLES}
        for role, seconds in took.items():
            alone[role].append(seconds)
        return max(took.values())

    def extra() -> dict[str, Any]:
        return {
            "alone_s": {role: round(statistics.median(seconds), 4) for role, seconds in alone.items()},
            "parameters": peers.call("parameters"),
            "micro_batches": 2 * size.pairs,
            "samples": size.micro_batch,
        }

    return Measured(value=lambda: max(peers.call("joint").values()), baseline=ideal, extra=extra)


TABLE = [
    Bench(name="joint_overlap", unit="s", target=Target(on="ratio", op="<=", limit=1.25), prepare=prepare_overlap),
]
