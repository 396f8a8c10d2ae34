"""ViewSpatial-Bench: ``ViewSpatial-Bench.json`` with the pictures that it names, or Parquet files with both.

Records have ``question_type``, ``question``, ``choices`` ("A. left", one a line), the answer as one of them, and
``image_path`` (names below the folder ``ViewSpatial-Bench``) or ``images``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar

from models.metrics.viewspatial import TYPES
from services.contracts import ImageRef, Item
from services.data.readers.benchmarks.files import (
    Row,
    TextQuestions,
    make_item,
    picture_files,
    text_of,
)
from services.data.readers.corpus_files import a_dict
from services.errors import DataError

FILE = "ViewSpatial-Bench.json"
_ASKS = "Question: {question}\nChoices: {choices}\nReply only to the corresponding option.\nAnswer:"


class ViewSpatial(TextQuestions):
    """Where something is, as the camera or somebody in the picture sees it; up to several pictures of a scene."""

    layout: ClassVar[str] = f"{FILE}, with scannetv2_val/ and val2017/ of pictures; or *.parquet"
    prompt: ClassVar[str] = _ASKS

    def records(self) -> list[tuple[Path, Row, str]]:
        """The entries of the list; they have no ids but their places."""
        found: list[tuple[Path, Row, str]] = []
        for path in self.settings.files(FILE, f"**/{FILE}"):
            content = self.shared.json(path)
            if not isinstance(content, list):
                raise DataError(f"{path}: must hold a list of questions, holds {type(content).__name__}")
            for place, record in enumerate(content):
                where = f"{path}: question {place}"
                found.append((path, a_dict(record, where), where))
        return found

    def item(self, question_id: str, record: Row, path: Path, row: int) -> Item:
        """A row that holds its pictures."""
        return _item(question_id, record, self.pictures(path, row, ("images", "image")), f"{path}: row {row}")

    def text_item(self, question_id: str, record: Row, path: Path, where: str) -> Item:
        """A record that names its pictures, with the folder of the benchmark in front or, where they lie in it, not."""
        names = record.get("image_path")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: 'image_path' must be a list of names, got {names!r:.80}")
        folder = self.settings.folder(self.settings.images, path.parent)
        images: list[ImageRef] = []
        for name in names:
            below = str(PurePosixPath(*PurePosixPath(name).parts[1:]))
            found = next((n for n in (name, below) if any((f / n).is_file() for f in (folder, folder.parent))), name)
            images += picture_files([folder, folder.parent], [found], where)
        return _item(question_id, record, images, where)


def _item(question_id: str, record: Row, images: Sequence[ImageRef], where: str) -> Item:
    kind = text_of(record, "question_type", where)
    if kind not in TYPES:
        raise DataError(f"{where}: question_type={kind!r} is not one of {', '.join(TYPES)}")
    text, choices = text_of(record, "question", where), text_of(record, "choices", where)
    options, answer = choices.split("\n"), text_of(record, "answer", where)
    if answer not in options:
        raise DataError(f"{where}: the answer {answer!r} is not one of its choices {options}")
    return make_item(
        question_id,
        images,
        _ASKS.format(question=text, choices=choices),
        kind=kind,
        text=text,
        answer=answer[0],
        options=options,
    )
