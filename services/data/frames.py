"""Which frames stand for a video: the same every time, so that what was encoded of them once serves every question."""

from __future__ import annotations

import numpy as np


def spread_frames(total: int, most: int) -> tuple[int, ...]:
    """At most ``most`` of ``total`` frames, evenly spaced from the first to the last; all where there are no more.

    The places of ``linspace`` are rounded down, as published evaluations do. ValueError for no frames.
    """
    _positive(total=total, most=most)
    return _linspace(total, min(most, total))


def choose_frames(total: int, fps: float, *, seconds: float = 2.0, least: int = 4, most: int = 8) -> tuple[int, ...]:
    """Frames of a video for training: one every ``seconds``, but at least ``least`` and at most ``most`` (Spa3-VLM).

    Args:
        total: frames of the video.
        fps: frames a second; of a folder of frames the rate at which they were taken, published as 1.
        seconds: between two frames.
        least: frames of a short video; fewer only where it has no more.
        most: frames of a long one.

    Returns:
        Ascending indices without repeats, evenly spaced from the first frame to the last.

    ValueError for no frames, a rate or a distance that is not positive, or ``least`` above ``most``.
    """
    _positive(total=total, fps=fps, seconds=seconds, least=least)
    if least > most:
        raise ValueError(f"the least number of frames, {least}, is above the largest, {most}")
    # Python rounds halves to even, and so did the published choice.
    wanted = round(total / fps / seconds)
    return _linspace(total, min(max(wanted, least), most))


def _linspace(total: int, count: int) -> tuple[int, ...]:
    return tuple(int(frame) for frame in np.unique(np.linspace(0, total - 1, count).astype(int)))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")
