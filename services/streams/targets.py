"""What a model is to predict of a sample's views, or reads of them beside features: named readers.

``depth``, ``labels``, ``scene_type``, ``image``, ``camera`` (``K`` and ``pose``), ``matches`` (with ``match_valid``),
``roles`` (True for a target) and ``size`` ((height, width) of the pictures as they are cut); which of them a kind has,
and at which size, its declaration says (:mod:`services.streams.inputs`). All of them are cut and resized exactly as the
encoders' images are.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs import RunConfig
from models import draws
from models.spec import TensorSpec
from services.contracts import DepthRef, Intrinsics, PlanSample, Record, Role, Tensor, View
from services.data.images import describe, load_depth, load_image
from services.errors import ConfigError, DataError
from services.features.store import FeatureStore
from services.streams.cut import cut_camera, cut_picture
from services.streams.inputs import Inputs, KindInputs, kind_inputs, view_axes
from services.streams.maps import Maps, open_target_store

IGNORE = -1
"""Label of a pixel without a known class, and scene type of a scene without one."""


_COMPUTED = frozenset({"image", "matches"})


@dataclass(frozen=True, slots=True)
class Ask:
    """What a reader is asked about: a sample, its views, and how they are cut."""

    sample: PlanSample
    draw: int
    """Key of the sample's draws at this step."""
    views: Sequence[View]
    size: tuple[int, int]
    maps: Sequence[Record]
    """Depth and label maps of each view, where one of the kind's targets needs them."""
    seen: Seen | None = None
    """What stands for the pictures and what belongs to them, where they were augmented."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Augmented views, as a network reads them."""

    images: np.ndarray
    """uint8 (V, H, W, 3)."""
    depths: np.ndarray | None = None
    """float32 (V, H, W), of a pair."""
    K: np.ndarray | None = None
    """float32 (V, 3, 3), of a pair."""
    poses: np.ndarray | None = None
    """float32 (V, 4, 4), of a pair."""


class Targets:
    """Targets of planned samples.

    Args:
        config: the run.
        manifests: by source, as the plan's.
        store: the run's feature store, or None to decode every time. Where it has a codec, maps are kept beside it
            without one.
        inputs: what kinds are made of, by default those of the recipe's first role.

    ``classes`` and ``scene_types`` are the names behind the indices of ``labels`` and ``scene_type``: with one
    source its own class ids; with several, the union by name, in the order of the sources' names.
    """

    def __init__(
        self,
        config: RunConfig,
        manifests: Mapping[str, Any],
        *,
        store: FeatureStore | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self._config = config
        self._inputs = kind_inputs(config) if inputs is None else inputs
        self._manifests = dict(manifests)
        self.classes, self._tables = _class_tables(self._manifests)
        self.scene_types = tuple(sorted({kind for m in manifests.values() for kind in m.scene_types}))
        self._readers: dict[str, Callable[[Ask], Record]] = {
            "depth": _depths,
            "labels": self._labels,
            "scene_type": self._scene_type,
            "image": _images,
            "camera": _cameras,
            "matches": self._matches,
            "roles": _roles,
            "size": _size,
        }
        # Decoding and projecting release the interpreter's lock.
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 2), thread_name_prefix="targets")
        self._check()
        wanted = {key for kind in self._inputs.values() if (key := _maps_key(kind)) is not None}
        if store is not None and store.codec != "none" and wanted:
            store = open_target_store(config)  # a lossy codec would round depth
        self.maps = {(size, labels): Maps(*size, labels=labels, store=store) for size, labels in sorted(wanted)}

    def _check(self) -> None:
        for kind, declared in self._inputs.items():
            for name in declared.targets:
                if name not in self._readers:
                    raise ConfigError(
                        f"recipe {self._config.recipe.name}: kind {kind!r} declares the target {name!r}; there are "
                        f"{sorted(self._readers)}"
                    )

    def specs(self, kind: str) -> dict[str, TensorSpec]:
        """Columns of a kind. A set of views has the views as a first axis, ragged unless their number is fixed."""
        declared = self._inputs.get(kind)
        if declared is None:
            return {}
        views, (height, width) = view_axes(kind), declared.size
        matches = self._config.recipe.uniugg.matches
        known = {
            "depth": {"depth": TensorSpec(shape=(*views, height, width), dtype="float32")},
            "labels": {"labels": TensorSpec(shape=(*views, height, width), dtype="int64")},
            "scene_type": {"scene_type": TensorSpec(shape=(), dtype="int64")},
            "image": {"image": TensorSpec(shape=(*views, height, width, 3), dtype="uint8")},
            "camera": {
                "K": TensorSpec(shape=(*views, 3, 3), dtype="float32"),
                "pose": TensorSpec(shape=(*views, 4, 4), dtype="float32"),
            },
            "matches": {
                "matches": TensorSpec(shape=(2, matches), dtype="int32"),
                "match_valid": TensorSpec(shape=(matches,), dtype="bool"),
            },
            "roles": {"roles": TensorSpec(shape=views, dtype="bool")},
            "size": {"size": TensorSpec(shape=(2,), dtype="int64")},
        }
        return {column: spec for name in declared.targets for column, spec in known[name].items()}

    def get(
        self, samples: Sequence[PlanSample], sample_draws: Sequence[int] | None = None, *, augment: bool = False
    ) -> list[Record | DataError]:
        """Targets of every sample, in order; a DataError stands where a file is broken or something is missing.

        ``sample_draws`` are the keys of the samples' draws at this step; by default their seeds. ``augment`` changes
        pictures, and depth and cameras with them, as ``data.augment`` says.
        """
        keys = [sample.seed for sample in samples] if sample_draws is None else sample_draws

        def read(sample: PlanSample, draw: int) -> Record | DataError:
            try:
                return self._targets(sample, draw, augment)
            except DataError as error:
                return error

        if any(self._computes(sample.kind) for sample in samples):
            return list(self._threads.map(read, samples, keys))
        return [read(sample, draw) for sample, draw in zip(samples, keys, strict=True)]

    def flush(self) -> None:
        """Commit the maps that were decoded."""
        for maps in self.maps.values():
            maps.flush()

    def close(self) -> None:
        """Commit what was decoded and let go of the store. Safe to call twice."""
        self._threads.shutdown(wait=True)
        for maps in self.maps.values():
            maps.close()

    def _computes(self, kind: str) -> bool:
        """Whether targets of ``kind`` take milliseconds: pictures and correspondences, which no store holds."""
        return kind in self._inputs and not _COMPUTED.isdisjoint(self._inputs[kind].targets)

    def _targets(self, sample: PlanSample, draw: int, augment: bool) -> Record:
        declared = self._inputs.get(sample.kind)
        if declared is None or not declared.targets:
            return {}
        manifest = self._manifests[sample.source]
        views = manifest.views(sample.item, [view.index for view in sample.views]) if sample.views else []
        key = _maps_key(declared)
        ask = Ask(sample, draw, views, declared.size, ())
        if augment and views:
            ask = dataclasses.replace(ask, seen=self._augmented(ask))
        elif key is not None:
            ask = dataclasses.replace(ask, maps=[self.maps[key].get(view) for view in views])
        record: Record = {}
        for name in declared.targets:
            if views or name == "scene_type":  # a text without pictures has nothing of the others
                record |= self._readers[name](ask)
        return record

    def _augmented(self, ask: Ask) -> Seen:
        """The views with ``data.augment`` applied: of a pair all that belongs to them, otherwise the pictures."""
        from services.data.augment import Augment

        augment, generator = Augment(self._config.data.augment), draws.generator(ask.draw, "augment")
        images = [load_image(view.image) for view in ask.views]
        if ask.sample.kind != "pair":
            return Seen(np.stack([augment.image(image, generator, ask.size) for image in images]))
        poses, depths = np.stack([camera(ask, view)[1] for view in ask.views]), [depth_of(ask, v) for v in ask.views]
        made = augment.pair(
            images,
            [load_depth(depth) for depth in depths],
            [camera(ask, view)[0] for view in ask.views],
            poses,
            generator,
            ask.size,
            depth_K=[depth.K for depth in depths],
        )
        return Seen(made.images, made.depths, made.K, made.poses)

    def _labels(self, ask: Ask) -> Record:
        table = self._tables[ask.sample.source]
        return {"labels": _stacked([_to_labels(maps["ids"].data, table) for maps in ask.maps], ask, "int64")}

    def _scene_type(self, ask: Ask) -> Record:
        kind = self._manifests[ask.sample.source].scene_type(ask.sample.item)
        index = self.scene_types.index(kind) if kind in self.scene_types else IGNORE
        return {"scene_type": Tensor(data=np.asarray(index, np.int64), dtype="int64")}

    def _matches(self, ask: Ask) -> Record:
        """Pixel correspondences of the two views, drawn anew at every step."""
        from services.data.correspondences import sample_matches

        cameras, settings = _cameras(ask), self._config.recipe.uniugg
        indices, valid = sample_matches(
            _depths(ask)["depth"].data,
            cameras["K"].data,
            cameras["pose"].data,
            matches=settings.matches,
            share=settings.match_share,
            generator=draws.generator(ask.draw, "matches"),
        )
        return {
            "matches": Tensor(data=indices, dtype="int32"),
            "match_valid": Tensor(data=valid, dtype="bool"),
        }


def _maps_key(declared: KindInputs) -> tuple[tuple[int, int], bool] | None:
    """(size, whether labels are wanted) of the maps that a kind's targets need; None for none."""
    if not {"depth", "labels", "matches"} & set(declared.targets):
        return None
    return declared.size, "labels" in declared.targets


def _images(ask: Ask) -> Record:
    if ask.seen is not None:
        return {"image": _stacked(ask.seen.images, ask, "uint8")}
    return {"image": _stacked([cut_picture(load_image(view.image), *ask.size) for view in ask.views], ask, "uint8")}


def _depths(ask: Ask) -> Record:
    if ask.seen is not None and ask.seen.depths is not None:
        return {"depth": _stacked(ask.seen.depths, ask, "float32")}
    return {"depth": _stacked([maps["depth"].data for maps in ask.maps], ask, "float32")}


def _cameras(ask: Ask) -> Record:
    if ask.seen is not None and ask.seen.K is not None and ask.seen.poses is not None:
        K, poses = list(ask.seen.K), list(ask.seen.poses)
    else:
        cameras = [camera(ask, view) for view in ask.views]
        K = [cut_camera(intrinsics, *ask.size) for intrinsics, _ in cameras]
        poses = [pose.astype(np.float32) for _, pose in cameras]
    return {"K": _stacked(K, ask, "float32"), "pose": _stacked(poses, ask, "float32")}


def _roles(ask: Ask) -> Record:
    return {"roles": _stacked([np.asarray(view.role is Role.TARGET) for view in ask.sample.views], ask, "bool")}


def _size(ask: Ask) -> Record:
    return {"size": Tensor(data=np.array(ask.size, np.int64), dtype="int64")}


def camera(ask: Ask, view: View) -> tuple[Intrinsics, np.ndarray]:
    """Intrinsics of the stored picture and the pose (4, 4) of a view; DataError where one of them is missing."""
    if view.K is None or view.pose is None:
        lacks = "are no intrinsics" if view.K is None else "is no pose"
        raise DataError(
            f"{describe(view.image)}: sample {ask.sample.id!r} of kind {ask.sample.kind!r} needs the camera of each "
            f"view and there {lacks}; leave this source out of the kind, or give it cameras"
        )
    return view.K, np.asarray(view.pose, np.float64)


def depth_of(ask: Ask, view: View) -> DepthRef:
    """The depth map of a view; DataError where there is none."""
    if view.depth is None:
        raise DataError(
            f"{describe(view.image)}: sample {ask.sample.id!r} of kind {ask.sample.kind!r} needs depth and there is "
            "none; leave this source out of the kind"
        )
    return view.depth


def _stacked(arrays: Sequence[np.ndarray] | np.ndarray, ask: Ask, dtype: str) -> Tensor:
    """One array a view -> with the views as the first axis, or without it for a kind of one view."""
    if not view_axes(ask.sample.kind):
        (data,) = arrays
        return Tensor(data=data, dtype=dtype)
    return Tensor(data=np.stack(list(arrays)), dtype=dtype)


def class_names(manifests: Mapping[str, Any]) -> tuple[str, ...]:
    """Names behind the indices of ``labels`` for these sources; see :class:`Targets`."""
    return _class_tables(manifests)[0]


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
