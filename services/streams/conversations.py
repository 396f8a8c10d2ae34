"""The kind ``conversation``: an item with turns, all of its images as context."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from services.contracts import Role, ViewRole

if TYPE_CHECKING:
    from services.streams.sampling import Draw, EntryLike


class ConversationSampler:
    """Conversations with any number of images; one unit an item that has text."""

    def units(self, entry: EntryLike) -> int:
        """1 for an item with text (ingest states its length), else 0."""
        return int(entry.kind == "item" and entry.length > 0)

    def spoiled(self, entry: EntryLike, broken: frozenset[int]) -> Iterable[int]:
        """The unit, when one of the images is broken: the text speaks of all of them."""
        return () if broken.isdisjoint(range(entry.n_views)) else (0,)

    def draw(
        self,
        n_views: int,
        unit: int,  # noqa: ARG002
        random: np.random.Generator,  # noqa: ARG002
        broken: frozenset[int] = frozenset(),  # noqa: ARG002
        item: str = "",  # noqa: ARG002
    ) -> Draw:
        """All images in order."""
        from services.streams.sampling import Draw

        return Draw(views=tuple(ViewRole(index=index, role=Role.CONTEXT) for index in range(n_views)))
