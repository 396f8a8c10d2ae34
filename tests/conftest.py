"""Environment of the whole test run. Set before anything imports ray: see the comments."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# All Ray listeners on loopback (otherwise 127.0.0.1 is rewritten to the address of the network card).
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# A short folder of this run's own: isolates the "current cluster" file and keeps unix socket paths short.
_RAY_TMPDIR = tempfile.mkdtemp(prefix="lr", dir="/tmp")
os.environ["RAY_TMPDIR"] = _RAY_TMPDIR
# Explicit, so that client and cluster agree and nothing is written to the home folder.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "60"
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Nothing is downloaded at run time.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell without job control starts background jobs with interrupts ignored, which tests of Ctrl-C would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish() -> None:
    shutil.rmtree(_RAY_TMPDIR, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_run_stays_open() -> Iterator[None]:
    """What a run records of its process (events, log records) ends with the test that ran it."""
    from services.telemetry import events, logs

    yield
    events.configure(None, "")
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, logs.EventHandler)]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """Folder of real public weights, for tests that need them; skips where there is none."""
    path = os.environ.get("LOOM3D_WEIGHTS")
    if not path:
        pytest.skip("LOOM3D_WEIGHTS is not set")
    return Path(path)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests of the session that need one: 2 CPUs and the role resources."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        resources={"role_trainer": 8, "role_feature": 8, "role_llm": 4, "role_diffusion": 4, "role_vlm": 4},
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()
