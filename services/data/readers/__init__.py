"""Readers: one file a format. Behind them every source looks the same; nothing downstream knows a data set's name.

Formats are named in a table and imported when they are opened, so that an optional library of one format costs
nothing to those who read another.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path

from configs.schema import SourceConfig
from services.data.readers.base import Notes, Reader
from services.errors import ConfigError, DataError

__all__ = ["FORMATS", "Notes", "Reader", "open_reader", "reader_class"]

#: Format name -> "module:class" below this package.
FORMATS: dict[str, str] = {
    "arkitscenes": "arkitscenes:ARKitScenesReader",
    "benchmark": "benchmarks.reader:BenchmarkReader",
    "colmap": "colmap:ColmapReader",
    "corpus": "corpus:CorpusReader",
    "images": "images:ImagesReader",
    "nerfstudio": "nerfstudio:NerfstudioReader",
    "questions": "questions:QuestionsReader",
    "re10k": "re10k:Re10kReader",
    "rooms": "scannet:ScanNetReader",
    "scannet": "scannet:ScanNetReader",
    "scannetpp": "scannetpp:ScanNetppReader",
    "sevenscenes": "sevenscenes:SevenScenesReader",
}


def reader_class(name: str) -> type[Reader]:
    """The reader of a format. ConfigError with the nearest name when there is none."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"format={name!r} is not one of {', '.join(sorted(FORMATS))}{hint}")
    module, _, attribute = FORMATS[name].partition(":")
    reader: type[Reader] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return reader


def open_reader(root: str | Path, source: SourceConfig, *, cache: Path | None = None) -> Reader:
    """The reader of ``source.format`` on the folder or file ``root``.

    Args:
        root: Where the source lies.
        source: Its settings.
        cache: Folder that the reader may write derived files to (undistorted pictures).

    Raises:
        ConfigError: The format or one of its options is unknown; the message names the nearest.
        DataError: There is nothing at ``root``.
    """
    reader = reader_class(source.format)
    if not Path(root).exists():
        raise DataError(f"{root}: there is no such folder or file (root of a source of format {source.format!r})")
    return reader(Path(root).absolute(), source, cache=cache)
