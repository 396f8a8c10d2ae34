"""A trained Spa3R as a frozen encoder behind VGGT: a set of views, all context, becomes the latents of its scene.

``spa3r`` (records of ``vggt``): ``latents`` (queries, width) in the compute dtype; the network computes in float32.
Weights are random, a part that a run has trained, or a folder in the published layout, of which the frozen networks
beside it are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoints import load_reference
from models.encoders.base import FrozenEncoder, InputKind
from models.encoders.uniugg import READS, TrainedPart
from models.encoders.weights import RANDOM, read_json, read_tensors, torch_dtype
from models.errors import ModelError, WeightsError
from models.pretrained import CONFIG, describe_pretrained, load_part
from models.spa3r.model import Spa3R
from models.spec import TensorSpec

PUBLISHED = "spa3r-base"
"""What a folder in the published layout holds."""


class Spa3rPart(TrainedPart):
    """A whole Spa3R by its folder, in our layout or the published one, or at random."""

    def _is_ours(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() and "model" in read_json(folder / CONFIG)

    def describe(self, folder: Path) -> Mapping[str, Any]:
        """What config.json says; a published folder holds the paper's size."""
        return describe_pretrained(folder) if self._is_ours(folder) else {"model": PUBLISHED, "settings": {}}

    def fill(self, module: nn.Module, folder: Path) -> None:
        """Load either layout, strictly."""
        if self._is_ours(folder):
            load_part(module, folder)
        else:
            load_reference(module, read_tensors(folder))


class Spa3rLatents(FrozenEncoder):
    """The encoder of Spa3R; what decodes is not kept.

    Args:
        upstream: the ``vggt`` encoder of view sets that it was trained behind.
        upstream_codec: codec that its records were stored with.
        weights: see above.
        arch: with random weights ``model`` (a registry name) and its settings.
        seed: of random weights.
        dtype: of the latents.
    """

    input_kind = InputKind.RECORD
    family = "spa3r"

    def __init__(
        self,
        upstream: FrozenEncoder,
        upstream_codec: str,
        *,
        weights: str = RANDOM,
        arch: Mapping[str, Any] | None = None,
        seed: int = 0,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__()
        specs = upstream.outputs()
        shape = specs["tokens"].shape if "tokens" in specs else ()
        if len(shape) != 5 or shape[1] != 1:
            raise ModelError(
                f"Spa3R reads tokens (views, 1, h, w, C) of view sets, the encoder before it gives {dict(specs)}; "
                "`upstream` must name a vggt encoder"
            )
        self.grid, channels = (int(shape[2] or 0), int(shape[3] or 0)), int(shape[4] or 0)
        options = dict(arch or {})
        self.part = Spa3rPart(
            self.family, weights, {"channels": channels, **options} if weights == RANDOM else options, seed
        )
        if self.part.settings["channels"] != channels:
            raise WeightsError(
                f"{weights}: this Spa3R reads features of {self.part.settings['channels']} channels, the encoder "
                f"before it gives {channels}; use the VGGT that it was trained behind"
            )
        self.upstream_codec, self.dtype_name, self.dtype = upstream_codec, dtype, torch_dtype(dtype)
        # Asked for when it is needed: it may read all the weights. Not the encoder itself, which would be our child.
        self._upstream = upstream.identity
        self.model: Spa3R | None = None

    def load(self) -> Spa3rLatents:
        """Build the network now; WeightsError when the weights do not fit. Returns self."""
        if self.model is None:
            self.identity()
            whole = self.part.load()
            assert isinstance(whole, Spa3R), f"{self.part.name} is a Spa3R"
            del whole.decoder, whole.heads, whole.depth_prob, whole.pose_tokenizer
            self.model = whole
            self.freeze()
        return self

    def identity(self) -> Mapping[str, Any]:
        """WeightsError when the part was trained behind other weights: their features would mean nothing here."""
        upstream = dict(self._upstream())
        trained_on, found = self.part.extra.get(READS), upstream.get("weights")
        if trained_on and trained_on != found:
            raise WeightsError(
                f"{self.part.folder}: this Spa3R was trained behind an encoder with sha256 {trained_on[:16]}..., the "
                f"one before it has {str(found)[:16]}...; use that VGGT's weights, or train Spa3R again"
            )
        return {
            "kind": "record",
            "model": type(self).__name__,
            **self.part.identity(),
            "dtype": self.dtype_name,
            "libraries": {"torch": torch.__version__.split("+")[0]},
            "upstream": upstream,
            "upstream_codec": self.upstream_codec,
            "layout": self.layout_version,
        }

    def outputs(self) -> Mapping[str, TensorSpec]:  # noqa: D102
        shape = (self.part.settings["queries"], self.part.settings["width"])
        return {"latents": TensorSpec(shape=shape, dtype=self.dtype_name)}

    def prepare(self, value: Mapping[str, Tensor], transform: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """A record of ``vggt`` -> ``tokens`` (V, h, w, C); ``transform`` must be empty, since pixels are long gone."""
        if transform:
            raise ModelError(f"{type(self).__name__} takes records and has no transform, got {dict(transform)}")
        tokens, wanted = value["tokens"], (1, *self.grid, self.part.settings["channels"])
        if tokens.ndim != 5 or not len(tokens) or tuple(tokens.shape[1:]) != wanted:
            raise ModelError(f"Spa3R takes tokens (views, {', '.join(map(str, wanted))}), got {tuple(tokens.shape)}")
        return {"tokens": tokens[:, 0]}

    def encode(self, inputs: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Prepared sets of equally many views -> ``latents`` (B, queries, width)."""
        model = self.load().model
        assert model is not None
        features = torch.stack([one["tokens"] for one in inputs]).flatten(2, 3).float()
        device = model.query_embed.weight.device
        return {"latents": model.encode(features.to(device), self.grid).to(self.dtype)}

    def flops(self, views: int) -> int:
        """Floating-point operations of one set of so many views, counted on the meta device."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = self.part.make()
            assert isinstance(model, Spa3R), f"{self.part.name} is a Spa3R"
            model.encode(torch.empty(1, views, self.grid[0] * self.grid[1], model.channels), self.grid)
        return int(counter.get_total_flops())

    def parameter_count(self) -> int:
        """Parameters of what runs, counted on the meta device."""
        with torch.device("meta"):
            model: Any = self.part.make()
            kept = (model.projection, model.query_embed, model.encoder)
            return sum(parameter.numel() for child in kept for parameter in child.parameters())
