"""Depth and label maps of views, cut to a size, and kept in the feature store.

Decoding PNGs in every epoch would starve a trainer, so a view's maps are kept as records under a fingerprint of their
own. The key is made of the digests of the depth and label files' content and of what else decides the result (unit of
depth, cameras). PNG is lossless, so no library's version enters it. Digests are taken once a process and file, guarded
by (size, mtime, inode), which never enter a key.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import astuple
from typing import Any

import numpy as np

from configs import RunConfig
from models.encoders.preprocess import crop_box
from services.contracts import DepthRef, FeatureKey, Intrinsics, Record, Tensor, View
from services.data.digests import Stamp, digest_file
from services.data.images import load_depth, load_ids
from services.errors import CacheError
from services.features.keys import feature_key
from services.features.store import FeatureStore
from services.streams.cut import depth_window, picture_size, sample_nearest

_log = logging.getLogger(__name__)

IDENTITY = {"what": "targets", "version": 1, "resize": "centre crop of the image's aspect, nearest pixel"}
"""Part of the fingerprint of the records, with height and width; see :meth:`Maps.identity`."""


def read_maps(view: View, height: int, width: int, *, labels: bool = True) -> Record:
    """``depth`` float32 (height, width) metres, 0 unknown, and (``labels``) ``ids`` int32, 0 none, from the files."""
    size = picture_size(view)
    window = crop_box(size, height, width)
    depth = np.zeros((height, width), np.float32)
    if view.depth is not None:
        seen = depth_window(window, view.K, view.depth.K, size)
        depth = sample_nearest(load_depth(view.depth), seen, height, width)
    record = {"depth": Tensor(data=depth.astype(np.float32, copy=False), dtype="float32")}
    if not labels:
        return record
    ids = np.zeros((height, width), np.int32)
    if view.label_path is not None:
        stored = load_ids(view.label_path)
        y, x = stored.shape[0] / size[0], stored.shape[1] / size[1]
        ids = sample_nearest(stored, (window[0] * x, window[1] * y, window[2] * x, window[3] * y), height, width)
    return record | {"ids": Tensor(data=ids.astype(np.int32, copy=False), dtype="int32")}


def open_target_store(config: RunConfig) -> FeatureStore | None:
    """The run's store for targets, which no codec may touch; None for cache.mode=never."""
    if config.cache.mode == "never":
        return None
    return FeatureStore.from_config(dataclasses.replace(config, cache=dataclasses.replace(config.cache, codec="none")))


class Maps:
    """Maps of views at one size.

    Args:
        height, width: the size.
        labels: whether label maps are wanted beside depth.
        store: without a codec; None decodes every time.
    """

    def __init__(self, height: int, width: int, *, labels: bool = True, store: FeatureStore | None = None) -> None:
        self.height, self.width, self.labels = height, width, labels
        self._store = store
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
        self._digests: dict[str, tuple[Stamp | None, str]] = {}

    def identity(self) -> dict[str, Any]:
        """All that decides a record beside the view's files."""
        what = {} if self.labels else {"what": "depth"}
        return {**IDENTITY, **what, "height": self.height, "width": self.width}

    def get(self, view: View) -> Record:
        """The maps of one view, from the store where it has them. DataError names a file that cannot be read."""
        if self._namespace is None or (view.depth is None and (view.label_path is None or not self.labels)):
            return read_maps(view, self.height, self.width, labels=self.labels)
        key = self._key(view)
        record: Record | None = self._namespace.get(key)
        if record is None:
            record = read_maps(view, self.height, self.width, labels=self.labels)
            self._keep(key, record)
        return record

    def flush(self) -> None:
        """Commit what was decoded."""
        if self._namespace is not None and self._store is not None:
            try:
                self._namespace.flush()
            except CacheError as error:
                self._store.say_refused(error)

    def close(self) -> None:
        """Commit, and let go of the store. Safe to call twice."""
        self.flush()
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _keep(self, key: FeatureKey, record: Record) -> None:
        try:
            self._namespace.put(key, record)
        except CacheError as error:
            assert self._store is not None
            self._store.say_refused(error)  # and decode again in every epoch

    def _key(self, view: View) -> FeatureKey:
        depth, size = view.depth, picture_size(view)
        labels = view.label_path if self.labels else None
        digests = [self._digest(path) for path in (depth.path if depth else None, labels) if path]
        transform = {
            "image": _camera(view.K) if view.K else list(size),
            "depth": None if depth is None else _depth_identity(depth),
            "labels": labels is not None,
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
