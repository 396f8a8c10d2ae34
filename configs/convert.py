"""Strict conversion between plain dictionaries and the typed configuration.

Nothing is coerced except an integer where a float is expected: a wrong type is refused with its key, its value and
what is allowed, an unknown key with the nearest valid one. All problems are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf

from configs.errors import ConfigError
from configs.schema import RunConfig

T = TypeVar("T")


def from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """A :class:`RunConfig` from nested dictionaries; missing keys take the schema's defaults.

    Raises:
        ConfigError: with one line for every unknown key, wrong type or non-finite number.
    """
    problems: list[str] = []
    config = _dataclass(RunConfig, tree, "", problems)
    refuse(problems)
    return config


def section_problems(cls: type, tree: Mapping[str, Any], path: str) -> list[str]:
    """What is wrong with ``tree`` as some keys of the section ``cls``, which stands at ``path``: names and types."""
    problems: list[str] = []
    _dataclass(cls, tree, path, problems)
    return problems


def refuse(problems: Iterable[str]) -> None:
    """Raise :class:`ConfigError` with all ``problems``; does nothing when there are none."""
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        raise ConfigError(f"{len(found)} problems in the configuration:\n" + "\n".join(f"  - {p}" for p in found))


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``" Did you mean X?"`` for the entry of ``allowed`` that resembles ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.55)
    return f" Did you mean {close[0]}?" if close else ""


def to_dict(config: Any) -> dict[str, Any]:
    """The whole configuration (or a section of it) as nested dictionaries and lists, defaults included."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, in the schema's order; :func:`from_yaml` gives an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """YAML text as nested dictionaries. Duplicate keys and anything but a mapping are refused, naming ``where``."""
    try:
        # OmegaConf's loader refuses duplicate keys and reads 1e-3 as a number, which YAML 1.1 does not.
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not a valid YAML configuration: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected a mapping of configuration keys, found a list")
    return {str(key): value for key, value in tree.items()}


def digest(config: RunConfig, *sections: str) -> str:
    """Hex sha256 of the configuration, or of the named sections (top-level keys) alone."""
    tree = to_dict(config)
    if sections:
        tree = {name: tree[name] for name in sections}
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hints_of(cls: type) -> dict[str, Any]:
    """Types of a dataclass's keys, evaluated."""
    return _hints(cls)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def all_keys() -> tuple[str, ...]:
    """Every key of the schema as a dotted path; an entry of a dictionary of sections is written ``<name>``."""
    return tuple(_paths(RunConfig, ""))


def _paths(cls: type, prefix: str) -> Iterable[str]:
    for name, hint in hints_of(cls).items():
        path = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _paths(hint, f"{path}.")
        elif get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
            yield from _paths(get_args(hint)[1], f"{path}.<name>.")
        else:
            yield path


def _dataclass(cls: type[T], value: Any, path: str, problems: list[str]) -> T:
    """``value`` as an instance of ``cls``; keys that are wrong are reported and left at their defaults."""
    if not isinstance(value, Mapping):
        problems.append(f"{path} must be a section with the keys {_list(hints_of(cls))}, got {_show(value)}")
        return cls()
    hints = hints_of(cls)
    known: dict[str, Any] = {}
    for key, item in value.items():
        inner = f"{path}.{key}" if path else str(key)
        if key not in hints:
            problems.append(_unknown(inner, str(key), item, hints))
        else:
            count = len(problems)
            converted = _value(hints[key], item, inner, problems)
            if len(problems) == count:
                known[str(key)] = converted
    return cls(**known)


def _unknown(path: str, key: str, value: Any, hints: Mapping[str, Any]) -> str:
    prefix = path[: len(path) - len(key)]
    hint = nearest(key, hints)
    if hint:
        hint = hint.replace("mean ", f"mean {prefix}")
    else:
        elsewhere = [candidate for candidate in all_keys() if candidate.rsplit(".", 1)[-1] == key]
        hint = f" Did you mean {elsewhere[0]}?" if elsewhere else ""
    shown = "" if isinstance(value, Mapping) else f" (value {value!r})"
    where = f" under {prefix.rstrip('.')}" if prefix else ""
    return f"unknown key {path}{shown}.{hint} Allowed{where}: {_list(hints)}"


def _value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value, path, problems)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            problems.append(f"{path} must be a list, each {_name(args[0])}, got {_show(value)}; write {path}=[a,b]")
            return []
        return [_value(args[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    if origin is dict:
        return _mapping(args[1], value, path, problems)
    if hint is Any:
        return _plain(value, path, problems)
    return _scalar(hint, value, path, problems)


def _mapping(hint: Any, value: Any, path: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        problems.append(f"{path} must map names, each to {_name(hint)}, got {_show(value)}")
        return {}
    for key in value:
        if not isinstance(key, str) or not key:
            problems.append(f"{path}: a name must be a non-empty string, got {_show(key)}; quote it")
    return {str(key): _value(hint, item, f"{path}.{key}", problems) for key, item in value.items()}


def _scalar(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        advice = ""
        if hint is str and isinstance(value, (int, float)):
            advice = f"; quote it: {path}='\"{value}\"'"
        elif hint is str and value is None:
            advice = '; write "" for none'
        problems.append(f"{path} must be {_name(hint)}, got {_show(value)}{advice}")
    elif hint is float and not math.isfinite(value):
        problems.append(f"{path} must be a finite number, got {value}")
    elif value == "???":
        problems.append(f"{path} has no value: this choice needs one; give {path}=...")
    return value


def _plain(value: Any, path: str, problems: list[str]) -> Any:
    """A value of a free-form option: anything JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}", problems) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path} must be a finite number, got {value}")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        problems.append(f"{path} must be a number, a text, a list or a mapping, got {_show(value)}")
    return value


def _name(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "a section"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    return names.get(hint, "a value")


def _show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
