"""Questions of a source made where a run needs them: below ``storage.root``, in a folder named by their origin."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from configs.schema import QuestionsConfig, StorageConfig
from services.contracts import Scene
from services.data.ingest import Progress
from services.data.manifest import Manifest
from services.data.questions.write import annotate, write_annotations
from services.errors import DataError

VERSION = 2
"""Raised when the same scenes get other questions or captions."""


def annotations_folder(manifest: Manifest, config: QuestionsConfig, storage: StorageConfig) -> Path:
    """Where the questions of this source lie: the scenes' content, where they lie, and the settings name it."""
    # The files name pictures by absolute paths, so a source that was moved gets files of its own.
    what = [VERSION, manifest.digest, str(manifest.root), dataclasses.asdict(config)]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return Path(storage.root).expanduser().absolute() / "data" / f"questions-{manifest.name}-{digest[:16]}"


def ensure_annotations(
    manifest: Manifest, config: QuestionsConfig, storage: StorageConfig, progress: Progress | None = None
) -> Path:
    """Make the questions and captions of a source's scenes unless they are there; returns their folder.

    DataError when none of its scenes has instances with masks, or when a mask cannot be read.
    """
    from services.data.sources import exclusive

    # A limit that no scene reaches makes no difference, so it shall make no other folder.
    most = max((entry.n_views for entry in manifest.entries), default=1)
    config = dataclasses.replace(config, max_views=min(config.max_views, most))
    folder = annotations_folder(manifest, config, storage)
    with exclusive(folder.with_suffix(".lock")):
        if folder.is_dir():
            return folder
        made = annotate(_scenes(manifest, progress), config)
        if not made.scenes:
            raise DataError(
                f"source {manifest.name!r} ({manifest.root}): no scene has instances with masks, which questions and "
                "captions are made from; name another source in options.of"
            )
        half = folder.with_name(f".{folder.name}")
        shutil.rmtree(half, ignore_errors=True)
        write_annotations(made, half)
        half.rename(folder)  # whole, or not there at all
    return folder


def _scenes(manifest: Manifest, progress: Progress | None) -> Iterator[Scene]:
    ids = [entry.id for entry in manifest.entries if entry.kind == "scene"]
    for number, scene_id in enumerate(ids):
        scene = manifest.scene(scene_id)
        if isinstance(scene, Scene):
            yield scene
        if progress is not None:
            progress(number + 1, len(ids), scene_id)
