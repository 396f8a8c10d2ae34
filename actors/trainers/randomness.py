"""The global random generators of one role: kept apart where roles share a process, and saved with a checkpoint.

Draws that decide a sample (noise, augmentation) come from generators keyed by the sample and need none of this; what
stays are the global ones that layers such as dropout use.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Snapshot = dict[str, Any]
"""States of the generators as their libraries give them; never changed in place."""


class RoleRandom:
    """Python's, numpy's and torch's global generators as one role on one rank sees them."""

    def __init__(self, seed: int, role: str, rank: int) -> None:
        digest = hashlib.sha256(f"{seed}/{role}/{rank}".encode()).digest()
        key = int.from_bytes(digest[:4], "little")
        with _preserved():
            random.seed(key)
            np.random.seed(key)  # noqa: NPY002  libraries draw from the global generator
            torch.manual_seed(key)
            self._state = capture()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, the global generators are this role's; outside they are as they were."""
        with _preserved():
            restore(self._state)
            try:
                yield
            finally:
                self._state = capture()

    def snapshot(self) -> Snapshot:
        """The state now, to :meth:`rewind` to in this process."""
        return self._state

    def rewind(self, snapshot: Snapshot) -> None:
        """Back to a snapshot."""
        self._state = snapshot

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        version, numbers, gauss = self._state["python"]
        name, keys, position, has_gauss, cached = self._state["numpy"]
        return {
            "python": [version, list(numbers), gauss],
            "numpy": [name, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
            "torch": bytes(self._state["torch"].numpy()).hex(),
            "cuda": [bytes(state.numpy()).hex() for state in self._state["cuda"]],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave. CUDA states are taken for the devices that exist."""
        version, numbers, gauss = state["python"]
        name, keys, *rest = state["numpy"]
        self._state = {
            "python": (version, tuple(numbers), gauss),
            "numpy": (name, np.array(keys, dtype=np.uint32), *rest),
            "torch": _tensor(state["torch"]),
            "cuda": [_tensor(text) for text in state["cuda"]][: torch.cuda.device_count()],
        }


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def capture() -> Snapshot:
    """The state of Python's, numpy's and torch's global generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: Snapshot) -> None:
    """Set the global generators to what :func:`capture` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(cuda, device)


@contextmanager
def _preserved() -> Iterator[None]:
    outside = capture()
    try:
        yield
    finally:
        restore(outside)
