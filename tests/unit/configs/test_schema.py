"""The schema as a public surface: its keys are frozen, documented, and their defaults live nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from configs import validate
from configs.convert import all_keys, to_dict
from configs.keys import comments, documented_keys
from configs.schema import EncoderConfig, NodeConfig, RoleConfig, RunConfig, SourceConfig

TREE = Path(configs.__file__).parent
KEYS_FILE = Path(__file__).parent / "keys.txt"

#: The key that an option of a group is named after; it may repeat the schema's default.
IDENTITY = {"name", "size", "format", "family", "mode", "method"}


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
    if "@package _global_" in path.read_text():
        default: Any = to_dict(RunConfig())
    elif "@package encoders.features" in path.read_text():
        default = to_dict(EncoderConfig())
    else:
        default = to_dict(RunConfig())[path.relative_to(TREE).parts[0]]
    assert list(restated(tree, default)) == []


ENTRIES = {"sources": to_dict(SourceConfig()), "nodes": to_dict(NodeConfig()), "roles": to_dict(RoleConfig())}


def restated(tree: dict[str, Any], default: dict[str, Any], prefix: str = "") -> Any:
    """Keys below ``tree`` whose value is the schema's default."""
    for key, value in tree.items():
        if key in ENTRIES:
            for name, entry in value.items():
                yield from restated(entry, ENTRIES[key], f"{prefix}{key}.{name}.")
        elif isinstance(value, dict) and isinstance(default.get(key), dict):
            yield from restated(value, default[key], f"{prefix}{key}.")
        elif key not in IDENTITY and key in default and default[key] == value:
            yield f"{prefix}{key}={value}"


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
    assert {path.stem for path in (TREE / "model").glob("*.yaml")} == set(list_models())
