"""The toy role as a fixture."""

from __future__ import annotations

import types
from typing import Any

import pytest

from tests.support import toy_role


@pytest.fixture
def toy() -> Any:
    """Short names of what ``tests.support.toy_role`` has."""
    return types.SimpleNamespace(
        loop=toy_role.toy_loop,
        steps=toy_role.toy_steps,
        step=toy_role.toy_step_of,
        data=toy_role.toy_data,
        Toy=toy_role.Toy,
    )
