"""SPAR-Bench: Parquet files with ``image`` (a list), ``task``, ``question`` (with its options) and ``answer``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from models.metrics.sparbench import LOW, TASKS, VIEW_CHANGE
from services.contracts import Item
from services.data.readers.benchmarks.files import (
    LETTER_PROMPT,
    WORD_PROMPT,
    ParquetQuestions,
    Row,
    make_item,
    text_of,
)
from services.errors import DataError

_OPTION = re.compile(r"^\s*([A-D])[.:)]\s*(.+)$", re.MULTILINE)
_BOXES = (
    "The values represent the bounding box coordinates normalized to a 0-1000 scale, with the top-left corner as the "
    "origin of the image."
)


class SparBench(ParquetQuestions):
    """Questions of 20 tasks about one picture or several of a room."""

    layout: ClassVar[str] = "*.parquet with image, task, question, answer"
    prompt: ClassVar[str] = (
        f"{{question, which holds its options}}\n{LETTER_PROMPT}; numbers: {{question}}\n{WORD_PROMPT}; "
        f"position_matching, camera_motion_infer: {_BOXES} before how to answer; view_change_infer: {{question}}"
    )

    def item(self, question_id: str, record: Row, path: Path, row: int) -> Item:
        """The question and the published hints of its task."""
        where = f"{path}: row {row}"
        task = text_of(record, "task", where)
        if task not in TASKS:
            raise DataError(f"{where}: task={task!r} is not one of {', '.join(TASKS)}")
        text, answer = text_of(record, "question", where), text_of(record, "answer", where)
        options: list[str] = []
        if task in LOW:
            hints = [WORD_PROMPT]
        elif task == VIEW_CHANGE:
            hints = []
        else:
            hints = [_BOXES] if task in ("position_matching", "camera_motion_infer") else []
            hints.append(LETTER_PROMPT)
            options = [f"{letter}. {option.strip()}" for letter, option in _OPTION.findall(text)]
        return make_item(
            question_id,
            self.pictures(path, row, ("image",)),
            "\n".join([text, *hints]),
            kind=task,
            text=text,
            answer=answer,
            options=options,
        )
