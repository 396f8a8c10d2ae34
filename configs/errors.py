"""The one error of this package."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration is refused. The message names the key, the value seen, what is allowed, and the nearest name."""
