"""Weights of the networks inside metrics, from a path: never random, never unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import WeightsError


def read_tensors(path: str | Path, what: str) -> dict[str, Tensor]:
    """Tensors by name of a safetensors file, of a folder that holds one such file, or of a torch state dict.

    WeightsError, which says ``what`` was looked for, when there is none or it cannot be read.
    """
    if not str(path):
        raise WeightsError(f"no path is given for the {what}; a network with random weights is not used instead")
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(place.glob("*.safetensors"))
        if len(found) != 1:
            raise WeightsError(f"{place} holds {len(found)} safetensors files; give the file of the {what}")
        place = found[0]
    if not place.is_file():
        raise WeightsError(f"{place}: there is no such file ({what})")
    try:
        if place.suffix == ".safetensors":
            return load_file(place)
        stored = torch.load(place, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise WeightsError(f"{place} cannot be read as {what}: {error}") from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise WeightsError(f"{place} holds no tensors by name; {what} are a state dict")
    return stored
