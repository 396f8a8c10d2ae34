"""What ``loom3d ask`` is asked and what it answers, whatever kind of model is behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import ConfigError, RunConfig
from models.text.template import IMAGE_MARK
from services.data.readers.corpus_video import VIDEO_MARK
from services.errors import DataError

if TYPE_CHECKING:
    from services.streams.text import TextColumns

CAPTION = ("Describe the picture in a few words.", "Describe the place in one sentence.")
"""What ``--caption`` asks of one picture, and of several: as the conversations made of scenes ask it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Features:
    """Records of frozen encoders that an answer needed."""

    cached: int
    """Those that the cache had."""
    computed: int
    """Those that were missing, with what they are made of in turn."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The answers about one set of views."""

    views: Sequence[str]
    """Names of the pictures in order; an imagined one is "imagined"."""
    answers: Sequence[Answer]
    pose: Sequence[Sequence[float]] | None = None
    """Of the imagined camera in the reference camera's frame."""
    features: Features | None = None
    """Where the feature service was asked."""
    remarks: Sequence[str] = ()
    """What the user should know of how the views were read."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        answers = [{"question": a.question, "answer": a.answer} for a in self.answers]
        made: dict[str, Any] = {"views": list(self.views), "pose": self.pose, "answers": answers}
        if self.features is not None:
            made["features"] = {"cached": self.features.cached, "computed": self.features.computed}
        return made | ({"remarks": list(self.remarks)} if self.remarks else {})


def answered(
    questions: Sequence[str], generate: Callable[..., Sequence[Sequence[int]]], text: TextColumns, config: RunConfig
) -> list[Answer]:
    """Greedy answers in words, of at most ``generate.max_new_tokens`` tokens, up to the end of turn.

    ``generate`` gives the token ids of each question's answer for ``max_new_tokens``, ``stop`` and ``batch_size``.
    """
    found = generate(
        max_new_tokens=config.generate.max_new_tokens,
        stop={text.end_of_turn},
        batch_size=config.generate.batch_size,
    )
    return [
        Answer(question=question, answer=text.decode(ids).strip())
        for question, ids in zip(questions, found, strict=True)
    ]


def read_questions(given: Sequence[str], file: str) -> list[str]:
    """Questions of the command line, then those of a file, one a line.

    DataError when the file cannot be read; ConfigError for a question that has no words.
    """
    questions = [text.strip() for text in given]
    if file:
        path = Path(file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); write one question a line, as UTF-8") from error
        questions += [line.strip() for line in lines if line.strip()]
        if not any(line.strip() for line in lines):
            raise DataError(f"{path}: holds no question; write one a line")
    for text in questions:
        words = text.replace(IMAGE_MARK, "").replace(VIDEO_MARK, "").strip()
        if not words:
            marks = f"; {text!r} only says where the pictures stand" if text else ""
            raise ConfigError(f"--question is empty{marks}: write what to ask")
    return questions


def write_answers(out: Path, run_name: str, asked: Sequence[Asked]) -> Path:
    """The answers as a JSON file; returns it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps({"run": run_name, "asked": [part.as_dict() for part in asked]}, indent=1))
    temporary.replace(out)
    return out
