"""From a run's config to manifests: makes rooms on demand, indexes what is new, rereads what changed.

Manifests lie under ``<storage.root>/manifests``, one for each combination of source, folder and settings.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.schema import RoomsConfig, RunConfig, SourceConfig, StorageConfig
from services.data.ingest import Progress, index_reader
from services.data.manifest import LAYOUT, Changes, Manifest
from services.data.readers import Reader, open_reader, reader_class
from services.errors import ConfigError, DataError
from services.telemetry import events


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What indexing or revalidating a source found."""

    source: str
    format: str
    root: str
    path: str
    """File of the manifest."""
    digest: str
    entries: int
    views: int
    splits: dict[str, int] = field(default_factory=dict)
    classes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Views that were left out, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    """Scenes or items that were left out -> why."""
    changed: dict[str, str] = field(default_factory=dict)
    """Entries that were read again -> the file that changed."""
    reused: int = 0
    """Entries taken from the manifest that was there."""
    touched: int = 0
    """Files with new times but the same content."""
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """The report as lines of text for a terminal."""
        splits = ", ".join(f"{name} {count}" for name, count in sorted(self.splits.items()))
        text = [
            f"{self.source} ({self.format}): {self.entries} entries, {self.views} views; {splits}",
            f"  root {self.root}",
            f"  digest {self.digest[:16]}, {self.reused} entries unchanged, {self.seconds:.1f} s",
        ]
        for reason, count in self.dropped.items():
            text.append(f"  left out {count} views {reason}, e.g. {self.examples.get(reason, '?')}")
        text += [f"  changed: {entry_id} ({path})" for entry_id, path in list(self.changed.items())[:10]]
        text += [f"  broken: {entry_id}: {reason}" for entry_id, reason in list(self.broken.items())[:10]]
        return text


def open_sources(
    config: RunConfig, *, revalidate: bool = True, progress: Progress | None = None
) -> dict[str, Manifest]:
    """The manifest of every source of the run.

    Args:
        config: The run.
        revalidate: Compare the files behind existing manifests with their stamps. Worker processes that start after
            the driver did so may pass False.
        progress: Called with (done, total, what is done) while rooms are made or a source is read.

    Raises:
        ConfigError: No source is configured, or one of its settings is unknown.
        DataError: A source cannot be read.
    """
    return {name: manifest for name, (manifest, _) in _open(config, revalidate, progress).items()}


def run_index(config: RunConfig, progress: Progress | None = None) -> list[IndexReport]:
    """Index or revalidate every source of the run and say what was found (``loom3d data index``)."""
    return [report for _, report in _open(config, True, progress).values()]


def _open(config: RunConfig, revalidate: bool, progress: Progress | None) -> dict[str, tuple[Manifest, IndexReport]]:
    sources = config.data.sources
    if not sources:
        raise ConfigError("data.sources is empty: name at least one source, e.g. data=rooms")
    opened: dict[str, tuple[Manifest, IndexReport]] = {}
    # Questions are made from the scenes of other sources, which are opened before them.
    for name in sorted(sources, key=lambda name: is_made_of(sources[name]) != ""):
        source = sources[name]
        with events.span("index", source=name) as fields:
            if is_made_of(source):
                resolved = _with_questions(
                    name, config, {of: manifest for of, (manifest, _) in opened.items()}, progress
                )
            else:
                with _settings_of(name):
                    resolved = resolve_source(source, config.data.rooms, config.storage)
                if not source.root and (revalidate or not manifest_path(name, resolved, config.storage).exists()):
                    ensure_rooms(config.data.rooms, config.storage, _naming("making rooms", progress))
            manifest, report = index_source(
                name,
                resolved,
                config.storage,
                max_broken=config.data.max_broken,
                revalidate=revalidate,
                progress=_naming(f"indexing {name}", progress),
            )
            fields.update(entries=len(manifest), reused=report.reused)
            opened[name] = (manifest, report)
    return {name: opened[name] for name in sources}


def is_made_of(source: SourceConfig) -> str:
    """Name of the source whose scenes this one's questions are made from; "" for every other source."""
    return str(source.options.get("of", "")) if source.format == "questions" and not source.root else ""


def _with_questions(
    name: str, config: RunConfig, opened: dict[str, Manifest], progress: Progress | None
) -> SourceConfig:
    """The source with the folder of its questions, which are made where they are not there."""
    from services.data.questions.ondemand import ensure_annotations

    source = config.data.sources[name]
    of = is_made_of(source)
    if of not in opened or is_made_of(config.data.sources[of]):
        scenes = [other for other in config.data.sources if not is_made_of(config.data.sources[other])]
        raise ConfigError(f"data.sources.{name}.options.of={of!r} is not one of the sources {', '.join(scenes)}")
    questions = config.data.questions
    most = source.options.get("max_views", 0)
    if not isinstance(most, int) or most < 0:
        raise ConfigError(f"data.sources.{name}.options.max_views={most!r} must be a whole number, 0 for no limit")
    if most:
        questions = dataclasses.replace(questions, max_views=min(most, questions.max_views))
    folder = ensure_annotations(opened[of], questions, config.storage, _naming(f"asking about {of}", progress))
    return dataclasses.replace(source, root=str(folder))


def _naming(what: str, progress: Progress | None) -> Progress | None:
    """The callback, told what is done instead of to which scene or item."""
    return None if progress is None else lambda done, total, _: progress(done, total, what)


def index_source(
    name: str,
    source: SourceConfig,
    storage: StorageConfig,
    *,
    max_broken: float,
    revalidate: bool = True,
    workers: int = 8,
    progress: Progress | None = None,
) -> tuple[Manifest, IndexReport]:
    """The manifest of one source, from the file that is there or made anew, and a report.

    A manifest that is damaged is made again. Of one that is there only entries whose files changed are read again,
    besides those that are new or were broken.
    """
    started = time.monotonic()
    root = Path(source.root).expanduser().absolute()
    storage_root = Path(storage.root).expanduser()
    with _settings_of(name):
        reader = open_reader(root, source, cache=storage_root / "data" / "derived" / name)
    settings = settings_digest(source, root, reader.version)
    path = manifest_path(name, source, storage)
    with exclusive(path.with_suffix(".lock")):
        old = _load_valid(path, settings)
        if old is not None and not revalidate:
            return old, _report(source, path, old, None, len(old), started)
        changes = old.revalidate(workers) if old is not None else None
        with _settings_of(name):
            reader.prepare()
        keep = _unchanged(reader, changes)
        if changes is not None and keep == changes.manifest.ids == reader.list_ids():
            manifest = changes.manifest
        else:
            manifest = index_reader(
                name,
                reader,
                settings,
                max_broken=max_broken,
                previous=changes.manifest if changes is not None else None,
                keep=keep,
                workers=workers,
                progress=progress,
            )
        if changes is None or changes.touched or manifest is not changes.manifest:
            manifest.save(path)
    return manifest, _report(source, path, manifest, changes, len(keep), started)


@contextmanager
def _settings_of(name: str) -> Iterator[None]:
    """A reader knows its settings, but not what its source is called: what it refuses gets the whole key."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.sources.{name}.{error}") from error


def resolve_source(source: SourceConfig, rooms: RoomsConfig, storage: StorageConfig) -> SourceConfig:
    """The source with an absolute root: that of procedural rooms without one is where :func:`ensure_rooms` makes them.

    ConfigError when the root of another format is empty.
    """
    if source.root:
        return dataclasses.replace(source, root=str(Path(source.root).expanduser().absolute()))
    if source.format != "rooms":
        raise ConfigError(f"root is empty; a source of format {source.format!r} needs the folder or file it lies in")
    return dataclasses.replace(source, root=str(rooms_folder(rooms, storage)))


def rooms_folder(rooms: RoomsConfig, storage: StorageConfig) -> Path:
    """Where the rooms of this config lie: named by everything that determines them."""
    from services.data.rooms import rooms_digest

    return Path(storage.root).expanduser().absolute() / "data" / f"rooms-{rooms_digest(rooms)}"


def ensure_rooms(rooms: RoomsConfig, storage: StorageConfig, progress: Progress | None = None) -> Path:
    """Make the rooms of this config unless they are there; returns their folder."""
    from services.data.rooms import make_rooms

    folder = rooms_folder(rooms, storage)
    with exclusive(folder.with_suffix(".lock")):
        return make_rooms(rooms, folder, progress=progress)


def manifest_path(name: str, source: SourceConfig, storage: StorageConfig) -> Path:
    """The file of a source's manifest, whether it is there or not. ``source`` has its root."""
    root = Path(source.root).expanduser().absolute()
    version = reader_class(source.format).version
    folder = Path(storage.root).expanduser().absolute() / "manifests"
    return folder / f"{name}-{settings_digest(source, root, version)[:16]}.arrow"


def settings_digest(source: SourceConfig, root: Path, version: int) -> str:
    """What a manifest depends on beside the content of files: the reader and how it was asked to read."""
    settings: dict[str, Any] = dataclasses.asdict(source)
    # How samples are drawn of a source says nothing about what it holds.
    del settings["weight"], settings["interval"]
    settings |= {"root": str(root), "reader": version, "layout": LAYOUT}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file lock: of several processes that start at once, one makes what the others then find."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); storage.root must be a folder that can be"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load_valid(path: Path, settings: str) -> Manifest | None:
    if not path.exists():
        return None
    try:
        manifest = Manifest.load(path)
    except DataError as error:
        # Everything in it can be made again from the source, so a damaged manifest costs time and nothing else.
        logging.getLogger(__name__).warning("%s", error)
        return None
    return manifest if manifest.facts.settings == settings else None


def _unchanged(reader: Reader, changes: Changes | None) -> list[str]:
    """Ids of the entries that need not be read again, in the reader's order."""
    if changes is None or changes.shared:
        return []
    shared = {str(path) for path in reader.shared.files}
    guarded = {changes.manifest.absolute(guard.path) for guard in changes.manifest.shared_guards()}
    if not shared <= guarded:
        return []
    manifest = changes.manifest
    return [i for i in reader.list_ids() if i in manifest and i not in changes.changed]


def _report(
    source: SourceConfig, path: Path, manifest: Manifest, changes: Changes | None, reused: int, started: float
) -> IndexReport:
    return IndexReport(
        source=manifest.name,
        format=source.format,
        root=str(manifest.root),
        path=str(path),
        digest=manifest.digest,
        entries=len(manifest),
        views=manifest.count_views(),
        splits=manifest.splits(),
        classes=sum(bool(name) for name in manifest.classes),
        dropped=dict(manifest.dropped()),
        examples=manifest.facts.examples,
        broken=manifest.facts.broken,
        changed=changes.changed if changes is not None else {},
        reused=reused,
        touched=changes.touched if changes is not None else 0,
        seconds=time.monotonic() - started,
    )
