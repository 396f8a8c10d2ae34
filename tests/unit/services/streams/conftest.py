"""Fixtures of the small world with several encoders, for the tests of this folder."""

from __future__ import annotations

from tests.unit.services.streams.joint_world import client, config, manifest, world  # noqa: F401
