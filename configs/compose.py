"""From command-line overrides to a composed tree: groups of the hydra tree first, single keys on top.

``recipe=probe`` chooses the option ``probe`` of the group ``recipe/``; ``trainer.lr=3e-4`` sets a key. Hydra
composes the groups; keys are applied here, because the YAML files hold choices only (the defaults are in the
schema) and because a mistyped key deserves a better message than a failed merge.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.convert import nearest, to_dict
from configs.errors import ConfigError
from configs.roles import ROLES
from configs.schema import RunConfig

DEFAULT_RECIPE = "probe"
DEFAULT_SIZE = "tiny"
EVERY_ROLE = "*"


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """Options of every group of the tree; those of ``size`` are written ``recipe/size``."""
    found: dict[str, tuple[str, ...]] = {}
    for folder in resources.files("configs").iterdir():
        if not folder.is_dir() or folder.name.startswith(("_", ".")):
            continue
        options = []
        for entry in folder.iterdir():
            if entry.is_dir():
                options += [f"{entry.name}/{_stem(e.name)}" for e in entry.iterdir() if e.name.endswith(".yaml")]
            elif entry.name.endswith(".yaml"):
                options.append(_stem(entry.name))
        found[folder.name] = tuple(sorted(options))
    return found


def compose_tree(overrides: Sequence[str], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The tree that ``overrides`` describe, on top of the defaults or of ``base`` (a saved configuration).

    Raises:
        ConfigError: for a malformed or repeated override, an unknown group option, or a group chosen on top of
            ``base`` (which is composed already).
    """
    choices, keys = _split(overrides)
    if base is None:
        tree = _compose(choices)
    elif choices:
        raise ConfigError(
            f"{choices[0].input_line}: a saved configuration is composed already; on top of it only single keys can "
            f"be set, such as trainer.steps=100 (groups: {', '.join(sorted(groups()))})"
        )
    else:
        tree = copy.deepcopy(dict(base))
    _give_every_role(tree)
    for override in keys:
        _apply(tree, override)
    return tree


def _give_every_role(tree: dict[str, Any]) -> None:
    """A described cluster may say under ``cluster.roles.*`` what a worker of any role gets; a role's own keys stand."""
    roles = tree.get("cluster", {}).get("roles", {})
    common = roles.pop(EVERY_ROLE, None)
    if common is not None:
        recipe = tree.get("recipe", {}).get("name", DEFAULT_RECIPE)
        roles |= {role: {**common, **roles.get(role, {})} for role in ROLES.get(recipe, ())}


def _split(overrides: Sequence[str]) -> tuple[list[Override], list[Override]]:
    """Overrides that choose a group option, and those that set a key; each name once."""
    choices: list[Override] = []
    keys: list[Override] = []
    seen: dict[str, str] = {}
    for text in overrides:
        override = _parse(text)
        name = override.get_key_element().lstrip("+~")
        if name in seen:
            raise ConfigError(f"{name} is given twice: {seen[name]} and {text}; keep one")
        seen[name] = text
        is_group = override.key_or_group in groups()
        if is_group and isinstance(override.value(), Mapping):
            raise ConfigError(
                f"{text}: {override.key_or_group} is a group; choose one of {_options(override.key_or_group)}, and "
                f"set single keys as {override.key_or_group}.key=value"
            )
        (choices if is_group else keys).append(override)
    return choices, keys


def _parse(text: str) -> Override:
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{text!r} is no override; write group=option or key=value, such as trainer.steps=100")
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text)
    except HydraException as error:
        name, _, value = text.partition("=")
        if value[:1] in ("", "[", "{", "'", '"'):
            raise ConfigError(f"{text!r} cannot be read: {str(error).splitlines()[0]}") from error
        # Hydra's grammar wants quotes around some characters that paths have, such as "~": the text is meant.
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        try:
            override = parser.parse_override(f"{name}='{quoted}'")
        except HydraException:
            raise ConfigError(f"{text!r} cannot be read: {str(error).splitlines()[0]}") from error
    if override.is_sweep_override():
        raise ConfigError(f"{text!r} is a sweep; give one value, or quote a text that holds a comma")
    return override


def _compose(choices: Sequence[Override]) -> dict[str, Any]:
    recipe = next((o.value() for o in choices if o.key_or_group == "recipe"), DEFAULT_RECIPE)
    sizes = {"size": f"{recipe}/{DEFAULT_SIZE}"}
    selected = []
    for override in choices:
        group, value = override.key_or_group, override.value()
        if group == "size":
            value = sizes["size"] = f"{recipe}/{value}"
        for option in value if isinstance(value, list) else [value]:
            _check_option(group, option)
        shown = "[" + ",".join(value) + "]" if isinstance(value, list) else value
        # A group placed at a package of its own (a second encoder) is an addition to the defaults list.
        selected.append(f"+{group}@{override.package}={shown}" if override.package else f"{group}={shown}")
    try:
        with initialize_config_module("configs", version_base="1.3"):
            tree = OmegaConf.to_container(compose("run", overrides=selected), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the configuration cannot be composed from {' '.join(selected)}: {error}") from error
    assert isinstance(tree, dict)  # run.yaml is a mapping
    return {str(key): value for key, value in tree.items()}


def _check_option(group: str, option: Any) -> None:
    options = groups()[group]
    if option in options:
        return
    if group == "size":
        recipe, _, size = str(option).partition("/")
        mine = [o.partition("/")[2] for o in options if o.startswith(f"{recipe}/")]
        if not mine:  # the recipe itself is unknown, which is reported for the recipe
            return
        raise ConfigError(f"size={size}: recipe {recipe} has no such size.{nearest(size, mine)} Sizes: {_join(mine)}")
    raise ConfigError(
        f"{group}={option}: no such option of the group {group}.{nearest(str(option), options)} "
        f"Options: {_join(options)}"
    )


def _apply(tree: dict[str, Any], override: Override) -> None:
    """Set, or with ``~`` delete, one key. A section that the tree does not mention yet starts from its defaults."""
    path = override.key_or_group.split(".")
    node: Any = tree
    default: Any = to_dict(RunConfig())
    for i, name in enumerate(path[:-1]):
        default = default.get(name, {}) if isinstance(default, dict) else {}
        if not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(path)}: {'.'.join(path[:i])} is a value ({node!r}), it has no keys")
        node = node.setdefault(name, copy.deepcopy(default))
    last = path[-1]
    if not isinstance(node, dict):
        raise ConfigError(f"{'.'.join(path)}: {'.'.join(path[:-1])} is a value ({node!r}), it has no keys")
    if override.is_delete():
        if last not in node:
            raise ConfigError(f"~{'.'.join(path)}: there is no such key to remove.{nearest(last, node)}")
        del node[last]
        return
    node[last] = _plain(override.value())


def _plain(value: Any) -> Any:
    """Values of hydra's grammar (quoted strings among them) as plain Python ones."""
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.text if hasattr(value, "text") else value


def _options(group: str) -> str:
    return _join(groups()[group])


def _join(names: Sequence[str]) -> str:
    return ", ".join(names)


def _stem(name: str) -> str:
    return name.removesuffix(".yaml")
