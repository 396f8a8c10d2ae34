"""Two roles in worker groups of their own: what they compute is what one process computes, whatever happens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from actors import driver, preflight
from actors.trainers.joint import read_joint
from configs import RunConfig
from models.errors import ModelError, WeightsError
from services.errors import NonFiniteError, ServiceError
from services.telemetry import events
from tests.support.joint_runs import joint_run, lines, losses

pytestmark = pytest.mark.ray

SPLIT = ("cluster=local", "cluster.max_failures=0", "service.replicas=0", "bridge.heartbeat_s=0.3")


@pytest.fixture(scope="module", autouse=True)
def _only_training() -> Iterator[None]:
    """These tests are about training: what it needs is known, and nothing is judged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "check", lambda *_: None)
        patch.setattr("actors.evaluate.evaluate", lambda *_, **__: {"metrics": {}})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("joint")


def trained(config: RunConfig) -> Path:
    return driver.train(config).folder


@pytest.fixture(scope="module")
def inline(folder: Path) -> Path:
    return trained(joint_run(folder, "name=inline"))


@pytest.mark.usefixtures("ray_cluster")
def test_split_is_inline_bit_for_bit(folder: Path, inline: Path) -> None:
    split = trained(joint_run(folder, "name=group", *SPLIT))
    assert losses(split) == losses(inline)
    assert {(6, "llm"), (6, "diffusion")} <= lines(split, "val").keys()
    steps = [entry.step for entry in read_joint(split / "checkpoints")]
    assert steps[-1] == 6
    recorded = events.read(split / "events")
    for role in ("llm-0", "diffusion-0"):
        assert {"load", "forward", "backward", "step"} <= {e["what"] for e in recorded if e["who"] == role}
    page = (split / "report" / "index.html").read_text()
    assert "diffusion-0" in page, "the timeline shows both"


def assert_close(ours: Path, theirs: Path) -> None:
    """The same losses but for the order of sums, which differs with the number of ranks."""
    mine, wanted = losses(ours), losses(theirs)
    assert mine.keys() == wanted.keys()
    for key, numbers in wanted.items():
        for name, value in numbers.items():
            tolerance = 1e-5 if name.startswith("loss") else 1e-4
            assert mine[key][name] == pytest.approx(value, rel=tolerance), (key, name)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_over_the_object_store_bit_for_bit(folder: Path, inline: Path) -> None:
    split = trained(joint_run(folder, "name=objects", "bridge.transport=objects", *SPLIT))
    assert losses(split) == losses(inline)


SHAPES = {
    "llm-elastic": ("cluster.roles.llm.workers=[1,2]", "roles.llm.backend=ddp"),
    "diffusion-2": ("cluster.roles.diffusion.workers=[2]", "roles.diffusion.backend=ddp"),
    "objects-2": ("cluster.roles.diffusion.workers=[2]", "roles.diffusion.backend=fsdp2", "bridge.transport=objects"),
    "fsdp2-ddp": (
        "cluster.roles.llm.workers=[2]", "roles.llm.backend=fsdp2", "cluster.roles.diffusion.workers=[2]",
        "roles.diffusion.backend=ddp",
    ),
    "zero2": ("cluster.roles.llm.workers=[2]", "roles.llm.backend=zero2"),
    "zero3": ("cluster.roles.llm.workers=[2]", "roles.llm.backend=zero3"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("shape", SHAPES)
def test_groups_of_several_workers_agree_with_inline(folder: Path, inline: Path, shape: str) -> None:
    split = trained(joint_run(folder, f"name={shape}", *SHAPES[shape], *SPLIT))
    assert_close(split, inline)
    ranks = {path.stem for path in (split / "events").glob("*-1.jsonl")}
    assert ranks, "a second rank took part"
    if shape == "llm-elastic":
        assert ranks == {"llm-1"}, "the most that the range allows and the cluster offers"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_low_rank_updates_on_both_sides(folder: Path) -> None:
    lora = ("roles.llm.peft=lora", "roles.diffusion.peft=lora")
    alone = trained(joint_run(folder, "name=lora-inline", *lora))
    split = trained(joint_run(folder, "name=lora-split", *lora, *SPLIT))
    assert losses(split) == losses(alone)


LONG = ("trainer.steps=12", "trainer.checkpoint_every=3")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return trained(joint_run(folder, "name=undisturbed", *LONG))


def pid_of(run: Path, who: str) -> int:
    """The process that is this rank, in the newest life of the run; 0 before it has said so."""
    joined = [e["pid"] for e in events.read(run / "events") if e["who"] == who and e["what"] == "joined"]
    return joined[-1] if joined else 0


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"split": "train"') // 2 if path.exists() else 0


@contextmanager
def once(due: Callable[[], bool], act: Callable[[], object], timeout_s: float = 300.0) -> Iterator[threading.Event]:
    """Do something in a thread as soon as it is due; the event says whether it was done."""
    done, over = threading.Event(), threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not over.is_set():
            if due():
                act()
                done.set()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("role", ["llm", "diffusion"])
def test_kill_9_of_a_rank_and_both_start_again_from_the_joint_step(folder: Path, undisturbed: Path, role: str) -> None:
    config = joint_run(folder, f"name=killed-{role}", *LONG, *SPLIT, "cluster.max_failures=2")
    run = driver.run_folder(config)
    with once(lambda: steps_logged(run) >= 5, lambda: os.kill(pid_of(run, f"{role}-0"), signal.SIGKILL)) as killed:
        result = driver.train(config)
    assert killed.is_set()
    assert result.resumed_from >= 3
    assert losses(run) == losses(undisturbed), "and no step is there twice"
    assert (run / "checkpoints" / "generation").read_text() == "2"
    assert {entry.generation for entry in read_joint(run / "checkpoints")[-1:]} == {2}
    said = [e["text"] for e in events.read(run / "events") if e["who"] == "driver" and e["what"] == "log"]
    (why,) = [text for text in said if "start again" in text]
    assert why.startswith(f"role {role} failed (the worker group of role {role} failed: rank 0: its process is gone")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_one_role_ends_both_and_arrives_as_itself(folder: Path) -> None:
    config = joint_run(
        folder, "name=mismatch", *SPLIT, "cluster.max_failures=3", "model.init.diffusion=run:uniugg_align-tiny/llm"
    )
    with pytest.raises((WeightsError, ModelError)) as raised:
        trained(config)
    run = driver.run_folder(config)
    assert (run / "checkpoints" / "generation").read_text() == "1", "it is not tried again"
    assert "diffusion" in str(raised.value) or "llm" in str(raised.value)
    failed = [e for e in events.read(run / "events") if e["what"] == "failure"]
    assert {e["error"] for e in failed} <= {"WeightsError", "ModelError", "PeerLostError"}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_loss_that_is_never_finite_ends_both(folder: Path) -> None:
    config = joint_run(
        folder, "name=diverged", *SPLIT, "cluster.max_failures=3", "trainer.max_skipped_steps=0",
        "roles.diffusion.trainer={lr: 1e30, clip_norm: 0}",
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="max_skipped_steps allows 0") as raised:
        trained(config)
    assert "of diffusion" in str(raised.value) or "generation" in str(raised.value)
    assert (driver.run_folder(config) / "checkpoints" / "generation").read_text() == "1"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_role_that_cannot_be_placed_ends_both_and_says_what_is_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "4")
    config = joint_run(folder, "name=nowhere", *SPLIT, "cluster.roles.diffusion.memory_gb=5000")
    with pytest.raises(ServiceError, match="the worker group of role diffusion could not run"):
        trained(config)
    said = [e["text"] for e in events.read(driver.run_folder(config) / "events") if e["what"] == "log"]
    assert any("role 'diffusion' fits no node" in text and "memory_gb 5000" in text for text in said)


@pytest.mark.slow
def test_an_interrupt_of_the_driver_ends_both_groups(folder: Path, inline: Path) -> None:
    config = joint_run(folder, "name=interrupted", "trainer.steps=4000", "trainer.warmup_steps=1")
    code = f"""
    from pathlib import Path
    if __name__ == "__main__":
        from actors import driver, preflight
        from tests.support.joint_runs import joint_run
        preflight.check = lambda *_: None
        driver.train(joint_run(Path({str(folder)!r}), "name=interrupted", "trainer.steps=4000", *{SPLIT!r}))
    """
    run = driver.run_folder(config)
    assert inline.exists()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    try:
        deadline = time.monotonic() + 300
        while steps_logged(run) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        assert steps_logged(run) >= 2, "both train"
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in said
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not [p.cmdline() for p in alive], "nothing is left behind"
    lost = [e for e in events.read(run / "events") if e["what"] == "failure" and e["who"] == "driver"]
    assert lost, "the driver has written down how the groups ended"
    # By themselves when they see that the next generation has begun, or with Ray where that is faster.
    assert {e["error"] for e in lost} <= {"PeerLostError", "ActorDiedError"}
    by_themselves = [e["message"] for e in lost if e["error"] == "PeerLostError"]
    assert all("generation 2 of this run has begun" in message for message in by_themselves)
