"""Parts of UniUGG that a run has trained, as frozen encoders: the ViT, the VAE behind it, and the VAE's reconstruction;
and MASt3R's ViT, which the paper compares its own with.

``uniugg_vit`` (images): ``tokens`` (1, h, w, C) and ``summary`` (3, C) of the student.
``mast3r`` (images): ``tokens`` (1, h, w, C) of CroCo's ViT inside MASt3R, and their mean as ``summary`` (1, C): it has
    no class token. Weights may also be a folder in MASt3R's published layout, or its hub name.
``uniugg_vae`` (records of it): ``mean`` and ``logvar`` float32 (latent channels, 2h, 2w) of the posterior.
``uniugg_reconstruction`` (records of it): ``tokens`` (1, h, w, C) decoded from the posterior's mean, and the summary
    as it came, so that it can stand where the ViT's record stands.

Weights are a folder that :mod:`models.pretrained` wrote, or random ones of a model of the registry (``arch``: its
name under ``model``, settings beside it). Their digest is in the identity, so a part that was trained further is
another encoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.checkpoints import load_reference
from models.encoders.base import FrozenEncoder, InputKind
from models.encoders.chain import RecordEncoder
from models.encoders.preprocess import Preprocessing
from models.encoders.weights import (
    RANDOM,
    read_json,
    resolve_folder,
    same_digest,
    seeded,
    stored_digest,
    tensor_digest,
    torch_dtype,
)
from models.errors import ModelError, WeightsError
from models.pretrained import describe_pretrained, load_part, read_pretrained
from models.registry import build, spec
from models.spec import TensorSpec
from models.uniugg.encoder import MEAN, STD

READS = "reads"
"""Key of a part's config.json: digest of the weights of the encoder whose tokens it was trained on."""

#: Family -> prefix of the registry names that fit, and the one that random weights take.
PARTS: Mapping[str, tuple[str, str]] = {
    "uniugg_vit": ("uniugg-vit-", "uniugg-vit-tiny"),
    "mast3r": ("mast3r-", "mast3r-tiny"),
    "vggt_patches": ("vggt-", "vggt-tiny"),
    "vggt": ("vggt-", "vggt-tiny"),
    "spa3r": ("spa3r-", "spa3r-tiny"),
    "uniugg_vae": ("spatial-vae-", "spatial-vae-tiny"),
    "uniugg_reconstruction": ("spatial-vae-", "spatial-vae-tiny"),
}


class TrainedPart:
    """A part by its folder, or at random: what it is, its digest, and the module when it is needed."""

    def __init__(self, family: str, weights: str, arch: Mapping[str, Any], seed: int) -> None:
        prefix, default = PARTS[family]
        self.folder = None if weights == RANDOM else self.locate(weights)
        self.seed = seed
        self._digest = ""
        self.extra: Mapping[str, Any] = {}
        """Content of config.json."""
        if self.folder is None:
            settings = {key: value for key, value in arch.items() if key != "model"}
            self.name = str(arch.get("model", default))
        else:
            if arch:
                raise ModelError(f"encoder arch {dict(arch)} is for weights=random only; {weights} has its own")
            described = self.describe(self.folder)
            settings = dict(described["settings"])
            self.name, self.extra = str(described["model"]), described
        if not self.name.startswith(prefix):
            raise WeightsError(f"{weights} is a {self.name}; family {family} takes {prefix}*")
        self.settings: dict[str, Any] = {**spec(self.name).defaults, **settings}

    def locate(self, weights: str) -> Path:
        """The folder that ``weights`` names."""
        return Path(weights).expanduser()

    def describe(self, folder: Path) -> Mapping[str, Any]:
        """What the folder says that it holds: ``model`` and ``settings``."""
        return describe_pretrained(folder)

    def stored(self, folder: Path) -> str:
        """Digest of the weights that the folder holds."""
        return stored_digest(folder)

    def fill(self, module: nn.Module, folder: Path) -> None:
        """Load the folder's weights into the module that :meth:`make` gave. WeightsError when they do not fit."""
        load_part(module, folder)

    def make(self) -> nn.Module:
        """The module without weights; on the meta device where that is current."""
        return build(self.name, **self.settings)

    def load(self) -> nn.Module:
        """The module with its weights, float32, in eval mode. WeightsError when they changed since they were named."""
        if self.folder is None:
            module = seeded(self.make, self.seed)
            self._digest = tensor_digest(module.state_dict())
        else:
            module = seeded(self.make, self.seed)  # not on meta: what is not stored (positions) must be computed
            self.fill(module, self.folder)
            self._digest = same_digest(self.stored(self.folder), self._digest, self.folder)
        return module.eval().requires_grad_(False)

    @property
    def digest(self) -> str:
        """sha256 of the weights."""
        if not self._digest:
            if self.folder is None:
                self.load()
            else:
                self._digest = self.stored(self.folder)
        return self._digest

    def identity(self) -> dict[str, Any]:
        """Digest and architecture, as JSON."""
        return {"weights": self.digest, "architecture": {"model": self.name.rpartition("-")[0], **self.settings}}


PUBLISHED_MAST3R = "mast3r-large"
"""What a folder in MASt3R's own layout holds."""


class _Mast3rPart(TrainedPart):
    """A whole MASt3R, in our layout or the published one, whose config.json says nothing that we could build from."""

    def locate(self, weights: str) -> Path:
        """A folder, or the snapshot of a hub name."""
        return resolve_folder(weights)

    def _is_ours(self, folder: Path) -> bool:
        return "model" in read_json(folder / "config.json")

    def describe(self, folder: Path) -> Mapping[str, Any]:
        if self._is_ours(folder):
            return describe_pretrained(folder)
        return {"model": PUBLISHED_MAST3R, "settings": {}}

    def fill(self, module: nn.Module, folder: Path) -> None:
        if self._is_ours(folder):
            load_part(module, folder)
        else:
            load_reference(module, read_pretrained(folder))


class PartViT(FrozenEncoder):
    """A ViT among the parts as an encoder of images. Weights from a folder load at the first :meth:`encode`."""

    input_kind = InputKind.IMAGE
    family: str
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Mean and deviation of the pictures that the network was trained on."""

    def __init__(
        self,
        weights: str,
        *,
        arch: Mapping[str, Any] | None = None,
        seed: int = 0,
        height: int,
        width: int,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__()
        self.part = self.find(weights, arch or {}, seed)
        self.dtype_name, self.dtype = dtype, torch_dtype(dtype)
        mean, std = self.normalisation
        self.preprocessing = Preprocessing(height=height, width=width, mean=mean, std=std)
        self.model: nn.Module | None = None
        with torch.device("meta"), torch.no_grad():
            self._shapes = {
                name: tuple(tensor.shape[1:])
                for name, tensor in self.run(self.network(), torch.empty(1, 3, height, width)).items()
            }

    def find(self, weights: str, arch: Mapping[str, Any], seed: int) -> TrainedPart:
        """Where the weights are."""
        return TrainedPart(self.family, weights, arch, seed)

    def network(self, part: nn.Module | None = None) -> nn.Module:
        """Of a part (by default one without weights) the network that runs."""
        return self.part.make() if part is None else part

    @abstractmethod
    def run(self, model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        """Normalised pictures (B, 3, H, W) -> the outputs."""

    def load(self) -> PartViT:
        """Build the network now; WeightsError when the folder does not fit. Returns self."""
        if self.model is None:
            self.model = self.network(self.part.load()).to(self.dtype)
            self.freeze()
        return self

    def identity(self) -> Mapping[str, Any]:  # noqa: D102
        return {
            "kind": "image",
            "model": type(self).__name__,
            **self.part.identity(),
            "dtype": self.dtype_name,
            "preprocessing": self.preprocessing.identity(),
            "libraries": {"torch": torch.__version__.split("+")[0]},
            "padding": [self.preprocessing.height, self.preprocessing.width],
            "layout": self.layout_version,
        }

    def outputs(self) -> Mapping[str, TensorSpec]:  # noqa: D102
        return {name: TensorSpec(shape=shape, dtype=self.dtype_name) for name, shape in self._shapes.items()}

    def prepare(self, value: np.ndarray, transform: Mapping[str, Any]) -> Tensor:
        """uint8 (H, W, 3) -> normalised float32 (3, height, width); ``transform`` as in preprocess.py."""
        return self.preprocessing(value, transform)

    def encode(self, inputs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Prepared images -> tokens (B, 1, h, w, C) and summary (B, k, C), in the compute dtype."""
        model = self.load().model
        assert model is not None
        device = next(model.parameters()).device
        return self.run(model, torch.stack(list(inputs)).to(device=device, dtype=self.dtype))

    def flops_per_image(self) -> int:
        """Floating-point operations of one image's forward pass, counted on the meta device."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.run(self.network(), torch.empty(1, 3, self.preprocessing.height, self.preprocessing.width))
        return int(counter.get_total_flops())

    def parameter_count(self) -> int:
        """Parameters of the network, counted on the meta device."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.network().parameters())


class UniuggViT(PartViT):
    """UniUGG's student."""

    family = "uniugg_vit"
    normalisation = MEAN, STD

    def run(self, model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:  # noqa: D102
        out = model(pixels)
        return {"tokens": out.tokens[:, None], "summary": out.summary}


class Mast3rViT(PartViT):
    """CroCo's ViT as MASt3R trained it; decoder and heads are left out."""

    family = "mast3r"
    normalisation = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def find(self, weights: str, arch: Mapping[str, Any], seed: int) -> TrainedPart:  # noqa: D102
        return _Mast3rPart(self.family, weights, arch, seed)

    def network(self, part: nn.Module | None = None) -> nn.Module:  # noqa: D102
        return super().network(part).get_submodule("encoder")

    def run(self, model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:  # noqa: D102
        flat, grid = model(pixels)
        return {"tokens": flat.unflatten(1, grid)[:, None], "summary": flat.mean(1, keepdim=True)}


class _BehindVae(RecordEncoder):
    """A Spatial-VAE behind the encoder whose tokens it was trained on; it computes in float32."""

    family: str

    def __init__(
        self,
        upstream: FrozenEncoder,
        upstream_codec: str,
        *,
        weights: str,
        arch: Mapping[str, Any],
        seed: int,
        dtype: str,
    ) -> None:
        super().__init__(upstream, upstream_codec, dtype)
        layers, self.rows, self.columns, channels = self.shape
        settings = {"channels": channels, **arch} if weights == RANDOM else arch
        self.part = TrainedPart(self.family, weights, settings, seed)
        if layers != 1 or self.part.settings["channels"] != channels:
            raise WeightsError(
                f"{weights}: the VAE takes one layer of tokens of {self.part.settings['channels']} channels, the "
                f"encoder before it gives {layers} of {channels}; use the VAE that was trained behind this encoder"
            )
        trained_on, found = self.part.extra.get(READS), self.upstream_identity.get("weights")
        if trained_on and trained_on != found:
            raise WeightsError(
                f"{weights}: the VAE was trained on tokens of an encoder with sha256 {trained_on[:16]}..., the one "
                f"before it has {str(found)[:16]}...; use that encoder's weights, or train the VAE again"
            )
        self.vae: Any = None

    def load(self) -> _BehindVae:
        """Build the network now; WeightsError when the folder does not fit. Returns self."""
        if self.vae is None:
            self.vae = self.part.load()
            self.freeze()
        return self

    def parameter_count(self) -> int:
        """Parameters of the network, counted on the meta device."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.part.make().parameters())

    def own_identity(self) -> Mapping[str, Any]:
        """Digest and architecture of the VAE."""
        return self.part.identity()

    def posterior(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """float32 tokens (B, 1, h, w, C) -> mean and log-variance (B, latent channels, 2h, 2w)."""
        vae = self.load().vae
        return vae.encode(tokens[:, 0].to(vae.token_mean.device))


class UniuggPosterior(_BehindVae):
    """The posterior of the Spatial-VAE: what the diffusion learns to draw. Always float32."""

    family = "uniugg_vae"

    def outputs(self) -> Mapping[str, TensorSpec]:  # noqa: D102
        shape = (self.part.settings["latent_channels"], 2 * self.rows, 2 * self.columns)
        return {name: TensorSpec(shape=shape, dtype="float32", exact=True) for name in ("mean", "logvar")}

    def tokens(self, tokens: Tensor) -> Tensor:
        """The mean alone; :meth:`encode` gives both."""
        return self.posterior(tokens)[0]

    def encode(self, inputs: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:  # noqa: D102
        mean, logvar = self.posterior(torch.stack([record["tokens"] for record in inputs]).float())
        return {"mean": mean, "logvar": logvar}


class UniuggReconstruction(_BehindVae):
    """What the Spatial-VAE makes of the tokens, from the mean of the posterior."""

    family = "uniugg_reconstruction"

    def outputs(self) -> Mapping[str, TensorSpec]:  # noqa: D102
        return self._outputs(self.shape)

    def tokens(self, tokens: Tensor) -> Tensor:
        """float32 (B, 1, h, w, C) -> their reconstruction, of the same shape."""
        mean, _ = self.posterior(tokens)
        return self.vae.decode(mean)[:, None]
