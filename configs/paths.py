"""Paths of a configuration, made absolute when it is loaded: workers on other nodes have other working folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from configs.schema import RunConfig

RUN = "run:"
_PART_DEPTH = 4
"""runs/NAME/weights/PART"""


def is_uri(path: str) -> bool:
    """Whether ``path`` is a URI such as s3://bucket/folder rather than a path."""
    return "://" in path


def expand(config: RunConfig) -> RunConfig:
    """``config`` with "~" expanded everywhere, and inputs (data, weights) made absolute from the working folder.

    Folders that are written to are not made absolute: a relative one is refused by :mod:`configs.validate`, because
    under ``ray job submit`` it would lie in a folder that is thrown away.
    """
    storage = dataclasses.replace(config.storage, root=_home(config.storage.root))
    cache = dataclasses.replace(config.cache, root=_home(config.cache.root), remote=_home(config.cache.remote))
    rooms = dataclasses.replace(config.data.rooms, textures=_absolute(config.data.rooms.textures))
    sources = {
        name: dataclasses.replace(
            source,
            root=_absolute(source.root),
            splits={split: _absolute(path) for split, path in source.splits.items()},
        )
        for name, source in config.data.sources.items()
    }
    data = dataclasses.replace(
        config.data,
        rooms=rooms,
        sources=sources,
        quarantine=_absolute(config.data.quarantine),
        evaluation_sets={name: _absolute(path) for name, path in config.data.evaluation_sets.items()},
    )
    encoders = {
        name: dataclasses.replace(encoder, weights=_weights(encoder.weights, storage.root))
        for name, encoder in config.encoders.items()
    }
    init = {part: _weights(weights, storage.root) for part, weights in config.model.init.items()}
    model = dataclasses.replace(config.model, init=init)
    return dataclasses.replace(config, storage=storage, cache=cache, data=data, encoders=encoders, model=model)


def as_run(path: str) -> str:
    """``run:NAME/PART`` for the folder of a run's part, below whatever root; any other text as it is.

    What a run was trained from is told by this, so that it stays the same run where its storage was moved.
    """
    parts = Path(path).parts
    if len(parts) > _PART_DEPTH and (parts[-4], parts[-2]) == ("runs", "weights"):
        return f"{RUN}{parts[-3]}/{parts[-1]}"
    return path


def moved(config: RunConfig, old: str, new: str) -> RunConfig:
    """``config`` of a run whose storage was at ``old`` and is at ``new``: storage, and what it reads of other runs."""

    def place(path: str) -> str:
        return _weights(as_run(path), new) if Path(path).is_relative_to(old) else path

    encoders = {name: dataclasses.replace(e, weights=place(e.weights)) for name, e in config.encoders.items()}
    model = dataclasses.replace(config.model, init={part: place(w) for part, w in config.model.init.items()})
    storage = dataclasses.replace(config.storage, root=new)
    return dataclasses.replace(config, storage=storage, encoders=encoders, model=model)


def _home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _absolute(path: str) -> str:
    if not path or is_uri(path):
        return path
    return str(Path(path).expanduser().absolute())


def _weights(path: str, root: str) -> str:
    """Hub names ("owner/name") look like relative paths; only what starts with "." or "~" is taken as a folder.

    ``run:NAME/PART`` is the folder ``<root>/runs/NAME/weights/PART``.
    """
    if path.startswith(RUN):
        name, _, part = path.removeprefix(RUN).partition("/")
        return str(Path(root, "runs", name, "weights", part))
    return _absolute(path) if path.startswith((".", "~")) else path
