"""What a run stands on: weights that it began with or read features from, their digests, and the versions in use."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs import ConfigError, RunConfig
from models.encoders.weights import RANDOM, is_here, read_tensors, resolve_folder, tensor_digest
from models.uniugg.diffusion import find_unet

UNKNOWN = "unknown"
_PACKAGES = ("loom3d", "torch", "transformers", "diffusers", "peft", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that somebody else, or another run, has trained."""

    name: str
    """Where the configuration names them: ``encoders.NAME`` or ``model.init.NAME``."""
    place: str
    """Folder, hub name, or random."""
    digest: str
    """sha256 over their tensors; "" for random ones."""
    licence: str
    """As the user gave it."""


def base_weights(config: RunConfig, licences: Mapping[str, str]) -> list[Weights]:
    """The weights that a run stands on. ConfigError for a licence of something that it does not."""
    found = [
        Weights(name=name, place=place, digest=digest or _digest(place), licence=licences.get(name, UNKNOWN))
        for name, place, digest in _named(config)
    ]
    known = [weights.name for weights in found]
    for name in licences:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.3)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(
                f"--licence {name}: the run has no weights of that name{hint} It has {', '.join(known) or 'none'}"
            )
    return found


def _named(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """(name, place, digest where it is pinned)."""
    for name, encoder in config.encoders.items():
        yield f"encoders.{name}", encoder.weights, encoder.digest
    for name, place in config.model.init.items():
        yield f"model.init.{name}", place, ""


def _digest(place: str) -> str:
    """sha256 over the tensors of a folder; "" where there are none to read any more."""
    if place == RANDOM or not is_here(place):
        return ""
    path = Path(place).expanduser()
    return tensor_digest(read_tensors(find_unet(place) or (path if path.exists() else resolve_folder(place))))


def versions() -> dict[str, str]:
    """Versions of what wrote the export; packages that are not installed are left out."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
