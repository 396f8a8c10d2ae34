"""What a check found, and the list of what to leave out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from services.contracts import DepthRef, ImageRef
from services.errors import DataError


class Fault(StrEnum):
    """Kinds of fault, in the order in which they are reported."""

    LEFT_OUT = "left out by the reader"
    MISSING = "missing file"
    UNREADABLE = "unreadable or truncated file"
    SIZE = "size against intrinsics"
    POSE = "pose not rigid or not finite"
    DEPTH_SCALE = "wrong depth scale"
    DUPLICATE = "identical frames"
    NEAR_DUPLICATE = "nearly identical frames"
    NO_OVERLAP = "no overlap with any other view"
    NO_ANSWER = "conversation without an answer"
    EVALUATION = "also in an evaluation set"


WARNINGS = frozenset({Fault.NEAR_DUPLICATE})
"""Faults that are worth a look but leave a sample usable: in the report, not in the quarantine."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of a scene (``view`` None) or of one of its views."""

    fault: Fault
    scene: str
    reason: str
    view: int | None = None
    pictures: tuple[ImageRef, ...] = ()
    """What to show; may be unreadable itself."""
    depth: DepthRef | None = None

    @property
    def id(self) -> str:
        """``scene``, or ``scene#view3`` for a view by its index."""
        return self.scene if self.view is None else f"{self.scene}#view{self.view}"

    @property
    def quarantined(self) -> bool:
        """Whether the finding puts its scene or view on the quarantine list."""
        return self.fault not in WARNINGS


def write_quarantine(findings: Iterable[Finding], path: Path, source: str) -> int:
    """Write one id a line, as ``source/scene`` or ``source/scene#view3``, below its reason; returns their number.

    Warnings are comments only. A view of a scene that is listed as a whole is not listed again.
    """
    found = list(findings)
    whole = {finding.scene for finding in found if finding.quarantined and finding.view is None}
    lines = ["# Scenes and single views to leave out. Use with data.quarantine=<this file>."]
    written: set[str] = set()
    for finding in found:
        reason = " ".join(finding.reason.split())
        lines.append(f"# {finding.id}: {finding.fault}: {reason}")
        covered = finding.scene in whole and finding.view is not None
        if finding.quarantined and not covered and finding.id not in written:
            lines.append(f"{source}/{finding.id}")
            written.add(finding.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)
    return len(written)


def read_ids(path: Path) -> Sequence[str]:
    """One id a line, in order, without comments and empty lines. DataError names a file that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: the list of ids cannot be read ({error}); it is a text file, one id a line"
        ) from error
    ids = []
    for line in text.splitlines():
        entry = "" if line.lstrip().startswith("#") else line.split(" #")[0].split("\t#")[0].strip()
        if entry:
            ids.append(entry)
    return ids
