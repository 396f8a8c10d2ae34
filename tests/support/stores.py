"""Records whose content follows from their key, so that a test can tell a wrong one; and writers to be killed.

As a script (``python -m tests.support.stores ROOT ROUNDS``): forks three writers a round, kills them with SIGKILL
at a random instant, and lets each note what was acknowledged in ``ROOT/acks-*``. Forking from a process that has
imported everything makes a round take milliseconds.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from services.contracts import FeatureKey, Record, Tensor
from services.features.keys import feature_key
from services.features.namespace import Namespace
from services.features.store import FeatureStore

IDENTITY = {"encoder": "test", "layers": [1, 2]}


def key_of(name: object) -> FeatureKey:
    """A key by name."""
    return feature_key([str(name)])


def record_of(key: FeatureKey, tokens: int = 6, channels: int = 16) -> Record:
    """The record that belongs to a key: bf16 tokens and a float32 summary."""
    rng = np.random.default_rng(int.from_bytes(key.digest[:8], "big"))
    return {
        "tokens": Tensor(data=rng.integers(0, 2**14, (tokens, channels)).astype(np.int16), dtype="bfloat16"),
        "summary": Tensor(data=rng.standard_normal((2, channels)).astype(np.float32), dtype="float32"),
    }


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two records are equal to the bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and np.array_equal(a[name].data, b[name].data) for name in a
    )


def filled(root: Path, names: object, **settings: object) -> tuple[FeatureStore, Namespace, list[FeatureKey]]:
    """A store with committed records for some names."""
    store = FeatureStore(root, **settings)  # type: ignore[arg-type]
    namespace = store.open(IDENTITY)
    keys = [key_of(name) for name in names]  # type: ignore[attr-defined]
    for key in keys:
        assert namespace.put(key, record_of(key))
    namespace.flush()
    return store, namespace, keys


def _write_until_killed(root: Path, name: str) -> None:
    namespace = FeatureStore(root, shard_bytes=20_000).open(IDENTITY)
    acks = os.open(root / f"acks-{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    rng = random.Random(name)
    for i in range(1_000_000):
        key = key_of(f"{name}-{i}")
        namespace.put(key, record_of(key, tokens=rng.randint(1, 200)))
        if rng.random() < 0.2:
            os.write(acks, b"".join(key.digest for key in namespace.flush()))


def main(root: Path, rounds: int) -> None:
    """Kill three concurrent writers, again and again."""
    for number in range(rounds):
        children = []
        for writer in range(3):
            child = os.fork()
            if child == 0:
                try:
                    _write_until_killed(root, f"{number}-{writer}")
                finally:
                    os._exit(1)
            children.append(child)
        # On a busy disk the first commit may take long: wait for one, then let chance choose the instant.
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size for path in root.glob(f"acks-{number}-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(random.Random(number).uniform(0.0, 0.1))
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            _, status = os.waitpid(child, 0)
            if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
                sys.exit(f"a writer ended by itself with status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
