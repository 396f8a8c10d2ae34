"""The documented keys of the schema: path, type, default, and the comment that stands above the key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args, get_origin

from configs import schema, schema_recipes
from configs.convert import hints_of
from configs.schema import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One key of the configuration; an entry under a name of the user's choice is written ``<name>``."""

    path: str
    type: str
    default: Any
    comment: str


def documented_keys() -> tuple[Key, ...]:
    """All keys in the schema's order."""
    return tuple(_keys(RunConfig, "", RunConfig()))


def _keys(cls: type, prefix: str, instance: Any) -> Iterator[Key]:
    notes = comments()[cls.__name__]
    for name, hint in hints_of(cls).items():
        value = getattr(instance, name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _keys(hint, f"{prefix}{name}.", value)
        elif get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
            entry = get_args(hint)[1]
            yield from _keys(entry, f"{prefix}{name}.<name>.", entry())
        else:
            shown = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            yield Key(path=prefix + name, type=shown.replace("typing.", ""), default=value, comment=notes[name])


@cache
def comments() -> Mapping[str, Mapping[str, str]]:
    """Class name -> key -> the comment lines directly above it ("" where there are none)."""
    found: dict[str, dict[str, str]] = {}
    for module in (schema, schema_recipes):
        source = inspect.getsource(module)
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                found[node.name] = {ast.unparse(item.target): _above(lines, item.lineno) for item in fields}
    return found


def _above(lines: list[str], line: int) -> str:
    """The block of comment lines that ends directly above ``line`` (counted from 1)."""
    block: list[str] = []
    for text in reversed(lines[: line - 1]):
        if not text.strip().startswith("#"):
            break
        block.insert(0, text.strip().removeprefix("#").strip())
    return " ".join(block)
