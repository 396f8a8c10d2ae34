"""The same role inside Ray Train workers: bit for bit what one process gives."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from actors import driver
from services.errors import NonFiniteError
from services.telemetry import events
from tests.support.probe_runs import losses, small_run

pytestmark = pytest.mark.ray


def ray_run(folder: Path, *overrides: str) -> driver.RunResult:
    return driver.train(small_run(folder, "cluster=local", "backend=ddp", "cluster.max_failures=0", *overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def inline(folder: Path) -> driver.RunResult:
    return driver.train(small_run(folder, "name=inline"))


@pytest.mark.usefixtures("ray_cluster")
def test_one_worker_is_bit_identical_to_inline(folder: Path, inline: driver.RunResult) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    split = ray_run(folder, "name=one")
    assert signal.getsignal(signal.SIGINT) is interrupt  # Ctrl-C is ours again while evaluating
    assert losses(split.folder) == losses(inline.folder)
    assert split.metrics == inline.metrics
    assert {path.stem for path in (split.folder / "events").glob("*.jsonl")} >= {"driver", "trainer-0"}
    assert split.report.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero2"])
def test_two_workers_agree_with_inline(folder: Path, inline: driver.RunResult, backend: str) -> None:
    split = ray_run(folder, f"name=two-{backend}", "cluster.roles.trainer.workers=[2]", f"backend={backend}")
    ours, theirs = losses(split.folder), losses(inline.folder)
    assert ours.keys() == theirs.keys()
    for step, terms in theirs.items():
        assert ours[step] == pytest.approx(terms, rel=1e-5), step
    for name, row in inline.metrics.items():
        assert split.metrics[name]["value"] == pytest.approx(row["value"], rel=1e-3, abs=1e-3), name


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_user_error_of_a_worker_arrives_as_itself(folder: Path) -> None:
    with pytest.raises(NonFiniteError, match="max_skipped_steps allows 0"):
        ray_run(
            folder, "name=diverged", "trainer.lr=1e30", "trainer.clip_norm=0", "trainer.max_skipped_steps=0",
            "cluster.max_failures=3",
        )  # fmt: skip
    found = events.read(folder / "storage" / "runs" / "diverged" / "events")
    assert sum(event["what"] == "non_finite" for event in found) == 1, "it is not tried again"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_is_replaced_and_the_losses_are_the_same(folder: Path) -> None:
    settings = ("trainer.steps=40", "trainer.checkpoint_every=5", "trainer.validate_every=0")
    undisturbed = driver.train(small_run(folder, "name=undisturbed", *settings))
    killed = threading.Event()
    metrics = folder / "storage" / "runs" / "killed" / "metrics.jsonl"

    def kill_after(step: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed.is_set():
            if metrics.exists() and metrics.read_text().count('"split": "train"') >= step:
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.set()
            time.sleep(0.02)

    killer = threading.Thread(target=kill_after, args=(12,))
    killer.start()
    survivor = ray_run(folder, "name=killed", "cluster.max_failures=2", *settings)
    killer.join()
    assert killed.is_set()
    assert survivor.resumed_from >= 10
    assert losses(survivor.folder) == losses(undisturbed.folder)
    assert survivor.metrics == undisturbed.metrics
