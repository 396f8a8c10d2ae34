"""Errors of the model package (it imports nothing of ours, so they live here)."""

from __future__ import annotations


class ModelError(ValueError):
    """A model was asked for something it cannot be: an unknown name, sizes that do not divide."""


class WeightsError(ModelError):
    """Weights are missing, left over, or of the wrong shape; the message lists the names."""


class InputError(ModelError):
    """An input of which a model can make nothing, whatever its settings: a frame too flat. The data are at fault."""
