"""Checkpoints of several roles as one: a step counts only when every role has written its own.

``checkpoints/joint.json`` names the steps that can be resumed, with the digest of every role's manifest; the
coordinating rank writes it after all roles have saved, and only then is anything removed. So a kill at any instant
leaves the last joint step whole. ``checkpoints/generation`` counts the lives of the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.bridge.link import Link
from actors.trainers.checkpoint import Checkpoints, Found
from services.errors import ResumeError

if TYPE_CHECKING:
    from actors.trainers.loop import TrainLoop

_log = logging.getLogger("loom3d")
_MANIFEST = "joint.json"
_GENERATION = "generation"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class JointStep:
    """A step at which all roles were saved."""

    step: int
    best: bool
    generation: int
    roles: Mapping[str, str]
    """Role -> sha256 of the manifest of its checkpoint."""


def read_joint(folder: Path) -> list[JointStep]:
    """The joint steps in ``folder``, oldest first; none where nothing was saved yet. ResumeError if unreadable."""
    path = folder / _MANIFEST
    try:
        saved = json.loads(path.read_text())
        if saved["format"] != _FORMAT:
            raise ResumeError(f"{path} has the format {saved['format']!r}, this version reads {_FORMAT}")
        return [JointStep(**entry) for entry in saved["steps"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{path} cannot be read ({error}); restore it, or set trainer.resume=never to start anew"
        ) from error


def next_generation(folder: Path) -> int:
    """Count one more life of the run whose checkpoints are in ``folder``; the driver calls it before every start."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _GENERATION
    try:
        generation = int(path.read_text()) + 1 if path.exists() else 1
    except ValueError as error:
        raise ResumeError(f"{path} holds {path.read_text()[:40]!r} instead of a number") from error
    _write(path, str(generation))
    return generation


class JointCheckpoints:
    """The checkpoints of one role of several, as a rank of that role sees them. All ranks of all roles call alike."""

    def __init__(self, folder: Path, own: Checkpoints, link: Link, *, keep: int) -> None:
        """``folder`` holds the joint manifest; ``own`` are the checkpoints of this rank's role, in one of its own."""
        self.folder, self.own, self.link, self.keep = folder, own, link, max(1, keep)

    def save(self, loop: TrainLoop, *, best: bool) -> None:
        """Save this role, then, once all have, the joint manifest; then remove what is no longer kept."""
        step = loop.state.step
        path = self.own.save(loop, best=best, drop=False)
        mine = _digest(path) if self.link.rank == 0 else ""
        saved = self.link.exchange("saved", step, [self.link.role, mine])
        kept: list[int] = []
        if self.link.coordinator:
            roles = {role: digest for role, digest in saved if digest}
            entry = JointStep(step=step, best=best, generation=self.link.generation, roles=roles)
            steps = _retained([*(old for old in read_joint(self.folder) if old.step < step), entry], self.keep)
            _write(
                self.folder / _MANIFEST,
                json.dumps(
                    {"format": _FORMAT, "steps": [{**vars(s), "roles": dict(s.roles)} for s in steps]}, indent=1
                ),
            )
            kept = [s.step for s in steps]
        kept = self.link.exchange("recorded", step, kept)[0]
        if self.link.rank == 0:
            self.own.drop_except(kept)

    def newest(self) -> Found | None:
        """The role's checkpoint of the newest step that every role can read; None to start anew.

        ResumeError if it belongs to other settings or data.
        """
        limit: int | None = None
        while True:
            mine = self._newest_of_own(limit) if self.link.rank == 0 else None
            proposals = self.link.exchange("resume", -1, [self.link.rank == 0, mine])
            steps = [step for speaks, step in proposals if speaks]
            if any(step is None for step in steps):
                return None
            if len(set(steps)) == 1:
                return self.own.at(steps[0])
            limit = min(steps)

    def _newest_of_own(self, limit: int | None) -> int | None:
        """The newest joint step up to ``limit`` that this role can read."""
        for entry in reversed(read_joint(self.folder)):
            if limit is not None and entry.step > limit:
                continue
            problem = self.own.problem(entry.step) or self._differs(entry)
            if not problem:
                return entry.step
            _log.warning("step %d of role %s is skipped: %s", entry.step, self.link.role, problem)
        return None

    def _differs(self, entry: JointStep) -> str:
        """Why the role's checkpoint is not the one that the joint manifest means; "" if it is."""
        path = self.own.folder / f"step-{entry.step:08d}"
        if entry.roles.get(self.link.role) == _digest(path):
            return ""
        return f"its manifest is not the one that {self.folder / _MANIFEST} names"


def joint_best(folder: Path) -> int | None:
    """The step to evaluate: the newest that was the best when it was saved, else the newest; None without any."""
    steps = read_joint(folder)
    best = [entry.step for entry in steps if entry.best] or [entry.step for entry in steps]
    return best[-1] if best else None


def _retained(steps: Sequence[JointStep], keep: int) -> list[JointStep]:
    """The newest ``keep`` and the newest best."""
    best = [entry.step for entry in steps if entry.best][-1:]
    newest = [entry.step for entry in steps][-keep:]
    return [entry for entry in steps if entry.step in best or entry.step in newest]


def _digest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


def _write(path: Path, text: str) -> None:
    """Replace a file whole, on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder: Any = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
