"""What benchmarks' files have in common: rows with ids, pictures inside Parquet, frames of videos, prompts."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from services.contracts import ImageRef, Item, Question, Turn
from services.data.frames import spread_frames
from services.data.readers.base import Notes
from services.data.readers.corpus_files import a_dict, unique_ids
from services.errors import DataError

Row = dict[str, Any]

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
WORD_PROMPT = "Please answer the question using a single word or phrase."
ALL_PICTURES = "all pictures of a question, in order"
SPREAD_FRAMES = "frames of a video at linspace(0, frames - 1, n), rounded down; all where it has fewer"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a benchmark lies and how it is read; see the reader's options."""

    root: Path
    images: str
    videos: str
    frames: int
    part: str
    cache: Path | None

    def folder(self, given: str, default: Path) -> Path:
        """A folder from an option; relative ones are below the root."""
        base = self.root if self.root.is_dir() else self.root.parent
        return base / Path(given).expanduser() if given else default

    def files(self, *patterns: str) -> list[Path]:
        """The root if it is a file, else the files of the first pattern that finds any."""
        if self.root.is_file():
            return [self.root]
        return next((found for found in (sorted(self.root.glob(p)) for p in patterns) if found), [])


class Questions(ABC):
    """Questions of one benchmark by id."""

    layout: ClassVar[str]
    """Its files in a few words, for error messages."""
    prompt: ClassVar[str]
    """The form in which it asks; recorded with every score."""
    shows: ClassVar[str] = ALL_PICTURES
    """Which pictures it shows; recorded with every score."""
    max_new_tokens: ClassVar[int] = 0
    """Longest answer by its published evaluation, tokens; 0 where that states none."""

    def __init__(self, settings: Settings, shared: Notes) -> None:
        self.settings = settings
        self.shared = shared

    @property
    @abstractmethod
    def ids(self) -> Mapping[str, Any]:
        """Ids in order, each with what finds its question."""

    @abstractmethod
    def read(self, question_id: str, notes: Notes) -> Item:
        """The question as an item. DataError names the file and row that is wrong."""


class ParquetQuestions(Questions):
    """Questions in rows of Parquet files; the bytes of pictures stay there until one is loaded."""

    patterns: ClassVar[tuple[str, ...]] = ("**/test*.parquet", "**/*.parquet")
    id_column: ClassVar[str] = "id"

    @cached_property
    def tables(self) -> dict[Path, PictureTable]:
        """File -> its rows."""
        files = self.settings.files(*self.patterns)
        return {path: PictureTable(path) for path in files if path.suffix == ".parquet"}

    @cached_property
    def ids(self) -> Mapping[str, Any]:
        """Id -> (file, row). Without a column of ids: name of the file and number of the row."""
        places = [(path, row) for path, table in self.tables.items() for row in range(len(table))]
        names = [self.tables[path].row(row).get(self.id_column) for path, row in places]
        named = [f"{place[0].stem}-{place[1]}" if n is None else n for n, place in zip(names, places, strict=True)]
        return {name: places[place] for name, place in unique_ids(named).items()}

    def read(self, question_id: str, notes: Notes) -> Item:
        """The question of a row."""
        path, row = self.ids[question_id]
        notes.containers.append(path)
        return self.item(question_id, self.tables[path].row(row), path, row)

    def pictures(self, path: Path, row: int, columns: Sequence[str]) -> tuple[ImageRef, ...]:
        """Pictures in the given columns of a row, those that are there. DataError when there is none."""
        found = [ref for column in columns for ref in self.tables[path].pictures(column, row)]
        if not found:
            raise DataError(f"{path}: row {row} has no picture in {', '.join(columns)}")
        return tuple(found)

    @abstractmethod
    def item(self, question_id: str, record: Row, path: Path, row: int) -> Item:
        """What a row says."""


class TextQuestions(ParquetQuestions):
    """Questions in a text file beside their pictures, or in Parquet files that hold both."""

    @abstractmethod
    def records(self) -> list[tuple[Path, Row, str]]:
        """(file, record, where it stands) of all questions in text files."""

    @abstractmethod
    def text_item(self, question_id: str, record: Row, path: Path, where: str) -> Item:
        """What a record of a text file says."""

    @cached_property
    def texts(self) -> Mapping[str, tuple[Path, Row, str]]:
        """Id -> (file, record, where); empty where there are Parquet files."""
        found = [] if self.tables else self.records()
        names = unique_ids(record.get(self.id_column) for _, record, _ in found)
        return {name: found[place] for name, place in names.items()}

    @cached_property
    def ids(self) -> Mapping[str, Any]:
        """Ids in order, of the files that are there."""
        return self.texts or super().ids

    def read(self, question_id: str, notes: Notes) -> Item:
        """The question of a record, or of a row."""
        if question_id not in self.texts:
            return super().read(question_id, notes)
        path, record, where = self.texts[question_id]
        return self.text_item(question_id, record, path, where)


class PictureTable:
    """Rows of a Parquet file without the bytes of pictures, and where these are.

    A column of pictures is one of bytes, of structs with ``bytes`` (and ``path``), or of lists of either.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
            self.columns = {field.name for field in schema if _is_picture(field.type)}
            leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
            plain = [leaf for leaf in leaves if leaf.partition(".")[0] not in self.columns]
            self._rows = file.read(columns=plain).to_pylist() if plain else [{}] * file.metadata.num_rows
            self._counts = {name: _counts(file, name, leaves) for name in self.columns}
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, row: int) -> Row:
        """The columns that are no pictures."""
        return dict(self._rows[row])

    def pictures(self, column: str, row: int) -> list[ImageRef]:
        """The pictures of a cell in order; none where the cell, or the column, is empty."""
        count = self._counts[column][row] if column in self.columns else 0
        if count is None:
            return [ImageRef(path=str(self.path), member=f"{column}:{row}")]
        return [ImageRef(path=str(self.path), member=f"{column}[{place}]:{row}") for place in range(count)]


def _is_picture(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_picture(kind.value_type)
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _counts(file: Any, column: str, leaves: Sequence[str]) -> list[int | None]:
    """Of each row: how many pictures a list has; None for a single picture, 0 where there is none."""
    own = [leaf for leaf in leaves if leaf.partition(".")[0] == column]
    light = (
        [leaf for leaf in own if not leaf.endswith(".bytes")] if any(leaf.endswith(".bytes") for leaf in own) else []
    )
    # The paths beside the bytes say what is there as well, and are read without them.
    cells = file.read(columns=light or own).column(column)
    if light:
        return [_count(cell) for cell in cells.to_pylist()]
    return [_count(cell) for chunk in cells.chunks for cell in (value.as_py() for value in chunk)]


def _count(cell: Any) -> int | None:
    if cell is None:
        return 0
    return len(cell) if isinstance(cell, list) else None


def video_frames(path: Path, frames: int, where: str) -> tuple[ImageRef, ...]:
    """Evenly spaced frames of a video, the first and the last among them. DataError when there is no such file."""
    from services.data.videos import frame_times

    if not path.is_file():
        raise DataError(f"{path}: there is no such video ({where}); options.videos names the folder of the videos")
    return tuple(ImageRef(path=str(path), frame=frame) for frame in spread_frames(len(frame_times(path)), frames))


def picture_files(folders: Sequence[Path], names: Sequence[str], where: str) -> tuple[ImageRef, ...]:
    """Named pictures, each in the first of the folders that has it. DataError names one that none has."""
    found = []
    for name in names:
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            raise DataError(
                f"{folders[0] / name}: there is no such file ({where}); options.images names the folder of the images"
            )
        found.append(ImageRef(path=str(path)))
    return tuple(found)


def json_lines(path: Path, shared: Notes) -> list[tuple[Row, str]]:
    """The objects of a file of JSON lines, each with where it stands. DataError names a line that is none."""
    found: list[tuple[Row, str]] = []
    # By line breaks alone: splitlines also cuts at U+2028 and the like, which JSON allows within a text.
    for number, line in enumerate(shared.text(path).split("\n"), start=1):
        where = f"{path}: line {number}"
        if line.strip():
            try:
                found.append((a_dict(json.loads(line), where), where))
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: broken JSON ({error})") from error
    return found


def text_of(record: Mapping[str, Any], name: str, where: str) -> str:
    """A field as text. DataError when it is missing or empty."""
    value = record.get(name)
    text = "" if value is None else str(value).strip()
    if not text:
        raise DataError(f"{where}: {name!r} is missing or empty")
    return text


def lettered(choices: Sequence[Any]) -> tuple[str, ...]:
    """Choices as options "A. left", "B. right"."""
    return tuple(f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(choices))


def make_item(
    question_id: str,
    images: Sequence[ImageRef],
    prompt: str,
    *,
    kind: str,
    text: str,
    answer: str,
    options: Sequence[str] = (),
) -> Item:
    """An item that asks ``prompt`` about all ``images``. Marks of images in it go: pictures stand before the text."""
    question = Question(id=question_id, type=kind, text=text, answer=answer, options=tuple(options))
    turns = (Turn(role="user", text=prompt.replace("<image>", "").strip()), Turn(role="assistant", text=answer))
    return Item(id=question_id, images=tuple(images), turns=turns, question=question)
