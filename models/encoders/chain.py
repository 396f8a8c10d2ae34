"""Encoders of records: they read what another frozen encoder gave, and make it smaller.

Their identity holds the whole identity of the encoder before them and the codec its records were stored with, so
that a changed upstream weight or a lossier cache is another fingerprint here too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.encoders.base import FrozenEncoder, InputKind
from models.encoders.weights import RANDOM, stored_digest, tensor_digest, torch_dtype
from models.errors import ModelError, WeightsError
from models.spec import TensorSpec


class RecordEncoder(FrozenEncoder):
    """Base of encoders whose input is a record (``tokens`` and ``summary``) of ``upstream``; keeps its summary."""

    input_kind = InputKind.RECORD

    def __init__(self, upstream: FrozenEncoder, upstream_codec: str, dtype: str) -> None:
        super().__init__()
        specs = upstream.outputs()
        shape = specs["tokens"].shape if "tokens" in specs else ()
        if len(shape) != 4 or None in shape:
            raise ModelError(f"an encoder of records needs tokens (layers, h, w, C) upstream, got {dict(specs)}")
        self.shape: tuple[int, ...] = tuple(int(axis or 0) for axis in shape)
        self.summary_spec = specs["summary"]
        self.upstream_identity, self.upstream_codec = dict(upstream.identity()), upstream_codec
        self.dtype_name, self.dtype = dtype, torch_dtype(dtype)

    @abstractmethod
    def own_identity(self) -> Mapping[str, Any]:
        """What this encoder adds to the identity of its upstream."""

    def identity(self) -> Mapping[str, Any]:  # noqa: D102
        return {
            "kind": "record",
            "model": type(self).__name__,
            **self.own_identity(),
            "dtype": self.dtype_name,
            "libraries": {"torch": torch.__version__.split("+")[0]},
            "upstream": self.upstream_identity,
            "upstream_codec": self.upstream_codec,
            "layout": self.layout_version,
        }

    def prepare(self, value: Mapping[str, Tensor], transform: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """A record as torch tensors, checked; ``transform`` must be empty, since pixels are long gone."""
        if transform:
            raise ModelError(f"{type(self).__name__} takes records and has no transform, got {dict(transform)}")
        if tuple(value["tokens"].shape) != self.shape:
            raise ModelError(f"{type(self).__name__} takes tokens {self.shape}, got {tuple(value['tokens'].shape)}")
        return {name: value[name] for name in ("tokens", "summary")}

    @abstractmethod
    def tokens(self, tokens: Tensor) -> Tensor:
        """float32 (B, layers, h, w, C) -> float32 (B, layers, h', w', C')."""

    def encode(self, inputs: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:  # noqa: D102
        tokens = torch.stack([record["tokens"] for record in inputs]).float()
        summary = torch.stack([record["summary"] for record in inputs])
        return {"tokens": self.tokens(tokens).to(self.dtype), "summary": summary.to(self.dtype)}

    def _outputs(self, tokens: tuple[int, ...]) -> Mapping[str, TensorSpec]:
        return {
            "tokens": TensorSpec(shape=tokens, dtype=self.dtype_name),
            "summary": TensorSpec(shape=self.summary_spec.shape, dtype=self.dtype_name),
        }


class PooledTokens(RecordEncoder):
    """Averages the grid of patch tokens down to ``height`` x ``width`` tokens (adaptive windows)."""

    def __init__(self, upstream: FrozenEncoder, upstream_codec: str, *, height: int, width: int, dtype: str) -> None:
        super().__init__(upstream, upstream_codec, dtype)
        _, rows, columns, _ = self.shape
        if not (1 <= height <= rows and 1 <= width <= columns):
            raise ModelError(f"pooling to {height}x{width} tokens must be between 1x1 and the grid {rows}x{columns}")
        self.grid = (height, width)

    def own_identity(self) -> Mapping[str, Any]:  # noqa: D102
        return {"grid": list(self.grid)}

    def outputs(self) -> Mapping[str, TensorSpec]:  # noqa: D102
        return self._outputs((self.shape[0], *self.grid, self.shape[3]))

    def tokens(self, tokens: Tensor) -> Tensor:  # noqa: D102
        batch, layers = tokens.shape[:2]
        planes = tokens.flatten(0, 1).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(planes, self.grid).permute(0, 2, 3, 1)
        return pooled.unflatten(0, (batch, layers))


class PCAProjection(RecordEncoder):
    """Projects every token to ``channels`` numbers: (x - mean) @ components^T, the same for every layer.

    ``weights`` is a folder whose model.safetensors holds ``mean`` (C,) and ``components`` (k, C), as a PCA of a
    sample of tokens gives them, or "random": orthonormal rows from ``seed`` and no mean, which keeps distances in
    expectation (Johnson and Lindenstrauss) and needs no data.
    """

    mean: Tensor
    components: Tensor

    def __init__(
        self,
        upstream: FrozenEncoder,
        upstream_codec: str,
        *,
        weights: str,
        channels: int,
        seed: int,
        dtype: str,
    ) -> None:
        super().__init__(upstream, upstream_codec, dtype)
        width = self.shape[3]
        if not 1 <= channels <= width:
            raise ModelError(f"a projection to {channels} channels must have 1 to {width}, the width upstream")
        if weights == RANDOM:
            draw = torch.randn(width, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            stored = {"mean": torch.zeros(width), "components": torch.linalg.qr(draw).Q.T.float().contiguous()}
            self.digest = tensor_digest(stored)
        else:
            stored, self.digest = self._load(Path(weights).expanduser(), channels, width)
        self.register_buffer("mean", stored["mean"])
        self.register_buffer("components", stored["components"])

    @staticmethod
    def _load(folder: Path, channels: int, width: int) -> tuple[dict[str, Tensor], str]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        digest = stored_digest(folder)
        try:
            stored = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{folder}/model.safetensors cannot be read: {error}") from error
        want = {"mean": (width,), "components": (channels, width)}
        have = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if have != want:
            raise WeightsError(f"{folder}/model.safetensors holds {have}; this projection needs {want}")
        return {name: tensor.float() for name, tensor in stored.items()}, digest

    def own_identity(self) -> Mapping[str, Any]:  # noqa: D102
        return {"weights": self.digest, "channels": self.components.shape[0]}

    def outputs(self) -> Mapping[str, TensorSpec]:  # noqa: D102
        return self._outputs((*self.shape[:3], self.components.shape[0]))

    def tokens(self, tokens: Tensor) -> Tensor:  # noqa: D102
        mean, components = self.mean.to(tokens.device), self.components.to(tokens.device)
        return (tokens - mean) @ components.T
