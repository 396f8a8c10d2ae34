"""In which units metrics are, for readers of tables."""

from __future__ import annotations

from collections.abc import Mapping

_UNITS: Mapping[str, str] = {"psnr": "dB", "chamfer": "m", "view1_error": "m", "view2_error": "m"}
"""Last word of a metric's name -> its unit; others are ratios, shares, cosines and losses."""


def with_unit(metric: str) -> str:
    """The name of a metric with its unit, where it has one: ``points/chamfer (m)``."""
    unit = _UNITS.get(metric.rpartition("/")[2])
    return f"{metric} ({unit})" if unit else metric
