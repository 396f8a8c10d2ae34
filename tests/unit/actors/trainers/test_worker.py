from __future__ import annotations

from types import SimpleNamespace

import configs
from actors.driver import run_folder
from actors.trainers.roles import deciding_settings
from actors.trainers.worker import _cause, _scaling
from configs.schema import RoleConfig
from services.errors import NonFiniteError, ServiceError


def test_resources_of_workers() -> None:
    plain = _scaling(RoleConfig())
    assert plain == {"num_workers": 1, "use_gpu": False, "resources_per_worker": {"CPU": 0.0, "role_trainer": 1.0}}
    rich = _scaling(RoleConfig(workers=[1, 4], num_gpus=1, memory_gb=2, accelerator="H100"))
    assert rich["num_workers"] == (1, 4)
    assert rich["use_gpu"]
    assert rich["accelerator_type"] == "H100"
    assert rich["resources_per_worker"]["GPU"] == 1
    assert rich["resources_per_worker"]["memory"] == 2 * 2**30


def test_the_users_error_is_found_among_rays() -> None:
    mine = NonFiniteError("sample x")
    failures = {0: SimpleNamespace(cause=RuntimeError("peer gone")), 1: SimpleNamespace(cause=mine)}
    assert _cause(SimpleNamespace(worker_failures=failures)) is mine  # type: ignore[arg-type]
    other = _cause(SimpleNamespace(worker_failures={0: RuntimeError("killed")}))  # type: ignore[arg-type]
    assert isinstance(other, ServiceError)
    assert "killed" in str(other)


def test_what_decides_a_run_and_what_does_not() -> None:
    base = ["recipe=probe", "size=tiny", "data=rooms"]
    settings = deciding_settings(configs.load(base))
    assert settings["trainer.lr"] == configs.load(base).trainer.lr
    assert settings["encoders.features.family"] == "dinov2"
    free = ["trainer.log_every=3", "trainer.threads=2", "name=other", "storage.root=/tmp/x", "cluster=inline"]
    assert deciding_settings(configs.load([*base, *free])) == settings
    for change in ("trainer.steps=77", "seed=3", "recipe.losses={depth_dpt: 2.0}", "cache.codec=fp8_e4m3"):
        assert deciding_settings(configs.load([*base, change])) != settings, change


def test_the_run_folder_has_a_name_of_its_own() -> None:
    config = configs.load(["recipe=probe", "size=tiny", "data=rooms", "storage.root=/tmp/store"])
    assert str(run_folder(config)) == "/tmp/store/runs/probe-tiny"
