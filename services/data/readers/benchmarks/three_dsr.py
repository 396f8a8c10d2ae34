"""3DSRBench: one table, tab- or comma-separated, with a row for every variant of a question.

Columns: ``qid`` (see ``models.metrics.three_dsr`` for its variants), ``question``, ``A`` to ``D``, ``answer``,
``category``, and the picture: ``image`` in base64 (or the ``index`` of the row that has it), or ``image_url``, whose
file name is looked for in ``options.images``. A picture from the table is written once into the source's cache.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from models.metrics.three_dsr import CATEGORIES
from services.contracts import ImageRef, Item
from services.data.images import IMAGE_SUFFIXES
from services.data.readers.base import Notes
from services.data.readers.benchmarks.files import Questions, Row, Settings, make_item, text_of
from services.data.readers.corpus_files import unique_ids
from services.errors import DataError

SELECT_PROMPT = "Please select the correct answer from the options above."
_LETTERS = "ABCD"
_REFERENCE = 64
"""A cell this short names another row, or a file; no picture is that small."""
_LARGEST_CELL = 1 << 28


class ThreeDsrBench(Questions):
    """Questions about one picture, with mirrored and rotated variants where the table has them."""

    layout: ClassVar[str] = "*circular.tsv, another *.tsv, or *.csv"
    prompt: ClassVar[str] = f"Question: {{question}}\nOptions:\n{{options, one a line}}\n{SELECT_PROMPT}"

    def __init__(self, settings: Settings, shared: Notes) -> None:
        super().__init__(settings, shared)
        csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_CELL))

    @cached_property
    def _path(self) -> Path:
        found = self.settings.files("*circular.tsv", "*.tsv", "*.csv")
        if len(found) != 1:
            raise DataError(f"{self.settings.root}: one table is needed ({self.layout}), there are {len(found)}")
        return found[0]

    @cached_property
    def _rows(self) -> list[tuple[Row, int, int]]:
        """(row without the picture, first byte, past the last byte): pictures are most of the file."""
        self.shared.files.append(self._path)
        rows: list[tuple[Row, int, int]] = []
        for cells, start, end in _rows(self._path):
            image = cells.pop("image", "")
            own = len(image) > _REFERENCE
            rows.append(({**cells, "reference": "" if own else image, "holds_image": own}, start, end))
        return rows

    @cached_property
    def _by_index(self) -> dict[str, int]:
        return {str(row.get("index", place)): place for place, (row, _, _) in enumerate(self._rows)}

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """``qid`` (or ``index``) -> place of the row."""
        return unique_ids(row.get("qid") or row.get("index") for row, _, _ in self._rows)

    def read(self, question_id: str, notes: Notes) -> Item:  # noqa: ARG002 - one file, guarded as shared
        """The variant with its picture."""
        place = self.ids[question_id]
        row = self._rows[place][0]
        where = f"{self._path}: question {question_id!r}"
        category = text_of(row, "category", where)
        if category not in CATEGORIES:
            raise DataError(f"{where}: category={category!r} is not one of {', '.join(CATEGORIES)}")
        options = [f"{x}. {row[x]}" for x in _LETTERS if row.get(x) and row[x].lower() != "nan"]
        text, answer = text_of(row, "question", where), text_of(row, "answer", where).upper()
        if answer not in {option[0] for option in options}:
            raise DataError(f"{where}: the answer {answer!r} is no letter of its {len(options)} options")
        lines = [f"Question: {text}", "Options:", *options, SELECT_PROMPT]
        return make_item(
            question_id,
            (self._picture(place, where),),
            "\n".join(lines),
            kind=category,
            text=text,
            answer=answer,
            options=options,
        )

    def _picture(self, place: int, where: str) -> ImageRef:
        row = self._rows[place][0]
        if row["holds_image"]:
            return self._unpacked(place, where)
        reference = row["reference"]
        if reference and Path(reference).suffix.lower() not in IMAGE_SUFFIXES:
            other = self._by_index.get(reference)
            if other is None or not self._rows[other][0]["holds_image"]:
                raise DataError(f"{where}: its picture is that of row {reference!r}, which has none")
            return self._unpacked(other, where)
        name = reference or Path(urlsplit(row.get("image_url") or "").path).name
        if not name:
            raise DataError(f"{where}: neither 'image' nor 'image_url' says where the picture is")
        path = self.settings.folder(self.settings.images, self._path.parent / "images") / name
        if not path.is_file():
            raise DataError(f"{path}: there is no such file ({where}); options.images names the folder of the images")
        return ImageRef(path=str(path))

    def _unpacked(self, place: int, where: str) -> ImageRef:
        """The picture of a row as a file of the cache, named by its content, so that variants share it."""
        if self.settings.cache is None:
            raise DataError(f"{where}: its picture lies in the table and needs a folder to be written to")
        _, start, end = self._rows[place]
        [(row, _, _)] = _rows(self._path, (start, end))
        try:
            data = base64.b64decode(row["image"], validate=True)
        except binascii.Error as error:
            raise DataError(f"{where}: its picture is no base64 text ({error})") from error
        # Pictures are told by their content, not by the name; JPEG is what the benchmark has.
        path = self.settings.cache / f"{hashlib.sha256(data).hexdigest()[:32]}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{place}.tmp")
            temporary.write_bytes(data)
            temporary.replace(path)
        return ImageRef(path=str(path))


class _Lines:
    """Lines of a part of a binary file as text, and how many bytes were given out so far."""

    def __init__(self, path: Path, start: int, end: int) -> None:
        self.path, self.position, self.end = path, start, end

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            file.seek(self.position)
            while self.position < self.end and (line := file.readline()):
                self.position += len(line)
                yield line.decode("utf-8-sig" if self.position == len(line) else "utf-8")


def _rows(path: Path, part: tuple[int, int] | None = None) -> Iterator[tuple[dict[str, str], int, int]]:
    """(row, first byte, past the last byte) of a table with a header, or of one part of it. DataError if broken."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        header_lines = _Lines(path, 0, path.stat().st_size)
        header = next(csv.reader(header_lines, delimiter=delimiter), [])
        lines = _Lines(path, *(part or (header_lines.position, path.stat().st_size)))
        start = lines.position
        for number, cells in enumerate(csv.reader(lines, delimiter=delimiter), start=2):
            if cells and len(cells) != len(header):
                raise DataError(f"{path}: row {number} has {len(cells)} cells, the header names {len(header)}")
            if cells:
                yield dict(zip(header, cells, strict=True)), start, lines.position
            start = lines.position
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table ({error})") from error
