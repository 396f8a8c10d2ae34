"""Settings of all unit tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes is the machine's affair: on a busy one the default deadline fails tests of arithmetic.
settings.register_profile("loom3d", deadline=None)
settings.load_profile("loom3d")
