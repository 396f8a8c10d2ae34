"""Models in pure PyTorch, one device. Import with ray, deepspeed, peft and hydra absent.

Importing this package costs the import of torch and nothing more: the registry is a table of names, and a
model's own modules are imported when it is built. The function ``spec`` deliberately stands before the submodule
of that name; ``from models.spec import ModelSpec`` works beside it.
"""

from __future__ import annotations

from models import _torchvision  # noqa: F401  first: lpips and transformers import torchvision
from models.checkpoints import LoadReport, load_reference
from models.registry import build, list_models, spec

__all__ = ["LoadReport", "build", "list_models", "load_reference", "spec"]
