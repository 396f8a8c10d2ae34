"""The schema as a public surface: its keys are frozen, documented, and their defaults live nowhere else."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from configs import validate
from configs.convert import all_keys
from configs.keys import comments, documented_keys
from configs.schema import RunConfig

TREE = Path(configs.__file__).parent
KEYS_FILE = Path(__file__).parent / "keys.txt"

#: The key that an option of a group is named after; it may repeat the schema's default.
IDENTITY = {"name", "size", "format", "family", "mode", "method"}

#: Keys that an option sets and a size, which chooses that option, sets back.
SET_BACK = {"encoders.teacher.layers"}


def test_the_keys_are_the_frozen_ones() -> None:
    """A key is added or removed on purpose: then this list is changed too, and CHANGELOG.md says so."""
    assert list(all_keys()) == KEYS_FILE.read_text().split()


def test_every_key_has_a_comment_above_it() -> None:
    missing = [f"{cls}.{key}" for cls, keys in comments().items() for key, comment in keys.items() if not comment]
    assert missing == []


def test_documented_keys_are_all_keys_with_their_defaults() -> None:
    keys = {key.path: key for key in documented_keys()}
    assert list(keys) == list(all_keys())
    assert keys["trainer.lr"].default == RunConfig().trainer.lr
    assert keys["encoders.<name>.dtype"].type == "str"
    assert keys["encoders.<name>.layers"].type == "list[int]"


def yaml_files() -> list[Path]:
    return sorted(path for path in TREE.rglob("*.yaml") if path.name != "run.yaml")


@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: str(path.relative_to(TREE)))
def test_a_file_holds_choices_not_defaults(path: Path) -> None:
    tree = yaml.safe_load(path.read_text()) or {}
    tree.pop("defaults", None)
    package = re.search(r"@package (\S+)", path.read_text())
    below = path.relative_to(TREE).parts[0] if package is None else package[1]
    assert list(restated(tree, "" if below == "_global_" else f"{below}.")) == []


DEFAULTS = {key.path: key.default for key in documented_keys()}
SECTIONS = {".".join(path.split(".")[:end]) for path in DEFAULTS for end in range(1, path.count(".") + 1)}


def restated(tree: dict[str, Any], prefix: str) -> Any:
    """Keys of ``tree``, which stands at ``prefix``, whose value is the schema's default."""
    for key, value in tree.items():
        path = known_path(f"{prefix}{key}")
        if path in SECTIONS:
            yield from restated(value, f"{prefix}{key}.")
        elif key not in IDENTITY and f"{prefix}{key}" not in SET_BACK and path in DEFAULTS and DEFAULTS[path] == value:
            yield f"{prefix}{key}={value}"


def known_path(path: str) -> str:
    """``path`` with names of the user's choice as the schema writes them."""
    found: list[str] = []
    for part in path.split("."):
        named = ".".join([*found, part])
        found.append(part if named in SECTIONS | DEFAULTS.keys() else "<name>")
    return ".".join(found)


def test_restated_defaults_are_found() -> None:
    found = restated({"trainer": {"lr": 1e-3, "steps": 7}, "cluster": {"roles": {"llm": {"workers": [1]}}}}, "")
    assert list(found) == ["trainer.lr=0.001", "cluster.roles.llm.workers=[1]"]
    assert list(restated({"vit": {"height": 224, "width": 112}}, "encoders.")) == ["encoders.vit.height=224"]
    assert list(restated({"quotas": {"pair": 1.0, "view": 1.0}}, "recipe.")) == []  # they replace the default


@pytest.mark.parametrize("path", yaml_files(), ids=lambda path: str(path.relative_to(TREE)))
def test_a_file_says_what_it_is_for_or_is_named_so(path: Path) -> None:
    text = path.read_text()
    assert text.endswith("\n")
    assert len(text.splitlines()) <= 60


def test_rules_name_keys_that_exist() -> None:
    known = {key.replace("<name>", "*") for key in all_keys()}
    open_ended = {
        "recipe.quotas.*", "recipe.losses.*", "cluster.nodes.*.resources.*", "trainer.lr_scale.*", "bridge.phase_s.*",
    }  # fmt: skip
    assert {*validate.ALLOWED, *validate.RANGES} - open_ended <= known


def test_every_number_has_a_range() -> None:
    numbers = {
        pattern
        for _, pattern, value in validate.leaves(configs.load())
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    free = {"encoders.*.arch.*"}
    assert numbers - set(validate.RANGES) - free == set()


def test_the_defaults_satisfy_the_rules() -> None:
    assert list(validate.problems(configs.load())) == []


def test_allowed_names_are_those_that_the_code_knows() -> None:
    from models.encoders.families import INPUT_KINDS
    from models.registry import list_models
    from services.data.readers import FORMATS

    assert set(validate.ALLOWED["encoders.*.family"]) == set(INPUT_KINDS)
    assert set(validate.FORMATS) == set(FORMATS)
    recipes = itertools.product(validate.RECIPES, validate.ALLOWED["size"])
    trained = {configs.load([f"recipe={recipe}", f"size={size}"]).model.name for recipe, size in recipes}
    assert {path.stem for path in (TREE / "model").glob("*.yaml")} == trained
    assert {yaml.safe_load(path.read_text())["name"] for path in (TREE / "model").glob("*.yaml")} == trained
    assert trained <= set(list_models())


def test_models_without_an_option_are_parts_of_others_or_frozen() -> None:
    from models.registry import list_models, spec

    parts = (
        "mast3r-", "radio-", "uniugg-vit-", "uniugg-spatial-decoder-", "spatial-vae-", "uniugg-llm-", "uniugg-unet-",
        "uniugg-direct-llm-", "vggt-", "spa3-vlm-adapter-", "spa3-vlm-7b",
    )  # fmt: skip
    options = {path.stem for path in (TREE / "model").glob("*.yaml")}
    assert {name for name in list_models() if not name.startswith(parts)} == options
    assert all({role.name for role in spec(name).roles} in map(set, validate.ROLES.values()) for name in options)


def test_roles_of_recipes_are_those_of_the_code() -> None:
    from actors.recipes import RECIPES

    assert set(RECIPES) == set(validate.RECIPES) == set(validate.ROLES)
