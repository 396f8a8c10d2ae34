"""``loom3d export``: a trained run as folders that transformers, diffusers, PEFT and this project load."""

from __future__ import annotations

from actors.export.proof import Proof
from actors.export.run import Exported, export_run, run

__all__ = ["Exported", "Proof", "export_run", "run"]
