"""The loop and its checkpoints over every backend: averaging, skipping, and resuming on another backend and world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.trainers.backends import make_backend
from actors.trainers.checkpoint import Checkpoints, Identity, resume
from actors.trainers.tensors import whole
from configs import ConfigError
from configs.schema import BackendConfig, TrainerConfig
from tests.support.backend_ranks import ROLE, TwoHeads, in_ranks
from tests.support.toy_role import toy_loop, toy_step_of

IDENTITY = Identity(settings={"trainer.lr": 0.05}, plan="p" * 64)
GROUPS = [("ddp", "fsdp2"), ("zero2", "zero3")]
SAVED_AT, END, NAN_AT = 3, 5, 6


def a_loop(name: str, average: bool = True, **settings: Any) -> Any:
    """A toy loop on backend ``name``; the average is kept where it can be."""
    backend = make_backend(BackendConfig(name=name, persistence_threshold=0), "cpu")
    return toy_loop(
        backend=backend,
        shift=backend.rank,
        weight_decay=0.1,
        ema=0.9 if average and name != "zero3" else 0.0,
        lr_scale={"head.*": 0.5},
        **settings,
    )


def a_step(loop: Any, step: int) -> None:
    backend = loop.backend
    loop.train_step(toy_step_of(step, micro_batches=2, rank=backend.rank, world=backend.world_size))


def everything(loop: Any) -> dict[str, torch.Tensor]:
    state = {f"w/{k}": v for k, v in loop.backend.weights().items()}
    state |= {f"o/{k}": v for k, v in loop.backend.optimizer_state().items()}
    if loop.average is not None:
        averaged = whole(loop.average.weights, keep=loop.backend.rank == 0)
        state |= {f"e/{k}": v for k, v in averaged.items()}
    return state


def train_and_save(names: Sequence[str], folder: str) -> dict[str, Any]:
    """Five steps with each backend, a checkpoint after the third; then a step with a NaN on the last rank only.

    Weights and moments are on rank 0 alone.
    """
    found: dict[str, Any] = {}
    for name in names:
        loop = a_loop(name)
        checkpoints = Checkpoints(Path(folder) / name, IDENTITY, keep=2)
        for step in range(END):
            a_step(loop, step)
            if step + 1 == SAVED_AT:
                checkpoints.save(loop, best=False)
                found[f"{name}/saved"] = everything(loop)
        found[f"{name}/end"] = everything(loop)
        loop.state.step = NAN_AT
        bad = toy_step_of(NAN_AT, micro_batches=2, rank=loop.backend.rank, world=loop.backend.world_size)
        if loop.backend.rank == loop.backend.world_size - 1:
            bad.micro_batches[1].batch["x"][1, 0] = float("nan")
        loop.train_step(bad)
        found[f"{name}/skipped"] = {"count": torch.tensor(loop.state.skipped)} | everything(loop)
        a_step(loop, NAN_AT + 1)
        found[f"{name}/after"] = everything(loop)
        rounded = a_loop(name, precision="bfloat16")
        for step in range(2):
            a_step(rounded, step)
        found[f"{name}/bfloat16"] = rounded.backend.weights()
    return found


def resume_and_train(names: Sequence[str], folder: str, average: bool = True) -> dict[str, Any]:
    """What is in the checkpoint ``folder``, and the steps that follow, on other backends."""
    found: dict[str, Any] = {}
    for name in names:
        loop = a_loop(name, average)
        at = Checkpoints(Path(folder), IDENTITY, keep=2).at(SAVED_AT)
        resume(loop, at)
        found[f"{name}/resumed"] = everything(loop)
        for step in range(SAVED_AT, END):
            a_step(loop, step)
        found[f"{name}/end"] = everything(loop)
    return found


def assert_equal(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], exact: bool = False, rtol: float = 2e-5
) -> None:
    """The same tensors; ZeRO-3 keeps no average, so only what both have of it."""
    names = {n for n in theirs if not n.startswith("e/")} | ({n for n in ours if n.startswith("e/")} & theirs.keys())
    assert {n for n in ours if not n.startswith("e/")} == {n for n in theirs if not n.startswith("e/")}
    for name in names:
        close = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": rtol, "atol": rtol / 10}
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, at=name: f"{at}: {text}", **close)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process without a backend that communicates: what the others must come to."""
    folder = tmp_path_factory.mktemp("alone")
    return {"folder": folder / "single", **train_and_save(["single"], str(folder))}


@pytest.mark.parametrize("names", GROUPS, ids="+".join)
def test_two_ranks_train_skip_save_and_resume_as_one_process(
    names: tuple[str, ...], alone: dict[str, Any], tmp_path: Path
) -> None:
    ranks = in_ranks(_train_then_resume, tmp_path / "ranks", 2, names, str(tmp_path), str(alone["folder"]))
    for name in names:
        first = ranks[0]
        assert_equal(first[f"{name}/saved"], alone["single/saved"])
        assert_equal(first[f"{name}/end"], alone["single/end"])
        # Nothing moved in the step with a NaN on one rank, and the next step is as if it had not been.
        assert [int(rank[f"{name}/skipped"].pop("count")) for rank in ranks] == [1, 1]
        assert_equal(first[f"{name}/skipped"], first[f"{name}/end"], exact=True)
        assert_equal(first[f"{name}/after"], alone["single/after"])
        assert_equal(first[f"{name}/bfloat16"], alone["single/bfloat16"], rtol=2e-3)
        # A checkpoint of one process, taken up by two ranks.
        assert_equal(first[f"{name}/resumed"], alone["single/saved"], exact=True)
        assert_equal(first[f"{name}/end of resumed"], alone["single/end"])
        # A checkpoint of two ranks, taken up by one process.
        there = resume_and_train(["single"], str(tmp_path / name), average=name != "zero3")
        assert_equal(there["single/resumed"], ranks[0][f"{name}/saved"], exact=True)
        assert_equal(there["single/end"], alone["single/end"])


def _train_then_resume(names: Sequence[str], folder: str, other: str) -> dict[str, Any]:
    found = train_and_save(names, folder)
    resumed = resume_and_train(names, other)
    return found | {k.replace("/end", "/end of resumed"): v for k, v in resumed.items()}


def test_zero3_refuses_an_average_of_weights_that_no_rank_holds() -> None:
    from actors.trainers.backends.zero import ZeroBackend

    backend = ZeroBackend.__new__(ZeroBackend)
    backend.stage = 3
    with pytest.raises(ConfigError, match=r"trainer.ema=0.9: .*zero3.*backend=zero2 or backend=fsdp2"):
        backend.prepare(TwoHeads(), ROLE, TrainerConfig(ema=0.9))


def test_another_release_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    from actors.trainers.backends import zero

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(deepspeed, "__version__", "0.20.1")
    with pytest.raises(ConfigError, match=r"need DeepSpeed 0.19.x, 0.20.1 is installed.*backend=fsdp2"):
        zero._import(torch.device("cpu"))
