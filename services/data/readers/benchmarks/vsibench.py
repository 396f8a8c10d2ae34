"""VSI-Bench: ``test.jsonl`` or ``test-*.parquet``, and videos ``<dataset>/<scene_name>.mp4``.

Its other tables (pruned, debiased) are read when the root is that file; videos are then looked for beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from models.metrics.vsibench import CHOICE_TYPES, NUMERIC_TYPES, QUESTION_TYPES, read_number
from services.contracts import Item
from services.data.readers.base import Notes
from services.data.readers.benchmarks.files import (
    LETTER_PROMPT,
    SPREAD_FRAMES,
    WORD_PROMPT,
    PictureTable,
    Questions,
    Row,
    json_lines,
    make_item,
    text_of,
    video_frames,
)
from services.data.readers.corpus_files import unique_ids
from services.errors import DataError

OPENING = "These are frames of a video."


class VsiBench(Questions):
    """Questions about videos of rooms."""

    layout: ClassVar[str] = "test.jsonl or test-*.parquet, with arkitscenes/, scannet/ and scannetpp/ of videos"
    prompt: ClassVar[str] = (
        f"{OPENING}\n{{question}}\nOptions:\n{{options, one a line}}\n{LETTER_PROMPT}; "
        f"numbers: {OPENING}\n{{question}}\n{WORD_PROMPT}"
    )
    shows: ClassVar[str] = SPREAD_FRAMES
    max_new_tokens: ClassVar[int] = 16

    @cached_property
    def _records(self) -> list[tuple[Row, str]]:
        found: list[tuple[Row, str]] = []
        for path in self.settings.files("test.jsonl", "test.parquet", "**/test-*.parquet"):
            if path.suffix == ".parquet":
                table = PictureTable(path)
                self.shared.files.append(path)
                found += [(table.row(row), f"{path}: row {row}") for row in range(len(table))]
                continue
            found += json_lines(path, self.shared)
        return found

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Id -> place of the record."""
        return unique_ids(record.get("id") for record, _ in self._records)

    def read(self, question_id: str, notes: Notes) -> Item:  # noqa: ARG002 - videos are hashed with the item
        """The question with frames of its video."""
        record, where = self._records[self.ids[question_id]]
        kind = text_of(record, "question_type", where)
        if kind not in QUESTION_TYPES:
            raise DataError(f"{where}: question_type={kind!r} is not one of {', '.join(QUESTION_TYPES)}")
        text, answer = text_of(record, "question", where), text_of(record, "ground_truth", where)
        options = [str(option) for option in record.get("options") or []]
        if kind in CHOICE_TYPES and not options:
            raise DataError(f"{where}: a question of type {kind} has options, this one has none")
        number = read_number(answer)
        if kind in NUMERIC_TYPES and not (number is not None and 0 < number < math.inf):
            raise DataError(
                f"{where}: ground_truth={answer!r} of a question of type {kind} must be a positive number: answers are "
                "scored by their error relative to it"
            )
        root = self.settings.root if self.settings.root.is_dir() else self.settings.root.parent
        name = f"{text_of(record, 'dataset', where)}/{text_of(record, 'scene_name', where)}.mp4"
        video = self.settings.folder(self.settings.videos, root) / name
        return make_item(
            question_id,
            video_frames(video, self.settings.frames, where),
            prompt(text, options),
            kind=kind,
            text=text,
            answer=answer,
            options=options,
        )


def prompt(text: str, options: list[str]) -> str:
    """The published prompt: what the pictures are, the question, its options, how to answer."""
    tail = ["Options:", *options, LETTER_PROMPT] if options else [WORD_PROMPT]
    return "\n".join([OPENING, text, *tail])
