"""What a model is to predict of a view: depth, class labels, scene type, cut and resized exactly as the image is.

Decoding PNGs in every epoch would starve a trainer, so a view's targets are kept in the feature store, as records
under a fingerprint of their own. The key is made of the digests of the depth and label files' content and of what
else decides the result (unit of depth, cameras). PNG is lossless, so no library's version enters it. Digests are
taken once a process and file, guarded by (size, mtime, inode), which never enter a key.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from configs import RunConfig
from models.encoders.preprocess import crop_box
from models.spec import TensorSpec
from services.contracts import DepthRef, FeatureKey, Intrinsics, PlanSample, Record, Tensor, View
from services.data.digests import Stamp, digest_file
from services.data.images import image_size, load_depth, load_ids
from services.errors import CacheError, DataError
from services.features.keys import feature_key
from services.features.store import FeatureStore

_log = logging.getLogger(__name__)

IGNORE = -1
"""Label of a pixel without a known class, and scene type of a scene without one."""

IDENTITY = {"what": "targets", "version": 1, "resize": "centre crop of the image's aspect, nearest pixel"}
"""Part of the fingerprint of target records, with height and width; see :meth:`Targets.identity`."""

Window = tuple[float, float, float, float]
"""(left, top, right, bottom) in continuous pixels: the corner of the first pixel is at 0."""


def sample_nearest(array: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    """The pixels of ``array`` (H, W) that hold the centres of a (height, width) grid over ``window``.

    Centres outside the array give 0. No value is ever mixed with another: that would be a new class, or a surface
    in mid-air.
    """
    left, top, right, bottom = window
    rows = np.floor(top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(np.int64)
    columns = np.floor(left + (np.arange(width) + 0.5) * (right - left) / width).astype(np.int64)
    out = array[np.clip(rows, 0, array.shape[0] - 1)][:, np.clip(columns, 0, array.shape[1] - 1)]
    out[(rows < 0) | (rows >= array.shape[0])] = 0
    out[:, (columns < 0) | (columns >= array.shape[1])] = 0
    return np.ascontiguousarray(out)


def depth_window(window: Window, image: Intrinsics | None, depth: Intrinsics, size: tuple[int, int]) -> Window:
    """The window of an image, seen in the depth map that was taken from the same place.

    ``size`` is (H, W) of the image. Where the depth camera is the image camera at another size (or the image has
    no camera), positions scale with the size; otherwise they go through the rays of both cameras.
    """
    height, width = size
    left, top, right, bottom = window
    scaled = image.resized(depth.width, depth.height) if image else depth
    if all(abs(a - b) < 1e-2 for a, b in zip(astuple(scaled)[:4], astuple(depth)[:4], strict=True)):
        x, y = depth.width / width, depth.height / height
        return left * x, top * y, right * x, bottom * y
    assert image is not None, "without a camera of the image the two cameras were taken to be one"
    # Intrinsics have pixel centres at integers, the window has corners there: hence the half pixels.
    x, y = depth.fx / image.fx, depth.fy / image.fy
    x0, y0 = depth.cx + 0.5 - (image.cx + 0.5) * x, depth.cy + 0.5 - (image.cy + 0.5) * y
    return left * x + x0, top * y + y0, right * x + x0, bottom * y + y0


def picture_size(view: View) -> tuple[int, int]:
    """(height, width) of the view's picture: its camera's, or what its file says."""
    if view.K is not None:
        return view.K.height, view.K.width
    width, height = image_size(view.image)
    return height, width


def read_targets(view: View, height: int, width: int) -> Record:
    """``depth`` float32 (height, width) metres, 0 unknown, and ``ids`` int32, 0 none, from the view's files."""
    size = picture_size(view)
    window = crop_box(size, height, width)
    depth = np.zeros((height, width), np.float32)
    ids = np.zeros((height, width), np.int32)
    if view.depth is not None:
        seen = depth_window(window, view.K, view.depth.K, size)
        depth = sample_nearest(load_depth(view.depth), seen, height, width)
    if view.label_path is not None:
        stored = load_ids(view.label_path)
        y, x = stored.shape[0] / size[0], stored.shape[1] / size[1]
        ids = sample_nearest(stored, (window[0] * x, window[1] * y, window[2] * x, window[3] * y), height, width)
    return {
        "depth": Tensor(data=depth.astype(np.float32, copy=False), dtype="float32"),
        "ids": Tensor(data=ids.astype(np.int32, copy=False), dtype="int32"),
    }


def open_target_store(config: RunConfig) -> FeatureStore | None:
    """The run's store for targets, which no codec may touch; None for cache.mode=never."""
    if config.cache.mode == "never":
        return None
    return FeatureStore.from_config(dataclasses.replace(config, cache=dataclasses.replace(config.cache, codec="none")))


class Targets:
    """Targets of planned samples at the size of the encoder's input.

    Args:
        config: the run; the size is that of the encoder ``recipe.features``.
        manifests: by source, as the plan's.
        store: the run's feature store, or None to decode every time. Where it has a codec, targets are kept beside
            it without one.

    ``classes`` and ``scene_types`` are the names behind the indices of ``labels`` and ``scene_type``: with one
    source its own class ids; with several, the union by name, in the order of the sources' names.
    """

    def __init__(self, config: RunConfig, manifests: Mapping[str, Any], *, store: FeatureStore | None = None) -> None:
        encoder = config.encoders[config.recipe.features]
        self.height, self.width = encoder.height, encoder.width
        self._manifests = dict(manifests)
        self.classes, self._tables = _class_tables(self._manifests)
        self.scene_types = tuple(sorted({kind for m in manifests.values() for kind in m.scene_types}))
        if store is not None and store.codec != "none":
            store = open_target_store(config)  # a lossy codec would round depth
        self._namespace: Any = None
        self._lease: Any = None
        if store is not None:
            self._namespace = store.open(self.identity())
            try:
                # As long as this lives its records are reread, so nothing may evict them.
                self._lease = store.lease([self._namespace.fingerprint])
            except CacheError as error:
                # A cache that can only be read is of use; nobody can evict from it either.
                _log.warning("the cache of targets is used without a lease: %s", error)
        self._store: Any = store
        self._digests: dict[str, tuple[Stamp | None, str]] = {}

    def identity(self) -> dict[str, Any]:
        """All that decides a target record beside the view's files."""
        return {**IDENTITY, "height": self.height, "width": self.width}

    def specs(self, kind: str) -> dict[str, TensorSpec]:
        """Columns of a kind. A set of views has the views as a first, ragged axis; an item has no targets."""
        if kind == "item":
            return {}
        views = () if kind == "view" else (None,)
        return {
            "depth": TensorSpec(shape=(*views, self.height, self.width), dtype="float32"),
            "labels": TensorSpec(shape=(*views, self.height, self.width), dtype="int64"),
            "scene_type": TensorSpec(shape=(), dtype="int64"),
        }

    def get(self, samples: Sequence[PlanSample]) -> list[Record | DataError]:
        """Targets of every sample, in order; a DataError stands where a file is broken."""
        answers: list[Record | DataError] = []
        for sample in samples:
            try:
                answers.append(self._targets(sample))
            except DataError as error:
                answers.append(error)
        return answers

    def _targets(self, sample: PlanSample) -> Record:
        if sample.kind == "item":
            return {}
        manifest = self._manifests[sample.source]
        records = [self._view(view) for view in manifest.views(sample.item, [view.index for view in sample.views])]
        table = self._tables[sample.source]
        depth = np.stack([record["depth"].data for record in records])
        labels = np.stack([_to_labels(record["ids"].data, table) for record in records])
        one_view = sample.kind == "view"
        kind = manifest.scene_type(sample.item)
        index = self.scene_types.index(kind) if kind in self.scene_types else IGNORE
        return {
            "depth": Tensor(data=depth[0] if one_view else depth, dtype="float32"),
            "labels": Tensor(data=labels[0] if one_view else labels, dtype="int64"),
            "scene_type": Tensor(data=np.asarray(index, np.int64), dtype="int64"),
        }

    def _view(self, view: View) -> Record:
        """The record of one view, from the store where it has it."""
        if self._namespace is None or (view.depth is None and view.label_path is None):
            return read_targets(view, self.height, self.width)
        key = self._key(view)
        record: Record | None = self._namespace.get(key)
        if record is None:
            record = read_targets(view, self.height, self.width)
            self._keep(key, record)
        return record

    def _keep(self, key: FeatureKey, record: Record) -> None:
        try:
            self._namespace.put(key, record)
        except CacheError as error:
            self._store.say_refused(error)  # and decode again in every epoch

    def close(self) -> None:
        """Commit what was decoded and let go of the store. Safe to call twice."""
        if self._namespace is not None:
            try:
                self._namespace.flush()
            except CacheError as error:
                self._store.say_refused(error)
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _key(self, view: View) -> FeatureKey:
        depth, size = view.depth, picture_size(view)
        digests = [self._digest(path) for path in (depth.path if depth else None, view.label_path) if path]
        transform = {
            "image": _camera(view.K) if view.K else list(size),
            "depth": None if depth is None else _depth_identity(depth),
            "labels": view.label_path is not None,
        }
        return feature_key(digests, transform=transform)

    def _digest(self, path: str) -> str:
        known = self._digests.get(path)
        stamp = Stamp.of(path)
        if known is not None and stamp is not None and known[0] == stamp:
            return known[1]
        found = digest_file(path)
        self._digests[path] = (found.stamp, found.digest.hex())
        return found.digest.hex()


def _camera(K: Intrinsics) -> list[float]:
    return [float(value) for value in astuple(K)]


def _depth_identity(depth: DepthRef) -> dict[str, Any]:
    return {"metres_per_unit": depth.metres_per_unit, "unknown": depth.unknown, "K": _camera(depth.K)}


def _class_tables(manifests: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Names of the classes, and for each source the class index of each stored id (-1: ignored)."""
    if len(manifests) == 1:
        ((source, manifest),) = manifests.items()
        names = tuple(manifest.classes)
        table = [i if i > 0 and name else IGNORE for i, name in enumerate(names)]
        return names, {source: np.array(table or [IGNORE], np.int64)}
    found = (name for source in sorted(manifests) for name in manifests[source].classes[1:] if name)
    names = ("none", *dict.fromkeys(found))
    index = {name: i for i, name in enumerate(names) if i}
    return names, {
        source: np.array([IGNORE, *(index.get(name, IGNORE) for name in manifest.classes[1:])], np.int64)
        for source, manifest in manifests.items()
    }


def _to_labels(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Stored ids -> class indices; 0 and ids beyond the classes are ignored."""
    return table[np.where((ids > 0) & (ids < len(table)), ids, 0)]
