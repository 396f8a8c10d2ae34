"""Typed configuration: ``load(overrides)`` composes the hydra tree and returns a checked :class:`RunConfig`."""

from __future__ import annotations

from configs.errors import ConfigError
from configs.schema import RunConfig

__all__ = ["ConfigError", "RunConfig"]
