"""Spa3R's pre-training and Spa3-VLM on two ranks: the same losses, weights and moments as in one process.

The runs go the way of a real one, from the recipe's configuration through its streams to checkpoints. On ranks the
blocks are recomputed, in the one process they are not; a step has two micro-batches, some of them without pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.evaluate import load_trained, save_parts
from actors.recipes import open_recipe
from configs import RunConfig
from models.pretrained import load_pretrained
from services.features.encode import pin_weights
from tests.support.backend_ranks import in_ranks
from tests.support.spa3_ranks import losses, opened, spa3_run, train_each

RECIPES = ("spa3r_pretrain", "spa3_vlm")
TUNED = {
    "full": (),
    "lora": ("peft=lora", "peft.rank=2"),
    "dora": ("peft=lora", "peft.rank=3", "peft.alpha=3", "peft.dora=true"),
}
TARGETS = {"spa3r_pretrain": "peft.targets=[qkv,fc1]", "spa3_vlm": "peft.targets=[q_proj,down_proj]"}
"""Of the runs named dora; the others take the role's own."""
LAST = "checkpoints/step-00000003"


def run_of(folder: Path, recipe: str, tuning: str, backend: str = "single", offload: str = "none") -> RunConfig:
    """A run of one process, or of one of two ranks, where no weight is too small to be cut and blocks recompute."""
    settings = [f"name={recipe}-{tuning}-{backend}-{offload}", *TUNED[tuning], f"backend={backend}"]
    settings += [TARGETS[recipe]] if tuning == "dora" else []
    settings += ["trainer.activation_checkpointing=true"] if backend != "single" else []
    settings += [f"backend.offload={offload}"] if offload != "none" else []
    settings += ["backend.persistence_threshold=0"] if backend == "zero3" else []
    return spa3_run(folder, recipe, *settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spa3")


@pytest.fixture(scope="module")
def alone(root: Path) -> Callable[[str, str], Path]:
    """The folder of a run of one process, which is trained when it is asked for."""

    def trained(recipe: str, tuning: str) -> Path:
        config = run_of(root, recipe, tuning)
        if not (folder_of(config) / LAST).exists():
            train_each([config])
        return folder_of(config)

    return trained


def folder_of(config: RunConfig) -> Path:
    return Path(config.storage.root) / "runs" / config.name


def assert_two_ranks_give_what_one_gives(
    root: Path, alone: Callable[[str, str], Path], cases: Sequence[tuple[str, str, str, str]]
) -> None:
    """Train (recipe, tuning, backend, offload) on two ranks and compare each with one process."""
    expected = [alone(recipe, tuning) for recipe, tuning, _, _ in cases]
    runs = [run_of(root, *case) for case in cases]
    steps = in_ranks(train_each, root / "ranks" / runs[0].name, 2, runs, timeout=600)
    assert steps == [{run.name: 3.0 for run in runs}] * 2
    for run, folder in zip(runs, expected, strict=True):
        assert_same_training(folder_of(run), folder, run.trainer.lr)


def assert_same_training(ours: Path, theirs: Path, lr: float) -> None:
    """Losses, norms, weights and moments of two runs."""
    found, wanted = losses(ours), losses(theirs)
    assert list(found) == list(wanted) == [1, 2, 3]
    for step, terms in wanted.items():
        assert found[step] == pytest.approx(terms, rel=2e-5), (ours.name, step)
    assert wanted[1]["loss"] != pytest.approx(wanted[3]["loss"], rel=1e-3), "it trains"
    weights, others = load_file(ours / LAST / "weights.safetensors"), load_file(theirs / LAST / "weights.safetensors")
    assert weights.keys() == others.keys()
    for name, value in others.items():  # a step moves a weight by about the learning rate
        assert float((weights[name] - value).abs().max()) < 0.1 * lr, (ours.name, name)
    moments, known = (
        load_file(ours / LAST / "optimizer.safetensors"),
        load_file(theirs / LAST / "optimizer.safetensors"),
    )
    assert moments.keys() == known.keys()
    first = {name: value for name, value in known.items() if name.endswith("/exp_avg")}
    largest = max(float(value.abs().max()) for value in first.values())
    for name, value in first.items():
        if float(value.abs().max()) > 1e-8 * largest:  # a bias of keys has a gradient of rounding errors alone
            assert float((moments[name] - value).abs().max()) < 1e-3 * float(value.abs().max()), (ours.name, name)


def test_low_rank_updates_of_the_language_model(root: Path, alone: Callable[[str, str], Path]) -> None:
    assert_two_ranks_give_what_one_gives(root, alone, [("spa3_vlm", "lora", "fsdp2", "none")])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tuning_on_every_backend(
    recipe: str, backend: str, root: Path, alone: Callable[[str, str], Path]
) -> None:
    assert_two_ranks_give_what_one_gives(root, alone, [(recipe, tuning, backend, "none") for tuning in TUNED])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_lies_on_the_host(recipe: str, root: Path, alone: Callable[[str, str], Path]) -> None:
    offloads = [("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "parameters")]
    cases = [(recipe, tuning, *offload) for tuning in ("full", "lora") for offload in offloads]
    assert_two_ranks_give_what_one_gives(root, alone, cases)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_two_ranks_trained_beside_updates_is_saved_with_them(
    root: Path, alone: Callable[[str, str], Path], tmp_path: Path
) -> None:
    alone("spa3_vlm", "lora")  # its features are in the cache
    run = spa3_run(root, "spa3_vlm", *TUNED["lora"], "name=saved", "backend=zero3", "backend.persistence_threshold=0")
    in_ranks(train_each, tmp_path / "ranks", 2, [run])
    folder, pinned = folder_of(run), pin_weights(run)
    checkpoint = load_file(folder / LAST / "weights.safetensors")
    recipe = open_recipe(pinned)
    with opened(pinned) as feed:
        trained, step = load_trained(recipe, feed, folder)
        written = {path.name: path for path in save_parts(recipe, trained, folder, step)}
    assert step == 3
    beside = load_file(folder / "weights" / "llm-adapter" / "beside.safetensors")
    whole = {name: value for name, value in checkpoint.items() if name.startswith("adapter.")}
    assert beside.keys() == whole.keys()
    assert all(torch.equal(beside[name], value) for name, value in whole.items())
    assert all(bool(value.any()) for value in beside.values()), "the layer that begins at zero was trained"
    updates = load_file(folder / "weights" / "llm-adapter" / "adapter_model.safetensors")
    assert len(updates) == sum(".lora_" in name for name in checkpoint) > 0
    alone_adapter = load_pretrained(written["adapter"]).state_dict()
    assert all(torch.equal(value, whole[f"adapter.{name}"]) for name, value in alone_adapter.items())
    merged = load_pretrained(written["llm"]).state_dict()
    assert not any("lora" in name for name in merged)
