"""CV-Bench: ``test_2d.parquet`` and ``test_3d.parquet``, or ``test_2d.jsonl`` and ``test_3d.jsonl`` with ``img/``.

Rows have ``idx``, ``task``, ``source``, ``question``, ``choices``, ``prompt`` (the question with its choices), the
answer as "(B)", and an ``image`` or its ``filename``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from models.metrics.cvbench import SOURCES, TASKS
from services.contracts import ImageRef, Item
from services.data.readers.benchmarks.files import (
    LETTER_PROMPT,
    Row,
    TextQuestions,
    json_lines,
    lettered,
    make_item,
    picture_files,
    text_of,
)
from services.errors import DataError


class CvBench(TextQuestions):
    """Questions about one picture each; their type is ``SOURCE/TASK``."""

    layout: ClassVar[str] = "test_2d.parquet and test_3d.parquet, or test_*.jsonl with img/ of pictures"
    prompt: ClassVar[str] = f"{{prompt: the question and its choices}}\n{LETTER_PROMPT}"
    patterns: ClassVar[tuple[str, ...]] = ("test*.parquet", "**/test*.parquet")
    id_column: ClassVar[str] = "idx"

    def records(self) -> list[tuple[Path, Row, str]]:
        """The lines of all annotations."""
        files = self.settings.files("test*.jsonl", "**/test*.jsonl")
        return [(path, *line) for path in files for line in json_lines(path, self.shared)]

    def item(self, question_id: str, record: Row, path: Path, row: int) -> Item:
        """A row that holds its picture."""
        return _item(question_id, record, self.pictures(path, row, ("image",)), f"{path}: row {row}")

    def text_item(self, question_id: str, record: Row, path: Path, where: str) -> Item:
        """A line that names its picture."""
        folder = self.settings.folder(self.settings.images, path.parent)
        return _item(
            question_id,
            record,
            picture_files([folder / "img", folder], [text_of(record, "filename", where)], where),
            where,
        )


def _item(question_id: str, record: Row, images: Sequence[ImageRef], where: str) -> Item:
    """The prompt as published, and how to answer."""
    source, task = text_of(record, "source", where), text_of(record, "task", where)
    for name, value, known in (("source", source, SOURCES), ("task", task, TASKS)):
        if value not in known:
            raise DataError(f"{where}: {name}={value!r} is not one of {', '.join(known)}")
    options = lettered(record.get("choices") or [])
    answer = text_of(record, "answer", where).strip("()")
    if answer not in {option[0] for option in options}:
        raise DataError(f"{where}: the answer {answer!r} is no letter of its {len(options)} choices")
    return make_item(
        question_id,
        images,
        f"{text_of(record, 'prompt', where)}\n{LETTER_PROMPT}",
        kind=f"{source}/{task}",
        text=text_of(record, "question", where),
        answer=answer,
        options=options,
    )
