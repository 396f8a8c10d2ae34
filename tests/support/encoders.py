"""Encoders that are counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from configs import RunConfig
from services.features.encode import Encoder


class Counting:
    """Makes encoders (``FeatureClient(make_encoder=...)``) and counts what they encode, by their names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, name: str, config: RunConfig, **options: Any) -> Any:
        counts = self.counts

        class Counted(Encoder):
            def encode(self, requests: Any) -> Any:
                counts[name] += len(requests)
                return super().encode(requests)

        return Counted(name, config, **options)
