"""How many scenes, views, items and pairs a run's data hold, without reading a picture.

Procedural rooms are counted from their settings; another source from its manifest, if it was indexed before, and pairs
from their index, if it was made.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.schema import RoomsConfig, RunConfig, SourceConfig
from services.contracts import Split
from services.data.manifest import Manifest
from services.errors import DataError
from services.streams.inputs import ITEM_KINDS
from services.streams.plan import PACKING
from services.streams.sampling import PAIR_KINDS, needs_pairs

#: Formats without posed depth, of which no pairs can be made.
_FLAT = frozenset({"re10k", "images", "corpus", "questions", "benchmark"})


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Counts of one source, by split where they are mappings. ``known`` is false when not indexed."""

    source: str
    scenes: int
    """And items."""
    views: Mapping[str, int]
    """Of scenes, and pictures of items among them."""
    classes: int
    known: bool = True
    items: Mapping[str, int] = field(default_factory=dict)
    """Items, with or without pictures."""
    pictures: Mapping[str, int] = field(default_factory=dict)
    """Of items."""
    most_pictures: int = 0
    """Of one item."""
    pairs: Mapping[str, int] | None = None
    """Pairs of views; None where they were not measured, or are not needed."""
    scene_views: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Split -> views of each of its scenes; empty where it is not known."""
    of: str = ""
    """Source whose pictures these are; "" for pictures of its own."""
    shown: int = 0
    """Different pictures of all items."""
    sets: Mapping[int, int] = field(default_factory=dict)
    """Pictures of an item -> different sets of so many; conversations about the same pictures in order share one."""
    groups: Mapping[str, Sequence[tuple[int, int, int]]] = field(default_factory=dict)
    """Split -> (pictures, conversations about them, sets that are so) of all sets; empty where it is not known."""
    packed: int = 1
    """Conversations about the same pictures that make one sample, at most."""

    @property
    def total_views(self) -> int:
        """Views of all splits."""
        return sum(self.views.values())

    def units(self, kind: str, split: str) -> int:
        """Samples of ``kind`` that a split has; of pairs that were not measured, as many as there are views."""
        if kind in PAIR_KINDS:
            pairs = self._scene_views(split) if self.pairs is None else self.pairs.get(split, 0)
            return pairs * (2 if PAIR_KINDS[kind] else 1)
        if kind == "conversation" and self.packed > 1 and self.groups:
            groups = self.groups.get(split, ())
            alone = self.items.get(split, 0) - sum(sets * asked for _, asked, sets in groups)
            return alone + sum(sets * -(-asked // self.packed) for _, asked, sets in groups)
        if kind in ITEM_KINDS:
            return self.items.get(split, 0)
        return self._scene_views(split)

    def pictures_of(self, entry: str) -> int:
        """Different pictures of all items ("item"), or pictures of all scenes ("scene")."""
        return self.shown if entry == "item" else sum(self._scene_views(split) for split in self.views)

    def _scene_views(self, split: str) -> int:
        return self.views.get(split, 0) - self.pictures.get(split, 0)


def data_sizes(config: RunConfig) -> list[DataSize]:
    """The size of every source. DataError or ConfigError when a source cannot be opened."""
    found = {name: _size(name, source, config) for name, source in config.data.sources.items()}
    packed = config.recipe.spa3_vlm.questions_per_sample if config.recipe.name in PACKING else 1
    return [
        dataclasses.replace(
            size, packed=packed, **(_of_scenes(name, found[size.of], config) if _is_unmade(size) else {})
        )
        for name, size in found.items()
    ]


def _is_unmade(size: DataSize) -> bool:
    return bool(size.of) and not size.known


def _of_scenes(name: str, scenes: DataSize, config: RunConfig) -> dict[str, Any]:
    """What will be shown by questions that are made about these scenes when the run starts."""
    options, views = config.data.sources[name].options, [n for found in scenes.scene_views.values() for n in found]
    limit = int(options.get("max_views", 0) or config.data.questions.max_views)
    sets = Counter[int]()
    shown = 0
    if options.get("questions", True) or options.get("scenes", False):
        whole = [min(limit, config.data.questions.max_views, n) for n in views]
        sets.update(whole)
        shown = sum(whole)
    if options.get("views", False) or options.get("single", False):
        sets[1] += sum(views)
        shown = sum(views)
    return {"sets": dict(sets), "shown": shown}


def _size(name: str, source: SourceConfig, config: RunConfig) -> DataSize:
    from services.data.sources import is_made_of

    if is_made_of(source):
        return _questions(name, source, config)
    if source.format == "rooms" and not source.root:
        return _rooms(name, config.data.rooms, source, config)
    manifest = _stored(name, source, config)
    if manifest is not None:
        return _counted(name, manifest, config)
    from services.data.readers import open_reader

    reader = open_reader(Path(source.root), source, cache=Path(config.storage.root) / "data" / "derived" / name)
    return DataSize(source=name, scenes=len(reader.list_ids()), views={}, classes=0, known=False)


def _stored(name: str, source: SourceConfig, config: RunConfig) -> Manifest | None:
    """The manifest of a source as an earlier run left it; None where there is none."""
    from services.data.sources import manifest_path, resolve_source

    try:
        return Manifest.load(
            manifest_path(name, resolve_source(source, config.data.rooms, config.storage), config.storage)
        )
    except (DataError, OSError):
        return None


def _counted(name: str, manifest: Manifest, config: RunConfig, of: str = "") -> DataSize:
    views, items, pictures = Counter[str](), Counter[str](), Counter[str]()
    scenes: dict[str, list[int]] = {}
    asked, shown = Counter[tuple[str, tuple[str, ...]]](), set[str]()
    most = 0
    for entry in manifest.entries:
        views[str(entry.split)] += entry.n_views
        if entry.kind == "scene" and entry.split is not None:
            scenes.setdefault(str(entry.split), []).append(entry.n_views)
        if entry.kind == "item":
            items[str(entry.split)] += 1
            pictures[str(entry.split)] += entry.n_views
            most = max(most, entry.n_views)
            shown.update(entry.digests)
            if entry.n_views:
                asked[str(entry.split), entry.digests] += 1
    alike = Counter((split, len(digests), count) for (split, digests), count in asked.items())
    groups: dict[str, list[tuple[int, int, int]]] = {}
    for (split, size, count), number in sorted(alike.items()):
        groups.setdefault(split, []).append((size, count, number))
    return DataSize(
        source=name,
        scenes=len(manifest),
        views=dict(views),
        classes=len(manifest.classes),
        items=dict(items),
        pictures=dict(pictures),
        most_pictures=most,
        pairs=_pairs(name, manifest, config),
        scene_views=scenes,
        of=of,
        shown=len(shown),
        sets=dict(Counter(len(digests) for digests in {digests for _, digests in asked})),
        groups=groups,
    )


def _pairs(name: str, manifest: Manifest, config: RunConfig) -> dict[str, int] | None:
    """Pairs by split from the index of the source; None where there is none."""
    if not needs_pairs(config):
        return None
    if config.data.sources[name].format in _FLAT:
        return {}
    from services.data.pairs import stored_pairs

    try:
        index = stored_pairs(config, {name: manifest})[name]
    except (DataError, OSError):
        return None
    found = Counter[str]()
    for entry in manifest.entries:
        if entry.id in index.facts:
            found[str(entry.split)] += len(index.of(entry.id))
    return dict(found)


def _questions(name: str, source: SourceConfig, config: RunConfig) -> DataSize:
    """Questions about the scenes of another source, where they were made before: their pictures are the scenes'."""
    from services.data.questions.ondemand import annotations_folder
    from services.data.sources import is_made_of

    of = is_made_of(source)
    limit = int(source.options.get("max_views", 0) or config.data.questions.max_views)
    if not source.options.get("questions", True) and not source.options.get("scenes", False):
        limit = 1  # captions of single views, or questions about them
    unknown = DataSize(source=name, scenes=0, views={}, classes=0, known=False, most_pictures=limit, of=of)
    about = _stored(of, config.data.sources[of], config)
    if about is None:
        return unknown
    settings = config.data.questions
    most = min(limit, settings.max_views, max((entry.n_views for entry in about.entries), default=1))
    folder = annotations_folder(about, dataclasses.replace(settings, max_views=most), config.storage)
    manifest = _stored(name, dataclasses.replace(source, root=str(folder)), config)
    return unknown if manifest is None else _counted(name, manifest, config, of)


def _rooms(name: str, rooms: RoomsConfig, source: SourceConfig, config: RunConfig) -> DataSize:
    from services.data.rooms.classes import CLASSES
    from services.data.rooms.plan import plan_room

    count = min(rooms.scenes, source.limit) if source.limit else rooms.scenes
    splits = Counter(plan_room(rooms.seed, index).split for index in range(count))
    per_room = -(-rooms.views // source.frame_stride)
    made = _stored(name, source, config) if needs_pairs(config) else None
    return DataSize(
        source=name,
        scenes=count,
        views={split.value: splits[split] * per_room for split in Split},
        scene_views={split.value: [per_room] * splits[split] for split in Split},
        classes=1 + max(c.id for c in CLASSES),
        pairs=None if made is None else _pairs(name, made, config),
    )


def most_pictures(data: Sequence[DataSize]) -> int:
    """Pictures of the largest item of all sources, at least one."""
    return max([1, *(size.most_pictures for size in data)])
