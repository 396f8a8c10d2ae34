"""BLINK: a folder a task with ``val*.parquet``: up to four pictures, choices, a prompt, the answer as "(B)"."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from services.contracts import Item
from services.data.readers.benchmarks.files import (
    LETTER_PROMPT,
    ParquetQuestions,
    Row,
    lettered,
    make_item,
    text_of,
)
from services.errors import DataError

IMAGES = ("image_1", "image_2", "image_3", "image_4")


class Blink(ParquetQuestions):
    """Questions of the validation split, whose answers are public."""

    layout: ClassVar[str] = "<Task>/val*.parquet"
    prompt: ClassVar[str] = f"{{prompt: the question and its choices}}\n{LETTER_PROMPT}"
    patterns: ClassVar[tuple[str, ...]] = ("**/val*.parquet", "**/*.parquet")
    id_column: ClassVar[str] = "idx"

    def item(self, question_id: str, record: Row, path: Path, row: int) -> Item:
        """The prompt as published (it holds the choices), and how to answer."""
        where = f"{path}: row {row}"
        choices = record.get("choices") or []
        answer = text_of(record, "answer", where).strip("()")
        if answer not in {option[0] for option in lettered(choices)}:
            raise DataError(
                f"{where}: the answer {answer!r} is no letter of its {len(choices)} choices (those of the test split "
                "are hidden; take the files of the split val)"
            )
        text = text_of(record, "question", where)
        asked = str(record.get("prompt") or "") or "\n".join([text, *lettered(choices)])
        return make_item(
            question_id,
            self.pictures(path, row, IMAGES),
            f"{asked}\n{LETTER_PROMPT}",
            kind=text_of(record, "sub_task", where),
            text=text,
            answer=answer,
            options=lettered(choices),
        )
