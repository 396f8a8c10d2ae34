"""Typed configuration: ``load(overrides)`` composes the hydra tree and returns a checked :class:`RunConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.errors import ConfigError
from configs.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "digest", "from_yaml", "load", "to_dict", "to_yaml"]


def load(overrides: Sequence[str] = (), *, file: str | Path | None = None) -> RunConfig:
    """The configuration that ``overrides`` describe, e.g. ``["recipe=probe", "trainer.lr=3e-4"]``, checked.

    With ``file`` (the ``config.yaml`` of a run) that configuration is the base, and overrides may set keys only.

    Raises:
        ConfigError: names the key, the value seen, what is allowed and the nearest valid name.
    """
    # Imported here: hydra is slow to import, and the actors of a run only unpickle a RunConfig.
    from configs import compose, convert

    base = None
    if file is not None:
        try:
            base = convert.parse_yaml(Path(file).expanduser().read_text(), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {file}: cannot be read: {error}") from error
    return _checked(compose.compose_tree(overrides, base))


def from_yaml(text: str) -> RunConfig:
    """The configuration in ``text`` as :func:`to_yaml` wrote it, checked again. Raises ConfigError."""
    from configs import convert

    return _checked(convert.parse_yaml(text, "the YAML text"))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included."""
    from configs import convert

    return convert.to_yaml(config)


def to_dict(config: RunConfig) -> dict[str, object]:
    """The whole configuration as nested dictionaries and lists, defaults included."""
    from configs import convert

    return convert.to_dict(config)


def digest(config: RunConfig, *sections: str) -> str:
    """Hex sha256 of the configuration, or of the named sections (top-level keys) alone."""
    from configs import convert

    return convert.digest(config, *sections)


def _checked(tree: dict[str, object]) -> RunConfig:
    from configs import convert, paths
    from configs.resolve import resolve
    from configs.validate import problems

    config = resolve(paths.expand(convert.from_dict(tree)))
    convert.refuse(problems(config))
    return config
