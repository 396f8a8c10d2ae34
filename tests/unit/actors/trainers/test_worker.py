from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import configs
from actors.driver import run_folder
from actors.trainers.roles import deciding_settings, open_checkpoints
from actors.trainers.worker import _cause, _scaling, share_of_cores
from configs.schema import RoleConfig
from services.errors import NonFiniteError, PeerLostError, ServiceError


def test_resources_of_workers() -> None:
    plain = _scaling("trainer", RoleConfig())
    assert plain == {"num_workers": 1, "use_gpu": False, "resources_per_worker": {"CPU": 0.0, "role_trainer": 1.0}}
    rich = _scaling("trainer", RoleConfig(workers=[1, 4], num_gpus=1, memory_gb=2, accelerator="H100"))
    assert rich["num_workers"] == (1, 4)
    assert _scaling("llm", RoleConfig(workers=[1, 4]), fixed=2)["num_workers"] == 2
    assert rich["use_gpu"]
    assert rich["accelerator_type"] == "H100"
    assert rich["resources_per_worker"]["GPU"] == 1
    assert rich["resources_per_worker"]["memory"] == 2 * 2**30


def failed(**failures: Exception) -> Exception:
    """As Ray Train says it: by rank, wrapped."""
    error = RuntimeError("Training failed due to worker errors")
    error.worker_failures = {int(rank[1:]): SimpleNamespace(cause=e) for rank, e in failures.items()}  # type: ignore[attr-defined]
    return _cause("llm", error)


def test_the_users_error_is_found_among_rays() -> None:
    mine = NonFiniteError("sample x")
    assert failed(r0=RuntimeError("peer gone"), r1=mine) is mine
    assert failed(r0=PeerLostError("rank 0 of diffusion"), r1=mine) is mine
    killed = failed(r0=PeerLostError("rank 0 of diffusion"), r1=RuntimeError("The actor died\nunexpectedly"))
    assert isinstance(killed, ServiceError)
    first = str(killed).splitlines()[0]
    assert first == "the worker group of role llm failed: rank 1: RuntimeError: The actor died"
    lost = PeerLostError("rank 0 of diffusion was killed")
    assert failed(r0=lost, r1=PeerLostError("too")) is lost


def test_a_worker_that_was_killed_is_said_to_be_gone() -> None:
    gone = RuntimeError("A worker health check failed.")
    gone.health_check_failure = RuntimeError("The actor died.\n\tpid: 7\nIts worker exit type: SYSTEM_ERROR")  # type: ignore[attr-defined]
    assert str(failed(r1=gone)).splitlines()[0] == (
        "the worker group of role llm failed: rank 1: its process is gone. Its worker exit type: SYSTEM_ERROR"
    )


def test_a_group_that_does_not_start_says_why() -> None:
    error = RuntimeError("Training failed due to controller error")
    error.controller_failure = TimeoutError("no node has role_llm\nmore")  # type: ignore[attr-defined]
    assert str(_cause("llm", error)).splitlines()[0] == (
        "the worker group of role llm could not run: TimeoutError: no node has role_llm"
    )


def test_workers_of_one_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert share_of_cores("a", ["a", "a", "b"]) == 4, "the one on b has cores of its own"
    assert share_of_cores("b", ["a", "a", "b"]) == 8
    assert share_of_cores("a", ["a"] * 20) == 1


def test_what_decides_a_run_and_what_does_not() -> None:
    base = ["recipe=probe", "size=tiny", "data=rooms"]
    settings = deciding_settings(configs.load(base))
    assert settings["trainer.lr"] == configs.load(base).trainer.lr
    assert settings["encoders.features.family"] == "dinov2"
    free = ["trainer.log_every=3", "trainer.threads=2", "name=other", "storage.root=/tmp/x", "cluster=inline"]
    assert deciding_settings(configs.load([*base, *free])) == settings
    for change in ("trainer.steps=77", "seed=3", "recipe.losses={depth_dpt: 2.0}", "cache.codec=fp8_e4m3"):
        assert deciding_settings(configs.load([*base, change])) != settings, change


def test_a_checkpoint_from_before_a_setting_counts_as_trained_with_its_default(tmp_path: Path) -> None:
    config = configs.load(["recipe=probe", "size=tiny", "data=rooms"])
    plan: Any = SimpleNamespace(digest="p")
    identity = open_checkpoints(config, tmp_path, plan).identity
    assert identity.settings == deciding_settings(config)
    assert identity.defaults["encoders.features.side"] == 0
    assert identity.defaults["data.text.supervise"] == "answer"
    assert (identity.defaults["peft.dora"], identity.defaults["peft.base_dtype"]) == (False, "auto")
    assert identity.defaults["trainer.lr"] != identity.settings["trainer.lr"]


def test_the_run_folder_has_a_name_of_its_own() -> None:
    config = configs.load(["recipe=probe", "size=tiny", "data=rooms", "storage.root=/tmp/store"])
    assert str(run_folder(config)) == "/tmp/store/runs/probe-tiny"
