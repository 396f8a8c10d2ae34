"""Questions for a language model that starts at random: few types, few words, with and without pictures.

The answers are those of `loom3d data questions` about the same rooms, and so are the splits. Words are fewer because
a model that reads bytes spends its few steps on them otherwise; without pictures the same questions make an image-blind
model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Type -> what its text must hold, and the words in its place.
WORDS: Mapping[str, tuple[str, str]] = {
    "room_size_estimation": (r"How many square metres of floor", "Floor, square metres?"),
    "object_abs_distance": (r"between the (.+) and the (.+), measured", r"Metres, {} to {}?"),
}
ASKED, BLIND = "asked", "blind"
"""Folders with pictures and without."""


def terse(kind: str, text: str) -> str:
    """The question in few words. ValueError for a text that is not what its type asks."""
    pattern, words = WORDS[kind]
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"a question of {kind} was expected to read like {pattern!r}, got {text!r}")
    return words.format(*found.groups())


def rewritten(record: Mapping[str, Any], *, pictures: bool) -> dict[str, Any]:
    """A record of `loom3d data questions` that asks the same in few words."""
    text = terse(record["question_type"], record["question"])
    images = record["images"] if pictures else []
    asked = f"{'<image>' * len(images)}\n{text}" if images else text
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": record["answer"]}]
    made = {**record, "question": text, "conversations": turns, "images": images}
    return made if images else {key: value for key, value in made.items() if key not in ("images", "views")}


def write_questions(made: Path, root: Path) -> dict[str, int]:
    """Rewrite the questions below ``made`` into ``<root>/asked`` and ``<root>/blind``; how many, by split."""
    counts: dict[str, int] = {}
    for source in sorted(made.glob("questions-*.jsonl")):
        records = [json.loads(line) for line in source.read_text().splitlines()]
        kept = [record for record in records if record["question_type"] in WORDS]
        counts[source.stem.removeprefix("questions-")] = len(kept)
        for folder, pictures in ((ASKED, True), (BLIND, False)):
            _write(root / folder / source.name, [rewritten(record, pictures=pictures) for record in kept])
    return counts


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all, and untouched where they are the same: an index tells files by their times."""
    text = "".join(f"{json.dumps(record)}\n" for record in records)
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    half.write_text(text)
    half.replace(path)
