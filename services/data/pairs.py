"""The co-visibility index: which two views of a scene see enough of the same surfaces to be a pair.

One Parquet file a source, under ``<storage.root>/pairs``, named by a digest of the manifest's, of the settings
``data.pairs`` and of :data:`VERSION`; a row a pair (scene, i, j, overlap_ij, overlap_ji, angle, distance). While it
is made every finished scene is kept in a folder beside it, so that a build that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from configs import RunConfig
from configs.schema import PairsConfig
from services.contracts import Scene
from services.data.digests import Stamp
from services.data.ingest import Progress
from services.data.manifest import Manifest
from services.data.pairs_scene import SceneFacts, ScenePairs, scene_pairs
from services.data.sources import exclusive
from services.errors import DataError
from services.telemetry import events

VERSION = 1
"""Raised when the same views and settings give other pairs; part of the name of the file."""
SCHEMA = pa.schema(
    [
        ("scene", pa.dictionary(pa.int32(), pa.string())),
        ("i", pa.int32()),
        ("j", pa.int32()),
        ("overlap_ij", pa.float32()),
        ("overlap_ji", pa.float32()),
        ("angle", pa.float32()),
        ("distance", pa.float32()),
    ]
)
_FACTS = b"loom3d"
_log = logging.getLogger(__name__)


class PairIndex:
    """The pairs of one source. All arrays are read-only; pairs of a scene stand together, i < j, in order."""

    def __init__(self, source: str, key: str, parts: list[ScenePairs]) -> None:
        self.source = source
        self.key = key
        """What the index was made from: digest of the manifest's digest, the settings and the version."""
        self.facts = {part.facts.id: part.facts for part in parts}
        """Every scene of the source -> what was found of its views."""
        ends = np.cumsum([0, *(len(part.views) for part in parts)])
        self._range = {
            part.facts.id: slice(int(begin), int(end)) for part, begin, end in zip(parts, ends, ends[1:], strict=False)
        }
        self.views = _joined([part.views for part in parts], (0, 2), np.int32)
        """(P, 2) int32 of all scenes."""
        self.overlaps = _joined([part.overlap for part in parts], (0, 2), np.float32)
        """(P, 2) float32: share of i's known pixels that j sees, and of j's that i sees."""
        self.angles = _joined([part.angle for part in parts], (0,), np.float32)
        """(P,) float32 degrees by which one camera is turned against the other, roll included."""
        self.distances = _joined([part.distance for part in parts], (0,), np.float32)
        """(P,) float32 metres between the camera centres."""
        digest = hashlib.sha256(json.dumps([key, [[i, len(self.of(i))] for i in self.facts]]).encode())
        digest.update(self.views.tobytes())
        self.digest = digest.hexdigest()
        """Names the pairs themselves: equal digests, equal pairs."""

    def __len__(self) -> int:
        return len(self.views)

    def of(self, scene: str) -> np.ndarray:
        """Views (P, 2) int32 of the pairs of a scene; empty for a scene without pairs and for what is no scene."""
        return self.views[self._of(scene)]

    def overlap(self, scene: str) -> np.ndarray:
        """(P, 2) float32 overlap of the pairs :meth:`of` a scene, in both directions."""
        return self.overlaps[self._of(scene)]

    def angle(self, scene: str) -> np.ndarray:
        """(P,) float32 degrees of the pairs :meth:`of` a scene."""
        return self.angles[self._of(scene)]

    def distance(self, scene: str) -> np.ndarray:
        """(P,) float32 metres of the pairs :meth:`of` a scene."""
        return self.distances[self._of(scene)]

    def geometry(self, scene: str, i: int, j: int) -> tuple[float, float]:
        """(degrees, metres) between views i and j of a scene, in either order. DataError when they are no pair."""
        pairs = self.of(scene)
        found = np.flatnonzero((pairs == sorted((i, j))).all(axis=1))
        if not len(found):
            raise DataError(f"source {self.source!r}: views {i} and {j} of {scene!r} are no pair of its index")
        return float(self.angle(scene)[found[0]]), float(self.distance(scene)[found[0]])

    def splits(self) -> dict[str, tuple[int, int, int]]:
        """Split ("none" for scenes of none) -> (scenes, scenes that have pairs, pairs)."""
        scenes, paired, pairs = Counter[str](), Counter[str](), Counter[str]()
        for facts in self.facts.values():
            split = facts.split or "none"
            scenes[split] += 1
            paired[split] += facts.pairs > 0
            pairs[split] += facts.pairs
        return {split: (scenes[split], paired[split], pairs[split]) for split in scenes}

    def broken(self) -> dict[str, str]:
        """``scene#viewN`` -> why that view was left out."""
        return {f"{f.id}#view{number}": why for f in self.facts.values() for number, why in f.broken.items()}

    def missing(self) -> str:
        """In words, what the source lacks for pairs; "" when every scene has some."""
        facts = list(self.facts.values())
        if not facts:
            return f"source {self.source!r} has no scenes (pairs need views with depth and a pose)"
        bare = [f for f in facts if not f.pairs]
        if not bare:
            return ""
        views, seen = sum(f.views for f in bare), sum(f.usable for f in bare)
        lacks = {
            "have no depth": sum(f.without_depth for f in bare),
            "have no pose": sum(f.without_pose for f in bare),
            "cannot be used": sum(len(f.broken) for f in bare),
            "have depth and a pose but share too little, or too much, with any other": seen,
        }
        said = ", ".join(f"{count} {what}" for what, count in lacks.items() if count)
        example = next((f"; {name}: {why}" for f in bare for name, why in _named(f)), "")
        return (
            f"source {self.source!r}: {len(bare)} of {len(facts)} scenes have no pairs; of their {views} views {said} "
            f"(e.g. scene {bare[0].id!r}{example})"
        )

    def save(self, path: Path) -> None:
        """Write the index; a reader sees no file, the old one, or the whole new one. DataError names the file."""
        facts = [dataclasses.asdict(facts) for facts in self.facts.values()]
        names = [name for name, part in self._range.items() for _ in range(part.start, part.stop)]
        columns = [
            pa.array(names, pa.string()).dictionary_encode(),
            *(pa.array(column) for column in (*self.views.T, *self.overlaps.T, self.angles, self.distances)),
        ]
        meta = {"source": self.source, "key": self.key, "digest": self.digest, "scenes": facts}
        table = pa.table(columns, schema=SCHEMA).replace_schema_metadata({_FACTS: json.dumps(meta).encode()})
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                pq.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"{path}: the pairs cannot be written ({error.strerror or error})") from error

    @classmethod
    def load(cls, path: Path, key: str) -> PairIndex:
        """Read a saved index. DataError names the file when it is missing, damaged, or made from something else."""
        try:
            table = pq.read_table(path)
            meta = json.loads(table.schema.metadata[_FACTS])
            index = cls(meta["source"], meta["key"], list(_parts(table, meta["scenes"])))
            if index.digest != meta["digest"]:
                raise ValueError("its pairs are not those it was saved with")
            if index.key != key:
                raise ValueError(f"it was made from {index.key[:16]}, not {key[:16]}")
        except FileNotFoundError as error:
            raise DataError(f"{path}: there is no such file of pairs; make it with `loom3d data pairs`") from error
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: the file of pairs is damaged ({error}); delete it and run `loom3d data pairs`"
            ) from error
        return index

    def _of(self, scene: str) -> slice:
        return self._range.get(scene, slice(0, 0))


def build_pairs(
    manifest: Manifest,
    config: PairsConfig,
    *,
    parts: Path | None = None,
    threads: int = 4,
    progress: Progress | None = None,
) -> PairIndex:
    """Compare the views of every scene of a source.

    Args:
        manifest: of the source. Items, which are no scenes, are passed over.
        config: ``data.pairs``.
        parts: folder in which finished scenes are kept, and from which they are taken; None for none.
        threads: scenes that are worked on at once.
        progress: called with (scenes done, scenes in all, id of the last).

    A view that cannot be read is left out and named in :attr:`PairIndex.facts`; the log says how many of a scene.
    """
    splits = {entry.id: entry.split for entry in manifest.entries if entry.kind == "scene"}
    key = pairs_key(manifest.digest, config)
    done: list[ScenePairs] = []
    with _one_thread_each(threads) as pool:
        work = enumerate(splits)
        for found in pool.map(lambda part: _one_scene(manifest, config, key, part[1], _part(parts, part[0])), work):
            split = splits[found.facts.id]
            done.append(dataclasses.replace(found, facts=dataclasses.replace(found.facts, split=split and str(split))))
            left_out = _named(found.facts)
            if left_out:
                count, (name, why) = len(left_out), left_out[0]
                _log.warning("pairs of %s: %d views are left out, e.g. %s: %s", manifest.name, count, name, why)
            if progress is not None:
                progress(len(done), len(splits), found.facts.id)
    return PairIndex(manifest.name, key, done)


def open_pairs(
    config: RunConfig, manifests: Mapping[str, Manifest], *, progress: Progress | None = None
) -> dict[str, PairIndex]:
    """The index of every source, from its file or made now (``progress`` as in :func:`build_pairs`).

    Of several processes that start at once one makes it. Scenes without pairs are counted in the log. DataError when
    a folder cannot be written.
    """
    opened = {}
    for name, manifest in manifests.items():
        path = pairs_path(config, name, manifest.digest)
        with events.span("pairs", source=name) as fields, exclusive(path.with_suffix(".lock")):
            index = _load_valid(path, pairs_key(manifest.digest, config.data.pairs))
            if index is None:
                shown = None if progress is None else _naming(f"pairs of {name}", progress)
                parts = path.with_suffix(".parts")
                threads = config.data.checks.threads
                index = build_pairs(manifest, config.data.pairs, parts=parts, threads=threads, progress=shown)
                index.save(path)
                shutil.rmtree(parts, ignore_errors=True)
                if index.facts and index.missing():
                    _log.warning("%s", index.missing())
            fields.update(pairs=len(index), scenes=len(index.facts))
        opened[name] = index
    return opened


def stored_pairs(config: RunConfig, manifests: Mapping[str, Any]) -> dict[str, PairIndex]:
    """The index of every source as it lies on disk, read once a process.

    For workers, after the driver called :func:`open_pairs`. DataError when one was not made.
    """
    found = {}
    for name, manifest in manifests.items():
        path = pairs_path(config, name, manifest.digest)
        found[name] = _load_once(path, pairs_key(manifest.digest, config.data.pairs), Stamp.of(path))
    return found


def pairs_key(manifest_digest: str, config: PairsConfig) -> str:
    """Hex sha256 of all that decides an index."""
    named = [VERSION, manifest_digest, dataclasses.asdict(config)]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def pairs_path(config: RunConfig, source: str, manifest_digest: str) -> Path:
    """The file of a source's index, whether it is there or not."""
    folder = Path(config.storage.root).expanduser().absolute() / "pairs"
    return folder / f"{source}-{pairs_key(manifest_digest, config.data.pairs)[:16]}.parquet"


@contextmanager
def _one_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch does not split its operations: scenes run in parallel, and would wait for each other.

    What one thread sets, torch hands to every thread that starts later: a run that goes on in this process would be
    left with one core, so the number is set again at the end.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _one_scene(manifest: Manifest, config: PairsConfig, key: str, scene_id: str, path: Path | None) -> ScenePairs:
    """The pairs of a scene, from its part where that is there and whole."""
    if path is not None and path.exists():
        index = _load_valid(path, key)
        if index is not None and list(index.facts) == [scene_id]:
            return next(_of_index(index))
    scene = manifest.scene(scene_id)
    assert isinstance(scene, Scene), "entries of the kind scene hold scenes"
    found = scene_pairs(scene, config)
    if path is not None:
        PairIndex(manifest.name, key, [found]).save(path)
    return found


def _of_index(index: PairIndex) -> Iterator[ScenePairs]:
    for name, facts in index.facts.items():
        yield ScenePairs(
            facts=facts,
            views=index.of(name),
            overlap=index.overlap(name),
            angle=index.angle(name),
            distance=index.distance(name),
        )


def _parts(table: pa.Table, scenes: list[dict[str, Any]]) -> Iterator[ScenePairs]:
    """The scenes of a file. ValueError when the rows are not theirs."""
    columns = {name: table.column(name).to_numpy() for name in SCHEMA.names[1:]}
    if sum(scene["pairs"] for scene in scenes) != table.num_rows:
        raise ValueError(f"{table.num_rows} rows for {sum(scene['pairs'] for scene in scenes)} pairs")
    views = np.stack([columns["i"], columns["j"]], axis=1)
    overlap = np.stack([columns["overlap_ij"], columns["overlap_ji"]], axis=1)
    begin = 0
    for scene in scenes:
        mine = slice(begin, begin + scene["pairs"])
        begin = mine.stop
        yield ScenePairs(
            facts=SceneFacts(**scene),
            views=views[mine],
            overlap=overlap[mine],
            angle=columns["angle"][mine],
            distance=columns["distance"][mine],
        )


def _load_valid(path: Path, key: str) -> PairIndex | None:
    if not path.exists():
        return None
    try:
        return _load_once(path, key, Stamp.of(path))
    except DataError as error:
        # It can be made again from the source, so a damaged file costs time and nothing else.
        _log.warning("%s", error)
        return None


@lru_cache(maxsize=16)
def _load_once(path: Path, key: str, stamp: Stamp | None) -> PairIndex:  # noqa: ARG001 - another stamp, another file
    return PairIndex.load(path, key)


def _part(folder: Path | None, number: int) -> Path | None:
    return None if folder is None else folder / f"{number}.parquet"


def _named(facts: SceneFacts) -> list[tuple[str, str]]:
    return [(f"{facts.id}#view{number}", why) for number, why in facts.broken.items()]


def _naming(what: str, progress: Progress) -> Progress:
    """The callback, told what is done instead of to which scene."""
    return lambda done, total, _: progress(done, total, what)


def _joined(arrays: list[np.ndarray], empty: tuple[int, ...], dtype: Any) -> np.ndarray:
    whole = np.ascontiguousarray(np.concatenate([np.zeros(empty, dtype), *arrays]).astype(dtype, copy=False))
    whole.setflags(write=False)
    return whole
