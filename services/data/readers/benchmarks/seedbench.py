"""SEED-Bench: ``SEED-Bench.json`` with ``questions`` and the names of their types; pictures by ``data_id``.

Questions about pictures are read by default. Those about videos need the videos of three data sets in one folder
(``options.videos``); a question's ``segment`` chooses its part of the video: from one second to another, or, for
Procedure Understanding, from one frame to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from models.metrics.seedbench import IMAGE_DIMENSIONS, VIDEO_DIMENSIONS
from services.contracts import ImageRef, Item
from services.data.readers.base import Notes
from services.data.readers.benchmarks.files import (
    ALL_PICTURES,
    LETTER_PROMPT,
    SPREAD_FRAMES,
    Questions,
    Row,
    lettered,
    make_item,
    text_of,
    video_frames,
)
from services.data.readers.corpus_files import unique_ids
from services.errors import ConfigError, DataError

FILE = "SEED-Bench.json"
IMAGES = "SEED-Bench-image"
PARTS = ("image", "video", "all")
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


class SeedBench(Questions):
    """Questions with four choices."""

    layout: ClassVar[str] = f"{FILE}, with {IMAGES}/ of pictures"
    prompt: ClassVar[str] = f"{{question}}\n{{options, one a line}}\n{LETTER_PROMPT}"
    shows: ClassVar[str] = f"{ALL_PICTURES}; {SPREAD_FRAMES}, within the question's segment"

    @cached_property
    def _path(self) -> Path:
        return self.settings.root if self.settings.root.is_file() else self.settings.root / FILE

    @cached_property
    def _content(self) -> dict[str, Any]:
        content = self.shared.json(self._path)
        if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
            raise DataError(f"{self._path}: must be an object with a list 'questions'")
        return content

    @cached_property
    def _questions(self) -> list[Row]:
        part = self.settings.part
        if part not in PARTS:
            raise ConfigError(f"options.part={part!r} is not one of {', '.join(PARTS)}")
        return [q for q in self._content["questions"] if part in ("all", q.get("data_type"))]

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Id -> place among the questions of the chosen part."""
        return unique_ids(question.get("question_id") for question in self._questions)

    def read(self, question_id: str, notes: Notes) -> Item:  # noqa: ARG002 - one file, and pictures of their own
        """The question with its picture, or frames of its video."""
        record = self._questions[self.ids[question_id]]
        where = f"{self._path}: question {question_id!r}"
        text, answer = text_of(record, "question", where), text_of(record, "answer", where).upper()
        options = lettered([record[name] for name in _CHOICES if record.get(name) is not None])
        if answer not in {option[0] for option in options}:
            raise DataError(f"{where}: the answer {answer!r} is no letter of its {len(options)} choices")
        dimension = self._dimension(record, where)
        return make_item(
            question_id,
            self._pictures(record, dimension, where),
            "\n".join([text, *options, LETTER_PROMPT]),
            kind=dimension,
            text=text,
            answer=answer,
            options=options,
        )

    @cached_property
    def _dimensions(self) -> dict[int, str]:
        """Number -> name of a type, as the file itself says: releases number them differently."""
        names = self._content.get("question_type")
        if not isinstance(names, dict) or not all(isinstance(number, int) for number in names.values()):
            raise DataError(f"{self._path}: 'question_type' must be an object of names and numbers, got {names!r:.80}")
        unknown = sorted(set(names) - {*IMAGE_DIMENSIONS, *VIDEO_DIMENSIONS})
        if unknown:
            raise DataError(f"{self._path}: question_type names {unknown}, which the benchmark does not have")
        return {number: name for name, number in names.items()}

    def _dimension(self, record: Row, where: str) -> str:
        number = record.get("question_type_id")
        if number not in self._dimensions:
            raise DataError(f"{where}: question_type_id={number!r} is not one of {sorted(self._dimensions)}")
        return self._dimensions[number]

    def _pictures(self, record: Row, dimension: str, where: str) -> tuple[ImageRef, ...]:
        base = self._path.parent
        names = record.get("data_id")
        names = [str(name) for name in names] if isinstance(names, list) else [text_of(record, "data_id", where)]
        if record.get("data_type") == "video":
            video = self.settings.folder(self.settings.videos, base / "videos") / names[0]
            in_frames = dimension == "Procedure Understanding"
            return _segment(video, record.get("segment"), self.settings.frames, where, in_frames=in_frames)
        folder = self.settings.folder(self.settings.images, base / IMAGES)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise DataError(
                f"{folder / missing[0]}: there is no such file ({where}); options.images names the folder of the images"
            )
        return tuple(ImageRef(path=str(folder / name)) for name in names)


def _segment(path: Path, segment: Any, frames: int, where: str, *, in_frames: bool) -> tuple[ImageRef, ...]:
    """Evenly spaced frames of a video, or of its part from one second (or frame) to another."""
    everything = video_frames(path, frames, where)
    if not segment:
        return everything
    if not isinstance(segment, list) or len(segment) != 2:
        raise DataError(f"{where}: 'segment' must be [first, last], got {segment!r:.60}")
    from services.data.videos import frame_times

    times = np.asarray(frame_times(path), dtype=np.float64)
    places = np.arange(len(times)) if in_frames else times - times[0]
    start, end = (float(place) for place in segment)
    inside = np.flatnonzero((places >= start) & (places <= end))
    if not len(inside):
        raise DataError(
            f"{where}: no frame of {path} lies within its segment {segment}; the last one is {places[-1]:g}"
        )
    chosen = inside[np.linspace(0, len(inside) - 1, min(frames, len(inside))).astype(int)]
    return tuple(ImageRef(path=str(path), frame=int(frame)) for frame in chosen)
