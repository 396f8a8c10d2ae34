"""The contract of a frozen encoder: a network that never trains, whose outputs are worth keeping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.spec import TensorSpec


class InputKind(StrEnum):
    """What one input of an encoder is."""

    IMAGE = "image"
    VIEWS = "views"
    """An ordered set of views with roles (context, target): the outputs depend on all of them."""
    TEXT = "text"
    """Text; the outputs carry the character offsets of the tokens."""
    RECORD = "record"
    """A record of another encoder, whose fingerprint then is part of this one's."""


class FrozenEncoder(nn.Module, ABC):
    """A network in eval mode without gradients, its weights held in the compute dtype.

    Subclasses give ``input_kind``, :meth:`identity`, :meth:`prepare`, :meth:`encode` and :meth:`outputs`.
    An output tensor has the inputs first; patch tokens keep their grid: ``tokens`` is (B, layers, h, w, C) and
    summary tokens stand apart: ``summary`` is (B, k, C).
    """

    input_kind: InputKind
    layout_version: int = 1
    """Raised when the meaning of an output changes; part of the fingerprint."""

    def freeze(self) -> FrozenEncoder:
        """Eval mode, no gradients; returns self."""
        return self.eval().requires_grad_(False)

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """All that decides an output beside the input, as JSON: weights digest, layers, compute dtype,
        preprocessing with library versions, padding shape. Never a path, a name or a time.
        """

    @abstractmethod
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Shape (without the batch axis; None is ragged) and dtype of every output."""

    @abstractmethod
    def prepare(self, value: Any, transform: Mapping[str, Any]) -> Tensor | Mapping[str, Tensor]:
        """One raw input -> model input, on CPU. For images: uint8 (H, W, 3) -> float32 (3, h, w)."""

    @abstractmethod
    def encode(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:
        """Prepared inputs of one shape -> outputs, the inputs first, on the module's device."""

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:  # noqa: D102
        return self.encode(inputs)


def image_to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float().div_(255.0)
