"""Micro-batches without pictures beside ranks that have some: equal collectives everywhere, the gradient of the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from actors.trainers.backends import make_backend
from actors.trainers.lora import apply_lora
from actors.trainers.recompute import checkpoint_activations
from configs.schema import BackendConfig, PeftConfig, TrainerConfig
from models.spa3r.vlm.spec import ROLE, step
from tests.support.backend_ranks import in_ranks
from tests.support.spa3_vlm import batch_of, sample, small_vlm

TRAINER = TrainerConfig(lr=0.01, clip_norm=0.0)
#: A collective that a backward pass of each makes (of ddp: the step itself).
MARKS = {"ddp": "allreduce", "fsdp2": "reduce_scatter", "zero2": "reduce", "zero3": "allgather"}
#: By step, for each of two ranks, which of its micro-batches have pictures.
SEEN = [((False, True), (True, False)), ((True,), (False,)), ((False,), (False,))]
GRIDS = [(2, 3), (1, 2)]


class Collectives(TorchDispatchMode):
    """Names and sizes of the collective operations within the block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            flat = torch.utils._pytree.tree_leaves(args)
            sizes = [tuple(value.shape) for value in flat if isinstance(value, Tensor)]
            self.seen.append(f"{func} {sizes}")
        return func(*args, **(kwargs or {}))


def a_batch(kind: str, pictures: bool, seed: int) -> dict[str, Any]:
    """Two samples; of those without pictures the columns are as the streams make them, empty."""
    if pictures:
        frames = [*GRIDS, (1, 5)] if kind == "append" else GRIDS
        return batch_of([sample(frames, seed=seed), sample(frames, seed=seed + 1)], [GRIDS, GRIDS], seed)
    texts = [sample([], seed=seed), sample([], seed=seed + 1)]
    batch = batch_of(texts, [[], []], seed)
    latents = batch.pop("latents")
    if seed % 2:  # what a ragged column is when no sample of the micro-batch has any
        return batch | {"latents": latents[:, :0], "latents_lengths": torch.zeros(2, dtype=torch.long)}
    return batch


def a_model(case: str) -> Any:
    kind, tuning = case.split("/")
    model = small_vlm(adapter={"kind": kind})
    torch.manual_seed(1)
    if kind == "cross":
        torch.nn.init.normal_(model.adapter.mlp.fc2.weight, std=0.1)
    if tuning == "lora":
        apply_lora(model, ROLE, PeftConfig(method="lora", rank=2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # updates that begin at zero would hide gradients of the first factors
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def train(name: str, case: str) -> dict[str, Any]:
    """Three steps on this rank (in one process: on the micro-batches of both); weights, norms and collectives."""
    backend = make_backend(BackendConfig(name=name, persistence_threshold=0), "cpu")
    module = a_model(case)
    checkpoint_activations(module, ROLE)
    module = backend.prepare(module, ROLE, TRAINER).train()
    norms, losses = [], []
    with Collectives() as collectives:
        for number, ranks in enumerate(SEEN):
            backend.zero_grad()
            total = torch.zeros(1, dtype=torch.float64)
            for rank, micro_batches in enumerate(ranks):
                if backend.world_size > 1 and rank != backend.rank:
                    continue
                for index, pictures in enumerate(micro_batches):
                    batch = a_batch(case.split("/")[0], pictures, 10 * number + 2 * rank + index)
                    loss = step(module, batch, {}).sums["ce"] / 10
                    backend.backward(loss)
                    total += loss.detach().double()
            total, norm = backend.reduce(total)
            backend.update(TRAINER.lr, norm, TRAINER.clip_norm)
            norms.append(float(norm))
            losses.append(float(total))
    return {"weights": backend.weights(), "norms": norms, "losses": losses, "collectives": collectives.seen}


def train_all(names: Sequence[str], cases: Sequence[str]) -> dict[str, Any]:
    return {f"{name} {case}": train(name, case) for name in names for case in cases}


def assert_as_in_one_process(ranks: list[dict[str, Any]], names: Sequence[str], cases: Sequence[str]) -> None:
    for case in cases:
        expected = train("single", case)
        for name in names:
            first, second = (rank[f"{name} {case}"] for rank in ranks)
            assert first["collectives"] == second["collectives"], f"{name} {case}: the ranks disagree on what they sum"
            assert any(MARKS[name] in seen for seen in first["collectives"]), "collectives of backward passes are seen"
            assert first["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            assert first["norms"] == pytest.approx(expected["norms"], rel=1e-4)
            assert first["weights"].keys() == expected["weights"].keys()
            for parameter, value in expected["weights"].items():
                near = (first["weights"][parameter] - value).abs()
                # Of a bias of keys the gradient is rounding errors, of which AdamW makes steps of the whole rate.
                limit = 3.1 * TRAINER.lr if parameter.endswith("key.bias") else 0.05 * TRAINER.lr
                assert float(near.max()) < limit, f"{name} {case} {parameter}"


def test_ranks_without_pictures_do_what_the_others_do(tmp_path: Path) -> None:
    names, cases = ("ddp", "fsdp2"), ("cross/full", "cross/lora", "append/full")
    assert_as_in_one_process(in_ranks(train_all, tmp_path, 2, names, cases, timeout=100), names, cases)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_without_pictures_do_what_the_others_do_with_zero(tmp_path: Path) -> None:
    names, cases = ("zero2", "zero3"), ("cross/full", "cross/lora", "append/full")
    assert_as_in_one_process(in_ranks(train_all, tmp_path, 2, names, cases, timeout=200), names, cases)


def test_a_rank_that_never_has_pictures_moves_the_adapter_like_the_others() -> None:
    """Without a weight of zero the text-only micro-batch would leave the adapter without a gradient."""
    model = a_model("cross/full")
    loss = step(model, a_batch("cross", False, 0), {}).sums["ce"]
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
    assert all(not p.grad.any() for p in model.adapter.parameters())
