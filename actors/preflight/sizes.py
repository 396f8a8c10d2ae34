"""How many scenes and views a run's data hold, without reading a picture.

Procedural rooms are counted from their settings; another source from its manifest, if it was indexed before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.schema import RoomsConfig, RunConfig, SourceConfig
from services.contracts import Split
from services.errors import DataError


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Counts of one source; ``views`` by split, pictures of items among them. ``known`` is false when not indexed."""

    source: str
    scenes: int
    views: Mapping[str, int]
    classes: int
    known: bool = True

    @property
    def total_views(self) -> int:
        """Views of all splits."""
        return sum(self.views.values())


def data_sizes(config: RunConfig) -> list[DataSize]:
    """The size of every source. DataError or ConfigError when a source cannot be opened."""
    return [_size(name, source, config) for name, source in config.data.sources.items()]


def _size(name: str, source: SourceConfig, config: RunConfig) -> DataSize:
    if source.format == "rooms" and not source.root:
        return _rooms(name, config.data.rooms, source)
    from services.data.manifest import Manifest
    from services.data.readers import open_reader
    from services.data.sources import settings_digest

    root, storage = Path(source.root), Path(config.storage.root)
    reader = open_reader(root, source, cache=storage / "data" / "derived" / name)
    path = storage / "manifests" / f"{name}-{settings_digest(source, root, reader.version)[:16]}.arrow"
    try:
        manifest = Manifest.load(path)
    except (DataError, OSError):
        return DataSize(source=name, scenes=len(reader.list_ids()), views={}, classes=0, known=False)
    views: Counter[str] = Counter()
    for entry in manifest.entries:
        views[str(entry.split)] += entry.n_views
    return DataSize(source=name, scenes=len(manifest), views=dict(views), classes=len(manifest.classes))


def _rooms(name: str, rooms: RoomsConfig, source: SourceConfig) -> DataSize:
    from services.data.rooms.classes import CLASSES
    from services.data.rooms.plan import plan_room

    count = min(rooms.scenes, source.limit) if source.limit else rooms.scenes
    splits = Counter(plan_room(rooms.seed, index).split for index in range(count))
    per_room = -(-rooms.views // source.frame_stride)
    return DataSize(
        source=name,
        scenes=count,
        views={split.value: splits[split] * per_room for split in Split},
        classes=1 + max(c.id for c in CLASSES),
    )
