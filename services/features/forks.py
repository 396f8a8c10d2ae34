"""What a forked child must not take over from its parent: locks that another thread held, open files, threads."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class _Resettable(Protocol):
    def after_fork(self) -> None:
        """Runs in the child, before anything else uses the object."""


_objects: weakref.WeakSet[_Resettable] = weakref.WeakSet()


def reset_in_child(item: _Resettable) -> None:
    """Call ``item.after_fork()`` in every child that this process forks, as long as the object lives."""
    _objects.add(item)


def _after_fork() -> None:
    for item in list(_objects):
        item.after_fork()


os.register_at_fork(after_in_child=_after_fork)
