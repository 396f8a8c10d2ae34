"""Conversations about the same pictures, several a sample: what all of them begin with is then read once.

A group is what a split of a source asks about one ordered set of pictures. Of its n conversations every turn through
the source's units makes ceil(n / size) packs, of sizes that differ by one at most, each conversation in exactly one of
them; which stand together is drawn anew for each turn. A pass over a whole split packs them in the manifest's order.

A pack is named by its first conversation, so that an id in quarantine means that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from services.contracts import Role, ViewRole
from services.streams.permutation import key64
from services.streams.sampler import Draw, EntryLike, Sampler, Unit

if TYPE_CHECKING:
    from services.data.rows import Entry

KIND = "conversation"


class PackSampler(Sampler):
    """Conversations of one source, at most ``size`` of a group a sample.

    Args:
        groups: id of a group's first conversation -> the ids of all of them, the first one among them.
        size: at most so many a sample.
        seed: of the run.
        source: name of the source.
    """

    def __init__(self, groups: Mapping[str, tuple[str, ...]], size: int, *, seed: int = 0, source: str = "") -> None:
        if size < 1:
            raise ValueError(f"a pack holds at least one conversation, got {size}")
        self.groups, self.size, self.seed, self.source = groups, size, seed, source

    def units(self, entry: EntryLike) -> int:
        """Packs of the group that begins with this entry; 0 for the others of a group."""
        return -(-len(self.groups.get(entry.id, ())) // self.size)

    def spoiled(self, entry: EntryLike, broken: frozenset[int]) -> Iterable[int]:
        """All packs, when one of the pictures is broken: the texts speak of all of them."""
        return () if broken.isdisjoint(range(entry.n_views)) else range(self.units(entry))

    def members(self, group: str, unit: int, turn: int | None) -> tuple[str, ...]:
        """Ids of the conversations of pack ``unit``; ``turn`` None packs them in order."""
        ids = self.groups[group]
        order = np.arange(len(ids))
        if turn is not None:
            order = np.random.default_rng(key64("packs", self.seed, self.source, group, turn)).permutation(len(ids))
        parts = np.array_split(order, -(-len(ids) // self.size))
        return tuple(ids[place] for place in parts[unit].tolist())

    def draw(self, unit: Unit, random: np.random.Generator) -> Draw:  # noqa: ARG002
        """All pictures in order; ``questions`` are the ids of the pack's conversations."""
        views = tuple(ViewRole(index=index, role=Role.CONTEXT) for index in range(unit.n_views))
        questions = self.members(unit.item, unit.number, unit.turn)
        return Draw(views=views, questions=questions, item=questions[0])


def picture_groups(entries: Iterable[Entry], source: str, quarantine: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """First id -> ids of the conversations about the same pictures in the same order.

    Without those that the quarantine names, or a sample or picture of them.
    One without pictures has nothing to share, and is a group of its own.
    """
    gone = {name.rpartition(mark)[0] for name in quarantine for mark in (f"#{KIND}", "#view") if mark in name}
    gone |= quarantine
    found: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        if entry.kind != "item" or entry.length <= 0 or not gone.isdisjoint((entry.id, f"{source}/{entry.id}")):
            continue
        found.setdefault(entry.digests or (f"text {entry.id}",), []).append(entry.id)
    return {ids[0]: tuple(ids) for ids in found.values()}
