"""As much of a manifest and its entries as a plan reads."""

from __future__ import annotations

from dataclasses import dataclass

from services.contracts import Split


@dataclass(frozen=True)
class Entry:
    id: str
    n_views: int
    kind: str = "scene"
    split: Split = Split.TRAIN
    length: int = 0


class Source:
    """As much of a manifest as a plan reads."""

    def __init__(self, name: str, entries: list[Entry]) -> None:
        self.entries = entries
        self.digest = f"digest of {name}"

    def of_split(self, split: Split) -> list[Entry]:
        return [entry for entry in self.entries if entry.split == split]
