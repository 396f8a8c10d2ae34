"""Models in pure PyTorch, one device. Import with ray, deepspeed, peft and hydra absent."""

from __future__ import annotations

from models import _torchvision  # noqa: F401  first: lpips and transformers import torchvision
