"""Who may import what, read from the syntax trees: no module is executed for it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("configs", "models", "services", "actors", "infra", "tests")

#: Package -> packages of ours that it may import beside itself.
ALLOWED = {
    "configs": set(),
    "models": set(),
    "services": {"models", "configs"},
    "actors": {"services", "models", "configs"},
}

#: Library -> where it may be imported: files, or folders ending in "/".
CONFINED = {
    "ray": (
        "services/runtime/",
        "services/streams/pipeline.py",
        "services/features/pool.py",
        "actors/driver.py",
        "actors/bridge/mailbox.py",
        "actors/trainers/worker.py",
    ),
    "deepspeed": ("actors/trainers/backends/zero.py",),
    "peft": ("actors/trainers/lora.py",),
    "hydra": ("configs/",),
    "omegaconf": ("configs/",),
}

#: Slow to import and not needed by every command: only inside the function that needs them.
HEAVY = {"ray", "deepspeed", "peft", "transformers", "diffusers", "matplotlib", "pycolmap", "av", "wandb", "mlflow"}
#: Files that are themselves imported only by who needs the library.
HEAVY_FILES = {
    "actors/report/figures.py": {"matplotlib"},
    "services/data/readers/colmap.py": {"pycolmap"},
    "services/data/videos.py": {"av"},
}

#: Names of libraries and of the standard library that a module of ours must not shadow (as a top-level name).
LIBRARIES = {
    "ray", "torch", "numpy", "datasets", "deepspeed", "peft", "hydra", "omegaconf", "transformers", "diffusers",
    "pyarrow", "lpips", "wandb", "mlflow", "rich", "yaml", "cv2", "trimesh", "scipy", "PIL", "av",
}  # fmt: skip


def python_files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


PRODUCT = python_files("configs", "models", "services", "actors")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file; every rule reads it, so it is parsed once."""
    return ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield node.module or "", node.lineno


def top_level_imports(tree: ast.Module) -> set[str]:
    """First names of what is imported when the module is, not inside a function or under TYPE_CHECKING."""
    found: set[str] = set()
    nodes: list[ast.stmt] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {name.partition(".")[0] for name, _ in imports(node)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            nodes += [*node.body, *node.orelse]
        elif isinstance(node, (ast.Try, ast.With, ast.ClassDef)):
            nodes += node.body
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_packages_import_in_one_direction(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = [
        f"line {line}: {module}"
        for module, line in imports(tree_of(path))
        if (first := module.partition(".")[0]) in OURS and first != package and first not in ALLOWED[package]
    ]
    assert wrong == [], f"{name_of(path)} may import {sorted(ALLOWED[package]) or 'nothing of ours'} beside itself"


def test_infra_and_tests_are_imported_by_nobody_else() -> None:
    for path in python_files("infra"):
        modules = {module.partition(".")[0] for module, _ in imports(tree_of(path))}
        assert "tests" not in modules, name_of(path)


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    name = name_of(path)
    for module, line in imports(tree_of(path)):
        places = CONFINED.get(module.partition(".")[0])
        if places is None:
            continue
        assert any(name == place or (place.endswith("/") and name.startswith(place)) for place in places), (
            f"{name}:{line} imports {module}, which belongs in {', '.join(places)}"
        )


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_needed(path: Path) -> None:
    allowed = HEAVY_FILES.get(name_of(path), set())
    found = (top_level_imports(tree_of(path)) & HEAVY) - allowed
    if "ray" in found and any(name_of(path) == place for place in CONFINED["ray"] if place.endswith(".py")):
        found.discard("ray")
    assert found == set(), f"{name_of(path)} imports {found} at its top; import inside the function that needs it"


def test_no_module_shadows_a_library() -> None:
    # The folders of the four packages' own files: with `python actors/x.py` they would be first on the path.
    shadowing = [name_of(path) for path in PRODUCT if path.stem in LIBRARIES or path.parent.name in LIBRARIES]
    standard = {
        name_of(path)
        for path in PRODUCT
        if len(path.relative_to(ROOT).parts) == 2 and path.stem in sys.stdlib_module_names
    }
    assert shadowing == []
    assert standard == set()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ}
    )


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""


def test_models_import_without_ray_deepspeed_peft_and_hydra() -> None:
    code = BLOCK.format(names={"ray", "deepspeed", "peft", "hydra", "omegaconf", "transformers"}) + (
        "import models, models.registry, models.spec, models.encoders.hf, models.geometry, models.metrics\n"
        "models.registry.build('probe-tiny')\n"
        "print(sorted(m for m in sys.modules if m in {'configs', 'services', 'actors'}))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_a_config_crosses_processes_without_hydra() -> None:
    code = BLOCK.format(names={"hydra", "omegaconf", "torch", "ray"}) + (
        "import pickle, configs\nconfig = pickle.loads(pickle.dumps(configs.RunConfig(seed=3)))\nprint(config.seed)"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "3"


def test_help_imports_nothing_heavy() -> None:
    code = BLOCK.format(names={"torch", "ray", "hydra", "transformers", "numpy"}) + (
        "from actors.cli import main\nraise SystemExit(main(['--help']))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "loom3d train" in result.stdout
