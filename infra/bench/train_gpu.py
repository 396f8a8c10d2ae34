"""``make bench NAME=train_gpu``: training steps on a GPU, one JSON object a case: time, tokens/s, TFLOP/s, MFU, memory.

A case is one role of a recipe on one device. The step is the training loop's own (forward, backward, clip, optimiser)
on micro-batches of noise in the shapes that ``loom3d plan`` assumes, with random weights made on the device. What other
roles would send, and the gradients that they would give back, is noise too. The model's FLOPs and the memory beside
the measured peak are the plan's.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.bridge.link import Alone, Micro

if TYPE_CHECKING:
    from torch import Tensor

    from actors.preflight.roles import RoleCost, Traced
    from actors.recipes import Recipe
    from actors.trainers.loop import TrainLoop
    from configs.schema import RunConfig
    from services.streams.loader import LoadedMicroBatch

PEAKS: Mapping[str, float] = {
    r"H100(?!.*(PCIe|NVL))|(?<!G)H200(?!.*NVL)": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"RTX 4090(?! D| Laptop)": 165e12,
}
"""Pattern in a device's name -> published dense bfloat16 FLOP/s."""

PATCHES = "patch tokens of the pictures"
TEXT = "tokens that the language model reads, those of pictures and rays among them"
LATENTS = "positions of the noised latents"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A role of a recipe, at any size."""

    recipe: str
    role: str
    tokens: str
    """What is counted as tokens."""
    column: str
    """The column of a batch in which they are."""
    channels: int | None = -1
    """The axis that a token's numbers are on; None where a token is a number."""
    overrides: tuple[str, ...] = ()
    paper: tuple[str, ...] = ()
    """More of them for ``size=paper``: of its batch the share of one of eight workers, where all is for a cluster."""

    def named(self, size: str) -> str:
        """Name of its line."""
        return f"{self.recipe}-{size}/{self.role}"


_QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
_SEVEN = ("encoder=[qwen-vision-7b,spa3r-paper]", "model.name=spa3-vlm-7b", f"model.init.language={_QWEN}",
          f"data.text.tokenizer={_QWEN}", "trainer.micro_batch=1")  # fmt: skip
_EIGHTH = ("trainer.micro_batch=8",)
_LORA = ("peft=lora",)
CASES = (
    Case(recipe="uniugg_encoder", role="trainer", tokens=PATCHES, column="teacher_tokens"),
    Case(recipe="uniugg_align", role="llm", tokens=TEXT, column="input_ids", channels=None, paper=_EIGHTH),
    Case(recipe="uniugg_joint", role="llm", tokens=TEXT, column="input_ids", channels=None, paper=_EIGHTH),
    Case(recipe="uniugg_joint", role="diffusion", tokens=LATENTS, column="mean", channels=1, paper=_EIGHTH),
    Case(recipe="spa3r_pretrain", role="trainer", tokens=PATCHES, column="tokens"),
    Case(recipe="spa3_vlm", role="vlm", tokens=TEXT, column="input_ids", channels=None, overrides=_LORA, paper=_SEVEN),
)


@dataclass(kw_only=True)
class Planned:
    """A case as ``plan`` sees it on one device."""

    config: RunConfig
    recipe: Recipe
    """Without weights to start from."""
    traced: Traced
    cost: RoleCost
    settings: Mapping[str, Any]
    batches: Callable[[Any], list[LoadedMicroBatch]] = field(repr=False)
    """Module -> the micro-batches of a step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the lines; 1 where there is no GPU and none other was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run this case; may be repeated")
    parser.add_argument("--size", default="paper", choices=("tiny", "small", "paper"))
    parser.add_argument("--warmup", type=int, default=2, help="steps before those that count")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peak", type=float, help="the device's dense bfloat16 FLOP/s, where its name is not known")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every case")
    parser.add_argument("--device", default="cuda", help="cpu runs too, for a look (--size tiny): no MFU, no memory")
    arguments = parser.parse_args(argv)
    names = [case.named(arguments.size) for case in CASES]
    if unknown := [name for name in arguments.only if name not in names]:
        parser.error(f"--only {unknown[0]}: no such case; there are: {', '.join(names)}")
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("train_gpu: there is no GPU here; nothing was measured", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for case, name in zip(CASES, names, strict=True):
            if not arguments.only or name in arguments.only:
                print(json.dumps({"name": name, **run(case, arguments, folder)}), flush=True)
    return 0


def run(case: Case, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The line of a case, without its name; where it does not fit on the device, the plan's estimate alone."""
    import torch

    from services.errors import NonFiniteError

    planned = plan_case(case, arguments, folder)
    on_gpu = arguments.device == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else arguments.device
    extra = {
        "flop": planned.cost.model_flops,
        "flop_recomputed": planned.cost.flops - planned.cost.model_flops,
        "model": planned.config.model.name,
        "precision": planned.config.trainer.precision,
        "peft": planned.config.peft.method,
        "micro_batches": dict(planned.cost.micro_batches),
        "samples": planned.cost.samples,
        "crossing": _crossing(planned, case.role),
        "device": device,
        "torch": torch.__version__,
    }
    line: dict[str, Any] = {"value": None, "unit": "ms", "plan_gib": _gib(planned.cost.peak), "fits": True}
    try:
        seconds, peak, tokens = _measure(planned, case, arguments)
    except (torch.OutOfMemoryError, NonFiniteError) as error:
        line |= {"fits": isinstance(error, NonFiniteError), "said": str(error).partition(". ")[0], "extra": extra}
    else:
        flops = device_peak(device, arguments.peak) if planned.config.trainer.precision == "bfloat16" else None
        line |= {
            "value": round(seconds * 1e3, 2),
            "tokens_per_s": round(tokens / seconds, 1),
            "tokens": case.tokens,
            "tflops": round(planned.cost.model_flops / seconds / 1e12, 4),
            "mfu": mfu(planned.cost.model_flops, seconds, flops),
            "gib": _gib(peak) if peak else None,
            "gib_over_plan": round(peak / planned.cost.peak, 3) if peak else None,
            "extra": {**extra, "tokens": tokens, "steps": arguments.steps},
        }
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return line


def device_peak(name: str, given: float | None = None) -> float | None:
    """Dense bfloat16 FLOP/s of a device: what was given, or what is published for its name; None where unknown."""
    if given is not None:
        return given
    found = [peak for pattern, peak in PEAKS.items() if re.search(pattern, name)]
    return found[0] if found and "MIG" not in name else None


def mfu(flops: float, seconds: float, peak: float | None) -> float | None:
    """Share of ``peak`` FLOP/s that a step of ``flops`` model FLOPs reaches; None where the peak is not known."""
    return round(flops / (seconds * peak), 4) if peak else None


def plan_case(case: Case, arguments: argparse.Namespace, folder: str) -> Planned:
    """What ``loom3d plan`` knows of a case, without memory, and how its step's micro-batches are made."""
    import configs
    from actors.preflight.encoders import encoder_costs
    from actors.preflight.estimate import ragged_lengths
    from actors.preflight.roles import role_columns, trace_roles, without_weights
    from actors.preflight.sizes import data_sizes
    from actors.recipes import open_recipe
    from actors.recipes.base import Facts
    from configs.roles import ROLES, role_config

    on_gpu = arguments.device == "cuda"
    overrides = [f"recipe={case.recipe}", f"size={arguments.size}", f"storage.root={folder}", "backend=single"]
    overrides += ["trainer.max_skipped_steps=0"]  # a step that is left out takes another time
    overrides += [f"cluster.roles.{role}.num_gpus={int(on_gpu)}" for role in ROLES[case.recipe]]
    overrides += [*case.overrides, *(case.paper if arguments.size == "paper" else ()), *arguments.set]
    config = configs.load(overrides)
    encoders, data = encoder_costs(config), data_sizes(config)
    lengths, classes = ragged_lengths(config, encoders, data), max(size.classes for size in data) or 1
    traced = trace_roles(config, encoders, classes, lengths)[case.role]
    facts = Facts(outputs=lambda name: encoders[name].outputs, classes=classes, assume=True)
    own = role_config(config, case.role)
    columns = role_columns(own, case.role, facts)
    return Planned(
        config=own,
        recipe=without_weights(open_recipe(config)),
        traced=traced,
        cost=traced.on(own.backend, 1, accelerated=on_gpu),
        settings=open_recipe(config).describe(case.role, facts),
        batches=lambda module: _micro_batches(own, traced, columns, lengths, module, pinned=on_gpu),
    )


def _measure(planned: Planned, case: Case, arguments: argparse.Namespace) -> tuple[float, int, int]:
    """Median seconds of a step, peak bytes (0 but on a GPU), and tokens of a step."""
    import torch

    from services.streams.loader import LoadedStep

    on_gpu = arguments.device == "cuda"
    loop, micro_batches = _start(planned, case, arguments.device)
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    samples = []
    for _ in range(arguments.warmup + arguments.steps):
        loaded = LoadedStep(step=loop.state.step, epoch=0, micro_batches=micro_batches)
        start = time.perf_counter()
        loop.train_step(loaded)
        if on_gpu:
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    counted = [micro.batch[case.column] for micro in micro_batches]
    tokens = sum(t.numel() // (1 if case.channels is None else t.shape[case.channels]) for t in counted)
    return statistics.median(samples[arguments.warmup :]), peak, tokens


def _start(planned: Planned, case: Case, device: str) -> tuple[TrainLoop, list[LoadedMicroBatch]]:
    """The loop of the role with random weights made on the device, and a step's micro-batches."""
    import torch

    from actors.trainers.backends.single import SingleBackend
    from actors.trainers.roles import make_loop

    with torch.device(device):
        built = planned.recipe.rebuild(case.role, planned.settings)
    micro_batches = planned.batches(built.module)
    backend = SingleBackend(device)
    loop = make_loop(planned.config, planned.recipe, built, backend, None)
    loop.link = Others(backend, planned, case.role)
    loop.module.train()
    return loop, micro_batches


def _micro_batches(
    config: RunConfig, traced: Traced, columns: Mapping[str, Any], lengths: Any, module: Any, *, pinned: bool
) -> list[LoadedMicroBatch]:
    """A step's, in host memory as a loader gives them; those of a kind share their tensors."""
    from actors.preflight.batches import fake_batch
    from services.streams.loader import LoadedMicroBatch
    from services.streams.plan import micro_batch_kinds

    made = {kind: _noisy(fake_batch(kind, columns[kind], traced.samples, lengths, module)) for kind in traced.kinds}
    if pinned:
        made = {
            kind: {name: value.pin_memory() if hasattr(value, "pin_memory") else value for name, value in batch.items()}
            for kind, batch in made.items()
        }
    kinds = enumerate(micro_batch_kinds(config.recipe.quotas, config.trainer.accumulation))
    return [
        LoadedMicroBatch(index=index, kind=kind, batch=made[kind], samples=(), weights=(1.0,) * traced.samples)
        for index, kind in kinds
        if kind in made
    ]


def _noisy(batch: dict[str, Any]) -> dict[str, Any]:
    """Noise for features and pictures, matches between pixels that exist; the time of kernels depends on values."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or name in ("depth", "K", "pose", "input_ids", "segments", "weight"):
            continue
        if value.dtype == torch.uint8:
            value.random_(0, 256, generator=generator)
        elif name == "matches":
            rows, columns = batch["image"].shape[2:4]
            value.random_(0, rows * columns, generator=generator)
        elif name == "match_valid":
            value.fill_(True)
        elif value.is_floating_point():
            value.normal_(generator=generator)
    return batch


class Others(Alone):
    """The roles on the other ends of the edges: noise arrives, and noise comes back for what is sent."""

    def __init__(self, backend: Any, planned: Planned, role: str) -> None:
        super().__init__(backend)
        import torch

        edges = planned.recipe.edges
        self._learns = {tensor.name: tensor.gradient for edge in edges for tensor in edge.tensors}
        self._returns = {kind for edge in edges if edge.source == role for kind in edge.kinds}
        self._arrives = {
            kind: {name: torch.randn(t.shape, dtype=t.dtype, device=backend.device) for name, t in tensors.items()}
            for kind, tensors in planned.traced.arrives.items()
        }
        self._sent: dict[int, Mapping[str, Tensor]] = {}

    def receive(self, micro: Micro, *, gradients: bool = True) -> dict[str, Tensor]:
        """Noise in the shapes that the plan found."""
        came = self._arrives.get(micro.kind, {})
        return {n: t.detach().requires_grad_(gradients and self._learns.get(n, False)) for n, t in came.items()}

    def send(self, micro: Micro, tensors: Mapping[str, Tensor], *, gradients: bool = True) -> None:
        """Kept until its gradient is asked for."""
        if gradients and micro.kind in self._returns:
            self._sent[micro.index] = tensors

    def gradients(self, micro: Micro) -> list[tuple[Tensor, Tensor]]:
        """Small noise."""
        import torch

        sent = self._sent.pop(micro.index, {})
        return [(t, 1e-3 * torch.randn_like(t)) for name, t in sent.items() if self._learns.get(name)]


def _crossing(planned: Planned, role: str) -> dict[str, list[str]]:
    """What is noise in the place of another role: tensors that would come, and gradients that would come back."""
    edges = planned.recipe.edges
    comes = [t.name for edge in edges if edge.target == role for t in edge.tensors]
    back = [t.name for edge in edges if edge.source == role for t in edge.tensors if t.gradient]
    return {"synthetic_activations": comes, "synthetic_gradients": back}


def _gib(size: float) -> float:
    return round(size / 2**30, 3)


if __name__ == "__main__":
    sys.exit(main())
