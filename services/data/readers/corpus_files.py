"""Where the records of a corpus lie: a JSON list, JSON lines, tar archives, Parquet files.

Each kind lists ids, gives a record as a dict, and says which images belong to it. Files are not kept in memory beyond
what is needed to find a record again (a JSON list is: it cannot be read in parts).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from services.contracts import ImageRef, Question, Split, Turn
from services.data.images import IMAGE_SUFFIXES, read_bytes, tar_members
from services.data.readers.base import Notes
from services.errors import DataError

Record = dict[str, Any]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Records(ABC):
    """Records of a corpus by id."""

    @property
    @abstractmethod
    def ids(self) -> Mapping[str, Any]:
        """Ids in order, each with what finds its record."""

    @abstractmethod
    def read(self, record_id: str) -> tuple[Record, str]:
        """(record, where it lies in words). DataError when it cannot be read."""

    def containers(self, record_id: str) -> list[Path]:  # noqa: ARG002 - for subclasses
        """Files that hold this record and not all of them."""
        return []

    def images(self, record_id: str, record: Record, where: str) -> list[ImageRef]:  # noqa: ARG002 - for subclasses
        """Images of the record; names are not resolved yet."""
        names = record.get("image", record.get("images"))
        if names is None:
            return []
        names = names if isinstance(names, list) else [names]
        return [_image(name, where) for name in names]


class JsonList(Records):
    """A file with one JSON list of records."""

    def __init__(self, path: Path, shared: Notes) -> None:
        self._path = path
        self._records = shared.json(path)
        if not isinstance(self._records, list):
            raise DataError(f"{path}: must hold a list of records, holds {type(self._records).__name__}")

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Id -> place in the list."""
        return unique_ids(record.get("id") if isinstance(record, dict) else None for record in self._records)

    def read(self, record_id: str) -> tuple[Record, str]:
        """The record of that id."""
        place = self.ids[record_id]
        where = f"{self._path}: record {place} (id {record_id!r})"
        return a_dict(self._records[place], where), where


class JsonLines(Records):
    """Files with a JSON record a line; only the offsets of lines are kept."""

    def __init__(self, paths: Sequence[Path], shared: Notes) -> None:
        self._paths = paths
        shared.files.extend(paths)

    @cached_property
    def ids(self) -> Mapping[str, tuple[Path, int, int]]:
        """Id -> (file, line number, offset). A line that is no JSON gets an id, and its error when it is read."""
        places: list[tuple[Path, int, int]] = []
        names: list[Any] = []
        for path in self._paths:
            offset = 0
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        places.append((path, number, offset))
                        names.append(_id_of_line(line))
                    offset += len(line)
        return {name: places[place] for name, place in unique_ids(names).items()}

    def read(self, record_id: str) -> tuple[Record, str]:
        """The record of that id."""
        path, number, offset = self.ids[record_id]
        where = f"{path}: line {number}"
        with path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            return a_dict(json.loads(line), where), where
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{where}: broken JSON ({error})") from error


class TarSamples(Records):
    """Samples of webdataset archives: members that share a name up to the first dot of its last part."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    @cached_property
    def ids(self) -> Mapping[str, tuple[Path, dict[str, str]]]:
        """Id -> (archive, extension -> member)."""
        found: dict[str, tuple[Path, dict[str, str]]] = {}
        for path in self._files:
            for member in tar_members(path):
                name = PurePosixPath(member)
                stem, _, extension = name.name.partition(".")
                key = (name.parent / stem).as_posix()
                # Keys are unique within an archive only.
                key = key if len(self._files) == 1 else f"{path.stem}/{key}"
                found.setdefault(key, (path, {}))[1][extension.lower()] = member
        return found

    def containers(self, record_id: str) -> list[Path]:
        """The file of the record."""
        return [self.ids[record_id][0]]

    def read(self, record_id: str) -> tuple[Record, str]:
        """The record in ``.json``, with ``.txt`` as caption and ``.cls`` as label."""
        path, members = self.ids[record_id]
        where = f"{path}: sample {record_id!r}"
        record: Record = {}
        if "json" in members:
            try:
                record = a_dict(json.loads(self._text(path, members["json"])), where)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: broken JSON in {members['json']} ({error})") from error
        if "txt" in members:
            record = {"caption": self._text(path, members["txt"]).strip(), **record}
        if "cls" in members:
            record = {"label": self._text(path, members["cls"]).strip(), **record}
        return record, where

    def images(self, record_id: str, record: Record, where: str) -> list[ImageRef]:  # noqa: ARG002 - as the base
        """The members of the sample that are images."""
        path, members = self.ids[record_id]
        images = [name for extension, name in members.items() if f".{extension.split('.')[-1]}" in IMAGE_SUFFIXES]
        return [ImageRef(path=str(path), member=name) for name in sorted(images)]

    def _text(self, path: Path, member: str) -> str:
        try:
            return read_bytes(ImageRef(path=str(path), member=member)).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: {member} is not UTF-8 text ({error})") from error


class ParquetRows(Records):
    """Rows of Parquet files; image bytes stay in the file until an image is loaded."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    @cached_property
    def _tables(self) -> dict[Path, Any]:
        """File -> its table without the bytes of images, by memory map where the encoding allows."""
        return {path: _without_bytes(path) for path in self._files}

    @cached_property
    def ids(self) -> Mapping[str, tuple[Path, int]]:
        """Id -> (file, row)."""
        places, names = [], []
        for path, table in self._tables.items():
            given = table.column("id").to_pylist() if "id" in table.column_names else [None] * table.num_rows
            names += [value if value is not None else f"{path.stem}-{row}" for row, value in enumerate(given)]
            places += [(path, row) for row in range(table.num_rows)]
        return {name: places[place] for name, place in unique_ids(names).items()}

    def containers(self, record_id: str) -> list[Path]:
        """The file of the record."""
        return [self.ids[record_id][0]]

    def read(self, record_id: str) -> tuple[Record, str]:
        """The row as a dict."""
        path, row = self.ids[record_id]
        table = self._tables[path]
        return {name: table.column(name)[row].as_py() for name in table.column_names}, f"{path}: row {row}"

    def images(self, record_id: str, record: Record, where: str) -> list[ImageRef]:
        """A member of the file where the column holds bytes, otherwise the names in it."""
        path, row = self.ids[record_id]
        if "image" in record or "images" in record:
            return super().images(record_id, record, where)
        column = _bytes_column(path)
        return [] if column is None else [ImageRef(path=str(path), member=f"{column}:{row}")]


def turns_of(record: Record, where: str) -> tuple[Turn, ...]:
    """The conversation of a record: ``conversations``, ``messages``, or a caption as the assistant's only turn.

    DataError when there is a conversation without turns, or a turn without text or with an unknown speaker.
    """
    for key in ("conversations", "messages"):
        if record.get(key) is None:
            continue
        turns = record[key]
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where}: {key!r} has no turns")
        return tuple(_turn(turn, where) for turn in turns)
    caption = record.get("caption", record.get("text"))
    return () if not isinstance(caption, str) or not caption else (Turn(role="assistant", text=caption),)


def split_of(record: Record, where: str) -> Split | None:
    """The split that the record itself states. DataError for one that there is not."""
    split = record.get("split")
    if split is None:
        return None
    if split not in set(Split):
        raise DataError(f"{where}: split={split!r} is not one of {', '.join(Split)}")
    return Split(split)


def tokens_of(record: Record, where: str) -> int:
    """What the record states as its length in tokens (``num_tokens``), 0 without. DataError for no whole number."""
    tokens = record.get("num_tokens")
    if tokens is None:
        return 0
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise DataError(f"{where}: num_tokens={tokens!r} must be a whole number of at least 1")
    return tokens


def question_of(record: Record, record_id: str, turns: Sequence[Turn], where: str) -> Question | None:
    """The question that the record asks: with ``question_type`` and ``answer``, else None.

    Its text is ``question``, or the first user's turn without marks of images. DataError for fields of another type.
    """
    kind, answer = record.get("question_type"), record.get("answer")
    if kind is None or answer is None:
        return None
    options, views = record.get("options") or [], record.get("views") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{where}: 'options' must be a list of texts, got {options!r:.80}")
    if not isinstance(views, list) or not all(isinstance(view, int) for view in views):
        raise DataError(f"{where}: 'views' must be a list of whole numbers, got {views!r:.80}")
    asked = next((turn.text for turn in turns if turn.role == "user"), "").replace("<image>", "").strip()
    return Question(
        id=record_id,
        type=str(kind),
        text=str(record.get("question", asked)),
        answer=str(answer),
        options=tuple(options),
        views=tuple(views),
    )


def unique_ids(names: Iterable[Any]) -> dict[str, int]:
    """Id -> place. Records without an id get their place; an id that was there before gets its place appended."""
    found: dict[str, int] = {}
    for place, name in enumerate(names):
        key = str(place) if name is None else str(name)
        found[f"{key}-{place}" if key in found else key] = place
    return found


def _image(value: Any, where: str) -> ImageRef:
    """An image by its name, or by an object with ``path`` and what of it is meant."""
    if isinstance(value, str):
        return ImageRef(path=value)
    if isinstance(value, dict) and set(value) <= {"path", "frame", "member"} and isinstance(value.get("path"), str):
        frame, member = value.get("frame"), value.get("member")
        if isinstance(frame, int | None) and isinstance(member, str | None):
            return ImageRef(path=value["path"], frame=frame, member=member)
    raise DataError(f"{where}: an image is a name, or an object with path and frame or member; got {value!r:.80}")


def _turn(turn: Any, where: str) -> Turn:
    """A turn with ``from`` and ``value``, or with ``role`` and ``content``."""
    speaker, text = ("role", "content") if isinstance(turn, dict) and "role" in turn else ("from", "value")
    if not isinstance(turn, dict) or not isinstance(turn.get(text), str):
        raise DataError(f"{where}: a turn needs 'from' and 'value', or 'role' and 'content', as text; got {turn!r:.80}")
    role = str(turn.get(speaker))
    if role not in _ROLES:
        raise DataError(f"{where}: {speaker}={role!r} is not one of {', '.join(_ROLES)}")
    return Turn(role=_ROLES[role], text=turn[text])


def a_dict(value: Any, where: str) -> Record:
    """``value``, which must be a JSON object. DataError says where it stands."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: a record is an object, got {type(value).__name__}")
    return value


def _id_of_line(line: bytes) -> Any:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value.get("id") if isinstance(value, dict) else None


@lru_cache(maxsize=1024)
def _bytes_column(path: Path) -> str | None:
    """Name of the column that holds image bytes, itself or in a struct; None when images are names."""
    import pyarrow as pa

    for field in _schema(path):
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return str(field.name)
        if field.name == "image" and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            return str(field.name)
    return None


def _schema(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _without_bytes(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = _bytes_column(path)
    try:
        return pq.read_table(path, columns=[name for name in _schema(path).names if name != image])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
