"""Where a command writes: asked before it works, so that nothing is computed which cannot be kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

from configs import ConfigError


def check_folder(place: Path, option: str = "--out") -> Path:
    """``place``, which is a folder that can be written to, or can be made; nothing is left behind.

    ConfigError names the option, and what stands in the way.
    """
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"{option} {place}: {there} is a file; give a folder, which may be new")
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".writable-"):
            return place
    except OSError as error:
        raise ConfigError(
            f"{option} {place}: nothing can be written into {there} ({error.strerror}); give a folder that can be "
            "written to"
        ) from error


def check_file(place: Path, option: str = "--out") -> Path:
    """``place``, a file that can be written, as :func:`check_folder` asks of its folder."""
    if place.is_dir():
        raise ConfigError(f"{option} {place} is a folder; give the file to write")
    check_folder(place.parent, option)
    return place
