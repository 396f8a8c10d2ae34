"""Which frames stand for a video, against cases counted by hand."""

from __future__ import annotations

import pytest

from services.data.frames import choose_frames, spread_frames


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    [
        (300, 30.0, (0, 74, 149, 224, 299)),  # 10 s: five frames, 299/4 = 74.75 apart
        (900, 30.0, (0, 128, 256, 385, 513, 642, 770, 899)),  # 30 s would be 15: at most eight
        (60, 30.0, (0, 19, 39, 59)),  # 2 s would be one: at least four
        (12, 1.0, (0, 2, 4, 6, 8, 11)),  # a folder of 12 s: six
        (9, 1.0, (0, 2, 5, 8)),  # 4.5 rounds to even, as Python's round does
        (3, 1.0, (0, 1, 2)),  # four of three: repeats go
        (1, 1.0, (0,)),
    ],
)
def test_training_frames(total: int, fps: float, expected: tuple[int, ...]) -> None:
    assert choose_frames(total, fps) == expected


def test_training_frames_can_be_set() -> None:
    assert choose_frames(100, 1.0, most=32) == choose_frames(100, 1.0, seconds=2, least=32, most=32)
    assert len(choose_frames(100, 1.0, most=32)) == 32
    assert choose_frames(100, 1.0, seconds=50, least=1) == (0, 99)


@pytest.mark.parametrize(("total", "most", "expected"), [(9, 3, (0, 4, 8)), (3, 32, (0, 1, 2)), (10, 4, (0, 3, 6, 9))])
def test_evaluation_frames(total: int, most: int, expected: tuple[int, ...]) -> None:
    assert spread_frames(total, most) == expected


def test_evaluation_takes_32_frames_of_a_long_video() -> None:
    chosen = spread_frames(1000, 32)
    assert (len(chosen), chosen[0], chosen[1], chosen[-1]) == (32, 0, 32, 999)  # 999/31 = 32.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total": 0, "fps": 1.0}, "total=0 must be above 0"),
        ({"total": 5, "fps": 0.0}, "fps=0.0 must be above 0"),
        ({"total": 5, "fps": 1.0, "seconds": -1.0}, "seconds=-1.0 must be above 0"),
        ({"total": 5, "fps": 1.0, "least": 9}, "the least number of frames, 9, is above the largest, 8"),
    ],
)
def test_what_cannot_be_chosen_from(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_frames(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total=0 must be above 0"):
        spread_frames(0, 4)
