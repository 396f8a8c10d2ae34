"""At the end of training no thread of gloo is at work, which could abort a process that ends by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.trainers.backends import NAMES, make_backend
from configs.schema import BackendConfig

#: Two ranks train a little by each backend, one after the other, and then end as any program does.
PROGRAM = """
import sys

rank, store, names = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
import torch
import torch.distributed as dist
from actors.trainers.backends import make_backend
from actors.trainers.backends.groups import gloo_threads
from configs.schema import BackendConfig
from tests.support.backend_ranks import CONFIG, ROLE, TwoHeads, WIDTH


def train(name):
    backend = make_backend(BackendConfig(name=name, persistence_threshold=0), "cpu")
    module = backend.prepare(TwoHeads(), ROLE, CONFIG)
    for _ in range(2):
        backend.zero_grad()
        backend.backward(module(torch.ones(2, WIDTH), "q").sum())
        _, norm = backend.reduce(torch.zeros(1, dtype=torch.float64))
        backend.update(0.01, norm, 1.0)
    assert gloo_threads(), "there is a group"
    assert backend.exchange(rank) == [0, 1]
    return backend


for name in names:
    dist.init_process_group("gloo", init_method=f"file://{store}-{name}", rank=rank, world_size=2)
    train(name).close()
    assert not dist.is_initialized()
    assert set(gloo_threads().values()) <= {"S"}, f"{name}: a thread is at work"
    assert name != "ddp" or not gloo_threads(), "they ended with the group"
print("trained", *names)
"""


def assert_two_ranks_end(folder: Path, names: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[4])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(rank), str(folder / "store"), names],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        out, error = rank.communicate(timeout=300)
        assert rank.returncode == 0, error
        assert f"trained {names.replace(',', ' ')}" in out
        assert "terminate called" not in error


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads by name are Linux's")
def test_no_thread_of_gloo_works_after_training(tmp_path: Path) -> None:
    assert_two_ranks_end(tmp_path, "ddp,fsdp2")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads by name are Linux's")
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_no_thread_of_gloo_works_after_training_with_deepspeed(name: str, tmp_path: Path) -> None:
    assert_two_ranks_end(tmp_path, name)


def test_every_backend_can_be_closed_before_it_has_anything() -> None:
    assert "single" in NAMES
    backend = make_backend(BackendConfig(name="single"), "cpu")
    backend.close()
    backend.close()
