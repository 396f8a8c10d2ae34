"""The shape of the code: sizes of files and functions, handling of errors, and where tests stand."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "models", "services", "actors", "infra")
MAX_FILE, MAX_FUNCTION = 600, 80

CODE = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

#: The only file that may catch everything: it keeps actors alive and reports.
SUPERVISOR = "services/runtime/supervise.py"
#: Where Ray's own waiting functions may be called: every other wait has a deadline and a name through here.
CALLS = "services/runtime/calls.py"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file; every rule reads it, so it is parsed once."""
    return ast.parse(path.read_text())


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("path", [*CODE, *TESTS], ids=name_of)
def test_file_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE, f"{name_of(path)}: split it"
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in functions(tree_of(path))
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert long == [], f"{name_of(path)}: functions over {MAX_FUNCTION} lines"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_public_functions_are_typed_and_documented(path: Path) -> None:
    missing = []
    text = path.read_text()
    for node in public_functions(tree_of(path)):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if untyped or node.returns is None:
            missing.append(f"{node.name}: types of {untyped or 'the result'}")
        if not name_of(path).startswith("infra/") and not documented(node, text.splitlines()):
            missing.append(f"{node.name}: docstring")
    assert missing == [], name_of(path)


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of the module and methods of its public classes whose names have no underscore."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for item in node.body:
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and not item.name.startswith("_"):
                    yield item


def documented(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> bool:
    """Has a docstring, or implements something that has one (a decorator, or the linter is told so)."""
    if ast.get_docstring(node):
        return True
    decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
    if decorators & {"override", "overload", "setter"}:
        return True
    return any(re.search(r"noqa:.*\bD10[23]", line) for line in lines[node.lineno - 1 : node.body[0].lineno])


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_only_the_supervisor_catches_everything(path: Path) -> None:
    broad = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            names = {part.strip(" ()") for part in caught.split(",")}
            if names & {"Exception", "BaseException", "everything"}:
                broad.append(f"line {node.lineno}: except {caught}")
    assert broad == [] or name_of(path) == SUPERVISOR


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_every_wait_for_ray_has_a_deadline(path: Path) -> None:
    naked = [
        f"line {node.lineno}: {ast.unparse(node.func)}"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("ray.get", "ray.wait")
    ]
    assert naked == [] or name_of(path) == CALLS, f"{name_of(path)}: use services.runtime.calls"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_nothing_untrusted_is_unpickled(path: Path) -> None:
    wrong = []
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if function in ("pickle.load", "pickle.loads", "torch.hub.load", "eval", "exec"):
            wrong.append(f"line {node.lineno}: {function}")
        if function == "torch.load" and keywords.get("weights_only") != "True":
            wrong.append(f"line {node.lineno}: torch.load without weights_only=True")
        if function == "np.load" and keywords.get("allow_pickle") == "True":
            wrong.append(f"line {node.lineno}: np.load with allow_pickle=True")
    assert wrong == [], name_of(path)


def test_tests_stand_beside_what_they_test() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "with import-mode=importlib tests are no packages"
    folders = {path.name for path in (ROOT / "tests" / "unit").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders <= {"configs", "models", "services", "actors", "infra"}


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_can_fail(path: Path) -> None:
    """A test asserts, expects an exception, or calls a helper of its file that does."""
    tree = tree_of(path)
    checking = {f.name for f in functions(tree) if checks(f, set())}
    idle = [f.name for f in functions(tree) if f.name.startswith("test_") and not checks(f, checking)]
    assert idle == [], f"{name_of(path)}: tests without an assertion"


def checks(function: ast.AST, helpers: set[str]) -> bool:
    for node in ast.walk(function):
        if isinstance(node, (ast.Assert, ast.Raise)):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            if called in ("pytest.raises", "pytest.fail", "pytest.warns") or last.startswith("assert_"):
                return True
            if called in helpers or last in helpers:
                return True
    return False
