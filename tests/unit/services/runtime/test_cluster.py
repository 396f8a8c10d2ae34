"""How a local Ray is set up, without starting one; the start itself in a process of its own, marked ray."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from configs.schema import ClusterConfig, NodeConfig, RoleConfig, RunConfig, ServiceConfig
from services.errors import ServiceError
from services.runtime import cluster


def test_a_local_ray_is_on_loopback_in_a_folder_of_its_own_with_a_token():
    wanted = cluster.local_environment(Path("/tmp/lrx"), {})
    assert wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert wanted["RAY_TMPDIR"] == "/tmp/lrx"
    assert (wanted["RAY_AUTH_MODE"], wanted["RAY_AUTH_TOKEN_PATH"]) == ("token", "/tmp/lrx/token")


def test_what_the_user_chose_stays():
    wanted = cluster.local_environment(Path("/tmp/lrx"), {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "/mine"})
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"} & wanted.keys()


def test_what_raylet_says_of_its_workers_stays_off_the_terminal() -> None:
    from ray._private.ray_logging import LogDeduplicator

    skipped = cluster.local_environment(Path("/tmp/lrx"), {})["RAY_DEDUP_LOGS_SKIP_REGEX"]
    noise = "WARNING: 8 PYTHON worker processes have been started on node: 85336f with address: 127.0.0.1, which is 4x"
    lines = LogDeduplicator(5, None, skipped).deduplicate({"pid": "raylet", "lines": [noise, "A worker died"]})
    assert [line for batch in lines for line in batch["lines"]] == ["A worker died"]


def test_every_role_finds_its_resource():
    config = RunConfig(
        cluster=ClusterConfig(
            nodes={"a": NodeConfig(count=2, num_cpus=4, num_gpus=1, resources={"role_llm": 3, "disk": 1})},
            roles={"llm": RoleConfig(workers=[1, 2]), "diffusion": RoleConfig(workers=[1, 5])},
        ),
        service=ServiceConfig(replicas=3),
    )
    cpus, gpus, custom = cluster.local_resources(config)
    assert (cpus, gpus) == (8, 2)
    assert custom == {"role_llm": 6, "disk": 2, "role_diffusion": 5, "role_feature": 3}


def test_workers_import_what_the_driver_imports(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"/extra{os.pathsep}")
    environment = cluster.worker_environment()
    root, extra = environment["env_vars"]["PYTHONPATH"].split(os.pathsep)
    assert (Path(root) / "services" / "runtime" / "cluster.py").is_file()
    assert extra == "/extra"
    module, _, name = environment["worker_process_setup_hook"].rpartition(".")
    assert getattr(sys.modules[module], name) is cluster.setup_worker


def test_the_setup_hook_sets_threads(monkeypatch):
    import torch

    before = torch.get_num_threads()
    monkeypatch.setenv(cluster.THREADS, "1")
    cluster.setup_worker()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_inline_starts_nothing(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ServiceError, match=r"cluster\.mode='inline' starts no Ray"):
        cluster.start(RunConfig(cluster=ClusterConfig(mode="inline")))


def test_stopping_what_is_not_ours_does_nothing(monkeypatch):
    import ray

    ended: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("ray"))
    cluster.stop(cluster.Cluster(address="x", started=False))
    assert ended == []


SCRIPT = """
import json, os, sys
from configs.schema import RunConfig
from services.runtime import calls, cluster
with cluster.running(RunConfig()) as ours:
    import ray
    inner = cluster.start(RunConfig())
    @ray.remote(num_cpus=0, resources={"role_feature": 1})
    def look():
        import sys, torch
        return "models" in sys.modules, torch.get_num_threads()
    answer = calls.call(look.remote(), "a task", 60)
    print(json.dumps({"address": ours.address, "started": ours.started, "inner": inner.started, "answer": answer,
        "mode": oct((ours.folder / "token").stat().st_mode & 0o777), "folder": str(ours.folder)}))
left, tmp, home = os.path.exists(ours.folder), os.environ.get("RAY_TMPDIR", ""), os.listdir(os.environ["HOME"])
print(json.dumps({"left": left, "tmp": tmp, "home": home}))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_of_our_own_starts_and_leaves_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), cluster.THREADS: "2"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    inside, after = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert inside["address"].startswith("127.0.0.1:")
    assert (inside["started"], inside["inner"]) == (True, False)
    assert inside["answer"][0] is True
    assert inside["mode"] == "0o600"
    assert after["left"] is False
    assert after["tmp"] == ""
    assert ".ray" not in after["home"]


@pytest.mark.parametrize(("error", "kept"), [(None, False), (ServiceError("a replica died"), True)])
def test_rays_logs_are_kept_where_a_service_failed(tmp_path, monkeypatch, caplog, error, kept):
    folder = tmp_path / "lr0"
    folder.mkdir()
    monkeypatch.setattr(cluster, "start", lambda config: cluster.Cluster(address="a", started=True, folder=folder))
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(shutdown=lambda: None))
    ended = pytest.raises(ServiceError) if error else contextlib.nullcontext()
    with ended, cluster.running(RunConfig()):
        if error:
            raise error
    assert folder.exists() is kept
    assert (str(folder) in caplog.text) is kept
