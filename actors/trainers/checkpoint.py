"""Checkpoints of one role: what is trained, the optimiser, the generators; complete or not there at all.

A checkpoint is a folder ``step-<n>`` with ``weights.safetensors`` (trained parameters and buffers),
``ema.safetensors``, ``optimizer.safetensors``, ``state.json`` and, written last, ``manifest.json`` with the size and
sha256 of every file. It is written under another name, flushed, and renamed, so a kill at any instant leaves either
the whole or something that is not taken for a checkpoint. Nothing is unpickled.

Tensors are whole and go by the module's own names, whatever backend trained them: a checkpoint is resumed by any
backend and any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.trainers.loop import LoopState, TrainLoop
from actors.trainers.saved import AVERAGE, OPTIMIZER, WEIGHTS, gathered_problem, written_problem
from actors.trainers.tensors import assign, saved_tensors, whole
from configs.paths import as_run
from services.errors import ResumeError, WeightsError

_log = logging.getLogger("loom3d")
_MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint belongs to: it may only be resumed by a run of the same settings and data."""

    settings: Mapping[str, Any]
    """Flat settings that decide the training, e.g. {"trainer.lr": 0.001}; JSON values."""
    plan: str
    """Digest of the training plan, which covers the manifests and the quarantine list."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of settings: what a checkpoint counts as trained with that was written before there was such a setting."""

    def digest(self) -> str:
        """Hex sha256 of the settings."""
        return hashlib.sha256(json.dumps(dict(self.settings), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Found:
    """A valid checkpoint on disk."""

    folder: Path
    step: int
    manifest: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one role in one folder: the newest ``keep``, and the best one."""

    def __init__(self, folder: Path, identity: Identity, *, keep: int) -> None:
        self.folder, self.identity, self.keep = folder, identity, max(1, keep)

    # -- writing ---------------------------------------------------------------------------------------------

    def save(self, loop: TrainLoop, *, best: bool, drop: bool = True) -> Path:
        """Write the loop's state and return its folder. Every rank calls it; rank 0 writes.

        Then what is no longer kept is removed, unless ``drop`` is false: a run of several roles decides that itself,
        with :meth:`drop_except`. WeightsError on every rank when the tensors are not all there; then nothing is left of
        it, and the newest checkpoint is still the one before.
        """
        backend = loop.backend
        files = {WEIGHTS: backend.weights(), OPTIMIZER: backend.optimizer_state()}
        if loop.average is not None:
            files[AVERAGE] = whole(loop.average.weights, keep=backend.rank == 0)
        state = {"loop": loop.state.as_dict(), "random": backend.exchange(loop.random.state())}
        name, problem = f"step-{loop.state.step:08d}", ""
        if backend.rank == 0:
            problem = gathered_problem(loop.module, files)
            problem = problem or self._write(name, loop.state.step, files, state, best)
            if drop and not problem:
                self._drop()
        problem = backend.exchange(problem)[0]
        if problem:
            raise WeightsError(
                f"{self.folder / name} was not saved, since it would be broken ({problem}). The checkpoints before it "
                "stay; the disk may be failing, or the backend gathers wrongly: resume with another one (backend=fsdp2)"
            )
        return self.folder / name

    def _write(
        self, name: str, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], best: bool
    ) -> str:
        """Write a checkpoint whole; returns what is wrong with what was written, and then leaves nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".writing-{name}-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for file, tensors in files.items():
            save_file(dict(tensors), draft / file)
        problem = written_problem(draft, files)
        if problem:
            shutil.rmtree(draft)
            return problem
        (draft / "state.json").write_text(json.dumps(state))
        manifest = {
            "format": _FORMAT,
            "step": step,
            "best": best,
            "settings": dict(self.identity.settings),
            "settings_digest": self.identity.digest(),
            "plan": self.identity.plan,
            "files": {path.name: _fingerprint(path) for path in sorted(draft.iterdir())},
        }
        for path in draft.iterdir():
            _flush(path)
        (draft / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        _flush(draft / _MANIFEST)
        _flush(draft)
        final = self.folder / name
        if final.exists():  # an earlier life of this run got as far as this step
            shutil.rmtree(final)
        draft.rename(final)
        _flush(self.folder)
        return ""

    def _drop(self) -> None:
        """Remove all but the newest ``keep`` and the newest best."""
        found = list(self._candidates())
        best = [f.step for f in found if f.manifest["best"]][:1]
        self.drop_except([f.step for f in found[: self.keep]] + best)

    def drop_except(self, steps: Collection[int]) -> None:
        """Remove the checkpoints of all other steps, and drafts that a killed process left. Called by one rank."""
        for checkpoint in list(self._candidates()):
            if checkpoint.step not in steps:
                shutil.rmtree(checkpoint.folder)
        for draft in self.folder.glob(".writing-*"):
            shutil.rmtree(draft, ignore_errors=True)

    # -- reading ---------------------------------------------------------------------------------------------

    def newest(self) -> Found | None:
        """The newest valid checkpoint, or None. A torn one is skipped with a warning.

        ResumeError if it belongs to other settings or data; the message says which.
        """
        for found in self._valid():
            self._check_identity(found)
            return found
        return None

    def steps(self) -> list[int]:
        """Steps of the valid checkpoints, oldest first. A torn one is skipped with a warning."""
        return [found.step for found in self._valid()][::-1]

    def at(self, step: int) -> Found:
        """The checkpoint of one step. ResumeError if it is missing, torn, or of other settings or data."""
        for found in self._candidates():
            if found.step == step:
                problem = _problem(found)
                if problem:
                    raise ResumeError(f"{found.folder} cannot be resumed: {problem}")
                self._check_identity(found)
                return found
        raise ResumeError(f"{self.folder} has no checkpoint of step {step}; it has {self.steps()}")

    def problem(self, step: int) -> str:
        """Why the checkpoint of ``step`` cannot be read, whatever run it belongs to; "" if it can."""
        found = next((found for found in self._candidates() if found.step == step), None)
        return _problem(found) if found is not None else f"{self.folder} has no readable checkpoint of step {step}"

    def best(self) -> Found | None:
        """The newest valid checkpoint that was the best of its run when it was saved; the newest if none was."""
        for found in self._candidates():
            if found.manifest["best"] and not _problem(found):
                return found
        return self.newest()

    def _valid(self) -> Iterator[Found]:
        """Complete checkpoints, newest first; a torn one is skipped with a warning."""
        for found in self._candidates():
            problem = _problem(found)
            if problem:
                _log.warning("%s is skipped: %s", found.folder, problem)
            else:
                yield found

    def _candidates(self) -> Iterator[Found]:
        """Folders with a readable manifest, newest first."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                manifest = json.loads((folder / _MANIFEST).read_text())
                yield Found(folder=folder, step=int(manifest["step"]), manifest=manifest)
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s is skipped: its %s cannot be read (%s)", folder, _MANIFEST, error)

    def _check_identity(self, found: Found) -> None:
        ours, defaults = (json.loads(json.dumps(dict(s))) for s in (self.identity.settings, self.identity.defaults))
        theirs = {key: value for key, value in defaults.items() if key in ours} | found.manifest["settings"]
        # Older checkpoints name other runs' parts by their folders, which may have been moved since.
        theirs = {key: as_run(value) if isinstance(value, str) else value for key, value in theirs.items()}
        differing = [
            f"{key}: {theirs.get(key)!r} then, {ours.get(key)!r} now"
            for key in sorted({*theirs, *ours})
            if theirs.get(key) != ours.get(key)
        ]
        if not differing and found.manifest["plan"] != self.identity.plan:
            differing = ["the data or the quarantine list (the plan's digest changed)"]
        if differing:
            raise ResumeError(
                f"{found.folder} belongs to another run: {'; '.join(differing)}. Choose another `name=`, set "
                "trainer.resume=never to start anew, or restore these settings"
            )


def resume(loop: TrainLoop, found: Found) -> None:
    """Put the loop where the checkpoint left it, to the bit for the same backend and number of ranks."""
    tensors = _read(found, WEIGHTS)
    _check_names(found, saved_tensors(loop.module), tensors)
    loop.backend.load_weights(tensors)
    loop.backend.load_optimizer_state(_read(found, OPTIMIZER))
    if loop.average is not None:
        averaged = _read(found, AVERAGE)
        for name, tensor in loop.average.weights.items():
            assign(tensor, averaged[name])
    state = json.loads((found.folder / "state.json").read_text())
    loop.state = LoopState(**state["loop"])
    # A rank beyond those that saved keeps its freshly seeded generators.
    if loop.backend.rank < len(state["random"]):
        loop.random.load(state["random"][loop.backend.rank])


def load_weights(module: nn.Module, found: Found, *, averaged: bool = False) -> None:
    """The checkpoint's weights and buffers into ``module``; with ``averaged``, the moving average where there is one.

    ResumeError lists what is missing or left over.
    """
    tensors = _read(found, WEIGHTS)
    if averaged and AVERAGE in found.manifest["files"]:
        tensors |= _read(found, AVERAGE)
    own = saved_tensors(module)
    _check_names(found, own, tensors)
    for name, target in own.items():
        assign(target, tensors[name])


def _check_names(found: Found, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    if own.keys() != tensors.keys():
        raise ResumeError(
            f"{found.folder} does not fit the model: missing {sorted(own.keys() - tensors.keys())[:10]}, "
            f"left over {sorted(tensors.keys() - own.keys())[:10]}"
        )


def _read(found: Found, name: str) -> dict[str, Tensor]:
    path = found.folder / name
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path} cannot be read: {error}") from error


def _problem(found: Found) -> str:
    """Why a checkpoint is not valid; "" if it is."""
    if found.manifest.get("format") != _FORMAT:
        return f"its format is {found.manifest.get('format')!r}, this version reads {_FORMAT}"
    for name, expected in found.manifest["files"].items():
        path = found.folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _fingerprint(path) != expected:
            return f"{name} is torn or changed (its size or sha256 differs from the manifest)"
    return ""


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
