"""``loom3d plan``: what a run needs and whether it fits, before any actor exists."""

from __future__ import annotations

from actors.preflight.estimate import check, plan
from actors.preflight.plan import Plan
from actors.preflight.render import render

__all__ = ["Plan", "check", "plan", "render"]
