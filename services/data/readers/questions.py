"""Questions and captions about the scenes of another source, as conversations.

Options:

- ``of``: name of the source (of scenes with instance masks) that they are about. They are made on demand below
  ``storage.root``, as `loom3d data questions` makes them; ``data.questions`` says how. Without it ``root`` is a folder
  that `loom3d data questions` wrote.
- ``questions`` (default true): the question types of VSI-Bench, with exact answers that can be scored.
- ``single`` (default false): questions about single pictures: the kind of place, whether an object is there, how many.
- ``views`` (default false): for each view what can be seen in it, one picture a conversation.
- ``scenes`` (default false): captions of whole scenes.
- ``max_views`` (default 0: ``data.questions.max_views``): at most this many pictures, evenly spaced, stand for a scene;
  what is asked can be seen in them.

Splits are those of the scenes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from services.contracts import Split
from services.data.readers.corpus import CorpusReader
from services.data.readers.corpus_files import JsonLines, Records
from services.errors import ConfigError

PARTS = ("questions", "single", "views", "scenes")
"""Options, and the beginnings of the names of the files that they choose."""


class QuestionsReader(CorpusReader):
    """Items from the conversations in ``<part>-<split>.jsonl``."""

    version: ClassVar[int] = 1
    shares_pictures: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {
        "of": "", "questions": True, "single": False, "views": False, "scenes": False, "max_views": 0, "images": "",
    }  # fmt: skip

    @cached_property
    def form(self) -> str:
        """Always JSON lines."""
        return "jsonl"

    @cached_property
    def records(self) -> Records:
        """The conversations of the chosen files, in the order of their names."""
        chosen = [part for part in PARTS if self.option(part)]
        if not chosen:
            raise ConfigError(f"options of format questions choose nothing: set one of {', '.join(PARTS)} to true")
        return JsonLines([path for part in chosen for path in sorted(self.root.glob(f"{part}-*.jsonl"))], self.shared)

    def layout(self) -> str:
        """One line on the layout."""
        return "a folder that `loom3d data questions` wrote, with questions-train.jsonl and so on"

    def _explicit_splits(self) -> Mapping[str, Split]:
        if self.source.splits:
            raise ConfigError(
                "splits of format questions are those of the scenes; set them at the source of the scenes"
            )
        return {}

    def split_of(self, scene_id: str) -> Split | None:  # noqa: ARG002 - as the base
        """None: a record states the split of its scene, and one without belongs to a scene without."""
        return None
