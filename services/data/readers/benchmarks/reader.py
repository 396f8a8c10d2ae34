"""Benchmarks as a source of format ``benchmark``: one item a question, with its pictures and its exact answer.

Options:

- ``name``: vsibench | cvbench | sparbench | viewspatial | blink | 3dsrbench | seedbench | realworldqa; the scorer has
  the same name (``models.metrics.benchmarks.scorer``).
- ``images``: folder of pictures that files name (seedbench, viewspatial, lines of cvbench, a 3dsrbench CSV); default:
  the benchmark's own.
- ``videos``: folder of videos (vsibench, seedbench); default: the root.
- ``frames``: pictures that stand for a video, evenly spaced from its first to its last frame.
- ``part``: of seedbench, image | video | all.
- ``max_new_tokens``: longest answer; 0 is the benchmark's own (vsibench: 16), or that of the run where it states none.

An item's user turn is the prompt that the benchmark publishes, its assistant turn the true answer. Everything is of
the split ``test``, unless ``splits`` says otherwise: a benchmark is nothing to train on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

from services.contracts import Item, Split
from services.data.readers.base import Notes, Reader
from services.data.readers.benchmarks.files import Questions, Settings
from services.errors import ConfigError, DataError

#: Name -> "module:class" below this package.
BENCHMARKS: dict[str, str] = {
    "3dsrbench": "three_dsr:ThreeDsrBench",
    "blink": "blink:Blink",
    "cvbench": "cvbench:CvBench",
    "realworldqa": "realworldqa:RealWorldQA",
    "seedbench": "seedbench:SeedBench",
    "sparbench": "sparbench:SparBench",
    "viewspatial": "viewspatial:ViewSpatial",
    "vsibench": "vsibench:VsiBench",
}


def benchmark_class(name: str) -> type[Questions]:
    """The reader of a benchmark's files. ConfigError with the nearest name when there is none."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(str(name), BENCHMARKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"options.name={name!r} is not one of {', '.join(BENCHMARKS)}{hint}")
    module, _, attribute = BENCHMARKS[name].partition(":")
    benchmark: type[Questions] = getattr(import_module(f"{__package__}.{module}"), attribute)
    return benchmark


def protocol(options: Mapping[str, Any]) -> dict[str, Any]:
    """How a benchmark with these options is asked: ``prompt``, ``frames`` (at most, of a video), ``frame_choice``,
    ``max_new_tokens`` (0 where neither it nor the options limit the answer).

    ConfigError for a name or a number that cannot be.
    """
    benchmark = benchmark_class(str(options.get("name", "")))
    given = {**BenchmarkReader.options, **options}
    return {
        "prompt": benchmark.prompt,
        "frames": _number(given, "frames", least=1),
        "frame_choice": benchmark.shows,
        "max_new_tokens": _number(given, "max_new_tokens", least=0) or benchmark.max_new_tokens,
    }


def _number(options: Mapping[str, Any], name: str, *, least: int) -> int:
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"options.{name}={value!r} must be a whole number of at least {least}")
    return value


class BenchmarkReader(Reader):
    """Questions of a benchmark."""

    version: ClassVar[int] = 1
    options: ClassVar[Mapping[str, Any]] = {
        "name": "", "images": "", "videos": "", "frames": 32, "part": "image", "max_new_tokens": 0,
    }  # fmt: skip

    @cached_property
    def questions(self) -> Questions:
        """The benchmark's files. ConfigError when ``options.name`` is none of them."""
        benchmark = benchmark_class(self.option("name"))
        asked = protocol(self._options)
        settings = Settings(
            root=self.root,
            images=self.option("images"),
            videos=self.option("videos"),
            frames=asked["frames"],
            part=self.option("part"),
            cache=self.cache,
        )
        return benchmark(settings, self.shared)

    def layout(self) -> str:
        """One line on the layout."""
        return f"{self.option('name')}: expected {self.questions.layout}"

    def all_ids(self) -> list[str]:
        """Ids of the questions in the order of the files."""
        return list(self.questions.ids)

    def prepare(self) -> None:
        """List the questions: that reads the files they all lie in."""
        self.all_ids()

    def split_of(self, scene_id: str) -> Split | None:
        """``test``, unless ``splits`` lists the question elsewhere."""
        return super().split_of(scene_id) if self.source.splits else Split.TEST

    def read_one(self, scene_id: str, notes: Notes) -> Item:
        """One question. DataError when a picture or the answer is missing."""
        if scene_id not in self.questions.ids:
            raise DataError(f"{self.root}: {self.option('name')} has no question {scene_id!r}")
        return self.questions.read(scene_id, notes)
