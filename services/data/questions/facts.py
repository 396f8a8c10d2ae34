"""What the questions are made from: the objects of a scene, their boxes, and where they can be seen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from configs.schema import QuestionsConfig
from services.contracts import Scene, Split
from services.data.images import load_ids
from services.data.questions.boxes import Box, distance, floor_area
from services.errors import DataError

NOT_OBJECTS = frozenset(
    {"wall", "floor", "ceiling", "object", "unknown", "remove", "unannotated", "split", "otherprop"}
)
"""Labels of what nobody would call an object; ScanNet annotates some of them as instances."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Thing:
    """One object. ``share`` (V,) is the part of each view's pixels that it fills."""

    id: int
    label: str
    box: Box | None
    share: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """One scene as the questions see it. ``views`` are indices into the scene's views; arrays run over them."""

    scene: Scene
    views: tuple[int, ...]
    things: tuple[Thing, ...]
    min_visible: float

    @property
    def id(self) -> str:
        """Id of the scene."""
        return self.scene.id

    @property
    def split(self) -> Split | None:
        """Split of the scene."""
        return self.scene.split

    @cached_property
    def counts(self) -> Counter[str]:
        """Objects of each label, seen or not."""
        return Counter(thing.label for thing in self.things)

    def is_visible(self, thing: Thing) -> bool:
        """Whether the object can be seen well in at least one view."""
        return bool((thing.share >= self.min_visible).any())

    @cached_property
    def visible(self) -> tuple[Thing, ...]:
        """Objects that can be seen well."""
        return tuple(thing for thing in self.things if self.is_visible(thing))

    @cached_property
    def unique(self) -> tuple[Thing, ...]:
        """Objects that can be seen, have a box, and are the only one of their label in the whole scene."""
        return tuple(t for t in self.visible if t.box is not None and self.counts[t.label] == 1)

    @cached_property
    def distances(self) -> dict[tuple[int, int], float]:
        """Distance of the closest points, metres, by the ids of all ordered pairs of unique objects."""
        table = {}
        for i, a in enumerate(self.unique):
            for b in self.unique[i + 1 :]:
                table[a.id, b.id] = table[b.id, a.id] = distance(box_of(a), box_of(b))
        return table

    @cached_property
    def floor(self) -> float:
        """Height of the floor: the lowest bottom of any box; 0 without boxes."""
        return min((t.box.bottom for t in self.things if t.box is not None), default=0.0)

    @cached_property
    def alignment(self) -> np.ndarray:
        """4x4 from the scene's world to the frame with z up."""
        return alignment_of(self.scene)

    @cached_property
    def area(self) -> float | None:
        """Floor area in square metres, None where the scene has no mesh. DataError names a broken mesh."""
        return None if self.scene.mesh_path is None else _mesh_area(self.scene.mesh_path, self.alignment)


def box_of(thing: Thing) -> Box:
    """The object's box, for objects that are known to have one."""
    assert thing.box is not None, "only objects with a box reach the spatial questions"
    return thing.box


def alignment_of(scene: Scene) -> np.ndarray:
    """4x4 axis alignment of a scene; the identity where it states none (its world then has z up already)."""
    return np.eye(4) if scene.axis_alignment is None else np.asarray(scene.axis_alignment, dtype=np.float64)


def gather(scene: Scene, config: QuestionsConfig) -> Facts:
    """Read the instance masks of evenly spaced views and measure how much of each view every object fills.

    Views without a mask are left out. DataError where no view has one, or a mask cannot be read.
    """
    masked = [i for i, view in enumerate(scene.views) if view.instance_path is not None]
    if not masked:
        raise DataError(
            f"scene {scene.id}: no view has an instance mask; questions need instances with masks "
            "(choose a source that has them, or leave this source out)"
        )
    count = min(config.max_views, len(masked))
    chosen = np.unique(np.linspace(0, len(masked) - 1, count).round().astype(int))
    views = tuple(masked[i] for i in chosen)
    known = [instance for instance in scene.instances if instance.label.lower() not in NOT_OBJECTS]
    share = np.zeros((len(known), len(views)))
    for column, view in enumerate(views):
        path = scene.views[view].instance_path
        assert path is not None
        ids, pixels = np.unique(load_ids(path), return_counts=True)
        filled = dict(zip(ids.tolist(), (pixels / pixels.sum()).tolist(), strict=True))
        share[:, column] = [filled.get(instance.id, 0.0) for instance in known]
    alignment = alignment_of(scene)
    things = tuple(
        Thing(
            id=instance.id,
            label=instance.label.lower(),
            box=None if instance.box is None else Box.of(instance.box, alignment),
            share=share[row],
        )
        for row, instance in enumerate(known)
    )
    return Facts(scene=scene, views=views, things=things, min_visible=config.min_visible)


def _mesh_area(path: str, alignment: np.ndarray) -> float | None:
    import trimesh

    try:
        mesh = trimesh.load_mesh(path, process=False)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path}: not a readable mesh ({error})") from error
    vertices = np.asarray(mesh.vertices) @ alignment[:3, :3].T + alignment[:3, 3]
    return floor_area(vertices, np.asarray(mesh.faces))
