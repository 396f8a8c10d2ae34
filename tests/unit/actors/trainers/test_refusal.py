from __future__ import annotations

from pathlib import Path

import pytest

from actors.trainers import refusal
from services.errors import NonFiniteError, QuarantineLimitError


@pytest.mark.parametrize("error", [NonFiniteError("sample a#1 is NaN"), QuarantineLimitError("3 of 9 broke")])
def test_a_noted_error_comes_back_as_itself(tmp_path: Path, error: Exception) -> None:
    assert refusal.read(tmp_path) is None
    refusal.note(tmp_path, error)
    found = refusal.read(tmp_path)
    assert type(found) is type(error)
    assert str(found) == str(error)
    refusal.clear(tmp_path)
    assert refusal.read(tmp_path) is None
