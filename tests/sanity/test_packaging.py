"""One code however it is run: from the tree, from an editable install, from a wheel, shipped to a job (slow)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("actors", "configs", "models", "services")

WHERE = (
    "import models, services, configs, actors, pathlib;"
    "print(*{str(pathlib.Path(m.__file__).parents[1]) for m in (models, services, configs, actors)});"
    "config = configs.load(['recipe=probe', 'size=tiny', 'storage.root=/s', 'cache.root=/c']);"
    "print(configs.digest(config))"
)


def run(code: str, cwd: Path, **environment: str) -> list[str]:
    """Lines that a fresh interpreter prints, started in ``cwd`` so that the tree is not on its path by accident."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy of what is tracked, so that build leaves nothing in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "README.md").write_text("The text is of no importance here.\n")
    for name in ("infra", "tests"):  # must be there to show that they are left out
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index",
            "--disable-pip-version-check", "--wheel-dir", str(out), str(copy),
        ],
        check=True, timeout=240, capture_output=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def files_of(package: str, *suffixes: str) -> set[str]:
    return {str(p.relative_to(ROOT)) for suffix in suffixes for p in (ROOT / package).rglob(f"*{suffix}")}


def test_the_wheel_holds_the_four_packages_and_their_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    assert files_of("configs", ".py", ".yaml") <= names
    assert files_of("actors", ".py", ".j2", ".css", ".js") <= names
    assert files_of("models", ".py") | files_of("services", ".py") <= names
    assert not [name for name in names if name.endswith((".pyc", ".whl"))]


def test_the_wheel_and_the_tree_are_the_same_code(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    # -P and an empty folder: neither the tree nor the current folder is on the path before the wheel.
    from_wheel = run(WHERE, tmp_path, PYTHONPATH=str(target), PYTHONSAFEPATH="1")
    from_tree = run(WHERE, tmp_path, PYTHONPATH=str(ROOT), PYTHONSAFEPATH="1")
    assert from_wheel[0] == str(target)
    assert from_tree[0] == str(ROOT)
    assert from_wheel[1] == from_tree[1]
    help_of = "import sys; from actors.cli import main; sys.exit(main(['--version']))"
    assert run(help_of, tmp_path, PYTHONPATH=str(target), PYTHONSAFEPATH="1") == ["loom3d", declared()["version"]]


def test_the_editable_install_is_this_tree(tmp_path: Path) -> None:
    from importlib.metadata import distributions

    # Not by name alone: the build's own metadata beside the packages would be found first.
    found = distributions(name="loom3d", path=[sysconfig.get_path("purelib")])
    direct = next((d.read_text("direct_url.json") or "" for d in found), "")
    if '"editable": true' not in direct or ROOT.as_uri() not in direct:
        pytest.skip("this environment has no editable install of this tree")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    assert result.stdout.split()[0] == str(ROOT)


def test_the_packages_lie_beside_each_other() -> None:
    """All four bare names exist as other people's distributions: what is imported must be ours."""
    import actors
    import configs
    import models
    import services

    places = {Path(package.__file__ or "").parent.parent for package in (actors, configs, models, services)}
    assert places == {ROOT}


def declared() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def test_declared_dependencies_are_sorted_and_pinned() -> None:
    project = declared()
    names = [requirement_name(text) for text in project["dependencies"]]  # type: ignore[attr-defined]
    assert names == sorted(names)
    extras = project["optional-dependencies"]
    assert set(extras) == {"wandb", "mlflow", "smollm2", "dev"}  # type: ignore[call-overload]
    dev = [requirement_name(text) for text in extras["dev"]]  # type: ignore[index]
    assert dev == sorted(dev)
    pinned = pins()
    missing = {name for name in (*names, *dev) if name not in pinned}
    assert missing == set(), "constraints.txt lacks an exact version"


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in found.items()}


def requirement_name(text: str) -> str:
    for stop in "<>=![; ":
        text = text.partition(stop)[0]
    return text.lower().replace("_", "-")


def test_constraints_are_exact() -> None:
    for name, version in pins().items():
        assert version, name
        assert "+" not in version, f"{name}=={version}: a local build; the index decides between CPU and CUDA"


# --- images and cluster files ----------------------------------------------------------------------------------------


def test_hooks_run_what_make_check_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    commands = [line.strip().lstrip("@").replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()[1:]]
    assert [hook["entry"] for hook in hooks] == commands


def ray_version() -> str:
    return pins()["ray"]


def test_cluster_files_agree_with_the_cluster_option() -> None:
    """Node kinds, GPUs and role resources are the same in the launcher's, KubeRay's and our own description."""
    ours = yaml.safe_load((ROOT / "configs/cluster/mixed-gpus.yaml").read_text())["cluster"]["nodes"]
    launcher = yaml.safe_load((ROOT / "infra/ray/cluster.yaml").read_text())["available_node_types"]
    job = yaml.safe_load((ROOT / "infra/kuberay/rayjob.yaml").read_text())
    groups = {group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    assert set(ours) == set(groups) == set(launcher) - {"head"}
    for kind, node in ours.items():
        wanted = {**node["resources"], f"accelerator_type:{node['accelerator']}": node["num_gpus"]}
        offered = dict(launcher[kind]["resources"])
        assert offered.pop("GPU") == node["num_gpus"]
        assert offered.pop("CPU") >= node["num_cpus"]
        assert offered == wanted
        params = groups[kind]["rayStartParams"]["resources"]
        assert yaml.safe_load(yaml.safe_load(params).replace("\\", "")) == wanted
        container = groups[kind]["template"]["spec"]["containers"][0]
        limits = container["resources"]["limits"]
        assert (int(limits["nvidia.com/gpu"]), int(limits["cpu"])) == (node["num_gpus"], node["num_cpus"])
        assert container["resources"]["requests"] == limits


def test_cluster_files_use_the_image_and_versions_of_the_project() -> None:
    version = declared()["version"]
    job = yaml.safe_load((ROOT / "infra/kuberay/rayjob.yaml").read_text())["spec"]
    launcher = yaml.safe_load((ROOT / "infra/ray/cluster.yaml").read_text())
    specs = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    images = {spec["template"]["spec"]["containers"][0]["image"] for spec in specs} | {launcher["docker"]["image"]}
    assert images == {f"loom3d:{version}-cuda"}
    assert f"-t loom3d:{version}-cuda" in (ROOT / "infra/docker/Dockerfile").read_text()
    assert job["rayClusterSpec"]["rayVersion"] == ray_version()
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_kuberay_entrypoint_is_a_valid_run() -> None:
    import configs

    entrypoint = yaml.safe_load((ROOT / "infra/kuberay/rayjob.yaml").read_text())["spec"]["entrypoint"].split()
    assert entrypoint[:4] == ["python", "-m", "actors", "train"]
    config = configs.load(entrypoint[4:])
    assert config.cluster.mode == "attach"
    assert config.cache.remote.startswith("s3://")


def test_every_kuberay_container_sees_the_storage_of_the_run() -> None:
    job = yaml.safe_load((ROOT / "infra/kuberay/rayjob.yaml").read_text())["spec"]
    root = next(word for word in job["entrypoint"].split() if word.startswith("storage.root=")).partition("=")[2]
    cluster = job["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        claims = {volume["name"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume}
        mounts = {m["mountPath"] for m in spec["containers"][0]["volumeMounts"] if m["name"] in claims}
        assert any(Path(root).is_relative_to(mount) for mount in mounts)


def test_the_image_copies_every_package() -> None:
    text = (ROOT / "infra/docker/Dockerfile").read_text()
    for package in PACKAGES:
        assert f"COPY {package} {package}/" in text
        assert f"COPY {package}/__init__.py {package}/" in text
    assert "constraints.txt" in text


def test_the_slurm_script_is_valid_and_says_how_to_use_it(tmp_path: Path) -> None:
    script = ROOT / "infra/slurm/submit.sh"
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert os.access(script, os.X_OK)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    result = subprocess.run(
        ["bash", str(script), "recipe=probe"], capture_output=True, text=True, timeout=30, env=environment, check=False
    )
    assert result.returncode == 2
    assert "usage: sbatch" in result.stderr


# --- shipped to a running cluster ------------------------------------------------------------------------------------


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray head of this test's own: ports, temporary folder and processes; ended by their ids."""
    import psutil

    folder = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "job"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    environment.pop("RAY_ADDRESS", None)
    before = {process.pid for process in psutil.process_iter()}
    command = [
        "ray", "start", "--head", "--node-ip-address=127.0.0.1", "--port=26479", "--dashboard-host=127.0.0.1",
        "--dashboard-port=28365", "--dashboard-agent-listen-port=28366", "--metrics-export-port=28367",
        "--dashboard-agent-grpc-port=28368", "--runtime-env-agent-port=28369", "--num-cpus=2",
        '--resources={"role_trainer": 2, "role_feature": 2}', f"--temp-dir={folder}", "--disable-usage-stats",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    started = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        env=environment, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield {**environment, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:28365"}
    finally:
        ours = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and mentions(p, str(folder))]
        for process in ours:
            process.kill()
        psutil.wait_procs(ours, timeout=10)


def mentions(process: object, text: str) -> bool:
    return any(text in part for part in (process.info["cmdline"] or []))  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.ray
def test_a_submitted_job_imports_what_was_shipped(head: dict[str, str], tmp_path: Path) -> None:
    """``ray job submit --working-dir`` of a copy of the tree: driver and workers import the copy, not the install."""
    copy = tmp_path / "shipped"
    copy.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".rayignore", copy / ".rayignore")
    (copy / "services" / "shipped.py").write_text('"""Only in the copy."""\nMARK = "from the copy"\n')
    (copy / "job.py").write_text(
        "import ray\n"
        "import models, services\n"
        "from services.shipped import MARK\n"
        "ray.init(address='auto')\n"
        "@ray.remote\n"
        "def worker():\n"
        "    import actors, configs, models, services\n"
        "    from services.shipped import MARK\n"
        "    return [m.__file__ for m in (actors, configs, models, services)], MARK\n"
        "files, mark = ray.get(worker.remote(), timeout=120)\n"
        "assert mark == MARK\n"
        "assert all('_ray_pkg_' in f for f in [*files, models.__file__, services.__file__]), files\n"
        "print('SHIPPED', mark)\n"
    )
    ray = str(Path(sys.executable).parent / "ray")
    result = subprocess.run(
        [ray, "job", "submit", "--working-dir", str(copy), "--", sys.executable, "job.py"],
        env=head, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "SHIPPED from the copy" in result.stdout
