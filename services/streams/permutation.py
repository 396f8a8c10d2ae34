"""Permutations that cost no memory, exact shares, and keys for draws: the arithmetic below the epoch plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

_ROUNDS = 6
_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def key64(*parts: object) -> int:
    """64 bits of sha256 over ``parts`` (JSON values): equal on every machine and in every process."""
    text = json.dumps(parts, separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class Permutation:
    """A keyed bijection of [0, n) computed element by element: no table, so an epoch of 1e8 samples costs nothing.

    A balanced Feistel network over the smallest even number of bits that holds n, with cycle walking: values that
    land outside [0, n) go through the network again, which keeps it a bijection of [0, n) (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002). The domain is less than 4n, so that takes under four turns on
    average. The round function is the finaliser of splitmix64.
    """

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, got n={n}")
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._low = np.uint64((1 << int(self._half)) - 1)
        state = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
        self._keys = [np.uint64(value) for value in state]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of ``index``, int64 in [0, n), of any shape. ValueError for an index outside [0, n)."""
        given = np.asarray(index, dtype=np.int64)
        if given.size and (given.min() < 0 or given.max() >= self.n):
            raise ValueError(f"index outside [0, {self.n}): {given.min()}..{given.max()}")
        values = self._turn(given.astype(np.uint64))
        outside = values >= self.n
        while outside.any():
            values[outside] = self._turn(values[outside])
            outside = values >= self.n
        return values.astype(np.int64)

    def _turn(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._low)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014); uint64 arithmetic wraps on purpose."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) & _MASK


def largest_remainder(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Split ``total`` into whole numbers in proportion to ``weights`` (Hamilton's method).

    The numbers add up to ``total`` and each differs by less than 1 from its exact share. Weights are taken as the
    decimals they print as, so that 0.1 + 0.2 and 0.3 tie; ties go to the name that sorts first. ValueError for a
    negative or non-finite weight, or when all are 0.
    """
    for name, weight in weights.items():
        if not (0 <= weight < float("inf")):
            raise ValueError(f"the weight of {name!r} is {weight}; a finite number >= 0 is allowed")
    exact = {name: Fraction(str(weights[name])) for name in sorted(weights)}
    whole = sum(exact.values())
    if not whole:
        raise ValueError(f"all weights are 0: {dict(weights)}")
    shares = {name: total * weight / whole for name, weight in exact.items()}
    counts = {name: int(share) for name, share in shares.items()}
    left = total - sum(counts.values())
    by_remainder = sorted(shares, key=lambda name: (counts[name] - shares[name], name))
    for name in by_remainder[:left]:
        counts[name] += 1
    return counts
