"""RealWorldQA: Parquet files with ``image``, ``question`` (with its options and how to answer) and ``answer``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from services.contracts import Item
from services.data.readers.benchmarks.files import ParquetQuestions, Row, make_item, text_of

_OPTION = re.compile(r"^([A-Z])\.\s+(.+)$", re.MULTILINE)


class RealWorldQA(ParquetQuestions):
    """Questions about pictures from vehicles; letters, or short answers."""

    layout: ClassVar[str] = "test*.parquet"
    prompt: ClassVar[str] = "{question, which holds its options and how to answer}"

    def item(self, question_id: str, record: Row, path: Path, row: int) -> Item:
        """The question as it is written. Its type is ``choice`` where the answer is a letter, else ``open``."""
        where = f"{path}: row {row}"
        text, answer = text_of(record, "question", where), text_of(record, "answer", where)
        choice = answer.upper() in {"A", "B", "C", "D"}
        options = [f"{letter}. {option.strip()}" for letter, option in _OPTION.findall(text)] if choice else []
        return make_item(
            question_id,
            self.pictures(path, row, ("image",)),
            text,
            kind="choice" if choice else "open",
            text=text,
            answer=answer,
            options=options,
        )
