"""Scenes and items as bytes: compressed JSON of what differs from the defaults, with paths rewritten on the way.

Floats survive exactly (JSON writes the shortest text that reads back to the same number).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
import zlib
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any

from services.contracts import Item, Scene

Rewrite = Callable[[str], str]
_KINDS: dict[str, Any] = {"scene": Scene, "item": Item}


def to_plain(value: Any, rewrite: Rewrite) -> Any:
    """A contract object as JSON values; ``rewrite`` is applied to every path (fields ``path`` and ``*_path``)."""
    if dataclasses.is_dataclass(value):
        plain = {}
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if part == field.default:
                continue
            is_path = field.name == "path" or field.name.endswith("_path")
            plain[field.name] = rewrite(part) if is_path else to_plain(part, rewrite)
        return plain
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_plain(part, rewrite) for part in value]
    return value


def encode(record: Scene | Item, rewrite: Rewrite) -> bytes:
    """``record`` as compressed bytes."""
    text = json.dumps(to_plain(record, rewrite), separators=(",", ":"), allow_nan=False)
    return zlib.compress(text.encode(), level=1)


def decode(data: bytes, kind: str, rewrite: Rewrite) -> Scene | Item:
    """The record that :func:`encode` was given; ``kind`` is "scene" or "item"."""
    return typing.cast("Scene | Item", _builder(_KINDS[kind])(json.loads(zlib.decompress(data)), rewrite))


Builder = Callable[[Any, Rewrite], Any]


@cache
def _builder(kind: Any) -> Builder:
    """A function from JSON values to the annotated type ``kind``; made once a type."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_builder(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = _builder(next(part for part in arguments if part is not type(None)))
        return lambda value, rewrite: None if value is None else inner(value, rewrite)
    if origin is tuple:
        parts = [_builder(part) for part in arguments if part is not Ellipsis]
        if len(parts) == 1:
            each = parts[0]
            if each is _same:
                return lambda value, _rewrite: tuple(value)
            return lambda value, rewrite: tuple([each(part, rewrite) for part in value])
        return lambda value, rewrite: tuple([build(part, rewrite) for build, part in zip(parts, value, strict=True)])
    if isinstance(kind, type) and issubclass(kind, Enum):
        return lambda value, _rewrite: kind(value)
    return _same


def _same(value: Any, _rewrite: Rewrite) -> Any:
    return value


def _path(value: str, rewrite: Rewrite) -> str:
    return rewrite(value)


def _dataclass_builder(kind: Any) -> Builder:
    hints = typing.get_type_hints(kind)
    builders: dict[str, Builder] = {}
    for field in dataclasses.fields(kind):
        is_path = field.name == "path" or field.name.endswith("_path")
        builders[field.name] = _path if is_path else _builder(hints[field.name])

    def build(value: dict[str, Any], rewrite: Rewrite) -> Any:
        return kind(**{name: builders[name](part, rewrite) for name, part in value.items()})

    return build
