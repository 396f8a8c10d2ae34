"""Frozen image encoders through transformers: DINOv2, DINOv3 (ViT), RADIO, SigLIP 2 and CLIP.

What an encoder gives of an image of height x width pixels, with patch p:

``tokens`` (layers, height/p, width/p, C): patch tokens of the tapped layers, counted from 1, each with the final
    norm of its family applied, the way the papers read intermediate layers: DINOv2 and DINOv3 the final LayerNorm,
    SigLIP its post-LayerNorm. RADIO has no final norm, and CLIP's was only trained on the class token (LLaVA reads
    CLIP's patches without it), so these two are given as they are.
``summary`` (k, C'): DINOv2 and DINOv3 the normalised class token; RADIO the class tokens of ``summary_idxs``;
    SigLIP the output of its attention pooling head; CLIP the projected class token, in the space shared with text.

An input of another size than in pretraining is handled as the family does it: interpolated position embeddings
(DINOv2, SigLIP, CLIP: bicubic; SigLIP 2 NaFlex and RADIO: bilinear), rotary ones by relative coordinates (DINOv3).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.encoders import radio
from models.encoders.base import FrozenEncoder, InputKind
from models.encoders.preprocess import Preprocessing
from models.encoders.weights import (
    RANDOM,
    load_strict,
    read_json,
    resolve_folder,
    same_digest,
    seeded,
    stored_digest,
    tensor_digest,
    torch_dtype,
)
from models.errors import ModelError
from models.spec import TensorSpec

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_UNIT = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the network normalises itself

_TEXT_SIDE = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
_NOT_ARCHITECTURE = {
    "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "out_features", "out_indices", "problem_type",
    "return_dict", "stage_names", "torch_dtype", "transformers_version", "attn_implementation",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one transformers class is read."""

    config: str
    model: str
    layers: str
    norm: str
    """Module applied to the patch tokens of every tap; "" for none."""
    prefix: Callable[[Any], int]
    """Tokens before the patches, from the config."""
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]]
    interpolate: bool = False
    """The forward pass must be told to interpolate position embeddings."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "dinov2": Architecture(
        config="Dinov2Config", model="Dinov2Model", layers="encoder.layer", norm="layernorm",
        prefix=lambda _: 1, normalisation=_IMAGENET,
    ),
    "dinov2_with_registers": Architecture(
        config="Dinov2WithRegistersConfig", model="Dinov2WithRegistersModel", layers="encoder.layer",
        norm="layernorm", prefix=lambda c: 1 + c.num_register_tokens, normalisation=_IMAGENET,
    ),
    "dinov3_vit": Architecture(
        config="DINOv3ViTConfig", model="DINOv3ViTModel", layers="model.layer", norm="norm",
        prefix=lambda c: 1 + c.num_register_tokens, normalisation=_IMAGENET,
    ),
    "radio": Architecture(
        config="RadioConfig", model="RadioModel", layers="encoder.layer", norm="",
        prefix=lambda c: c.num_summary_tokens, normalisation=_UNIT,
    ),
    "siglip_vision_model": Architecture(
        config="SiglipVisionConfig", model="SiglipVisionModel", layers="encoder.layers", norm="post_layernorm",
        prefix=lambda _: 0, normalisation=_HALF, interpolate=True,
    ),
    "siglip2_vision_model": Architecture(
        config="Siglip2VisionConfig", model="Siglip2VisionModel", layers="encoder.layers", norm="post_layernorm",
        prefix=lambda _: 0, normalisation=_HALF,
    ),
    "clip_vision_model": Architecture(
        config="CLIPVisionConfig", model="CLIPVisionModelWithProjection", layers="vision_model.encoder.layers",
        norm="", prefix=lambda _: 1, normalisation=CLIP, interpolate=True,
    ),
}  # fmt: skip

#: Family of the run's config -> model types it may be, the first for random weights. The fixed-size checkpoints of
#: SigLIP 2 have the layout of SigLIP; only NaFlex ones are of type siglip2.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "dinov2": ("dinov2", "dinov2_with_registers"),
    "dinov3": ("dinov3_vit",),
    "radio": ("radio",),
    "siglip2": ("siglip_vision_model", "siglip2_vision_model"),
    "clip": ("clip_vision_model",),
}
_TWO_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No load reports and progress bars: what does not fit is said by our own error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def random_config(config_class: Any, arch: Mapping[str, Any]) -> Any:
    """A transformers config with ``arch`` on top of its defaults. ModelError names a key that it does not know."""
    known = set(config_class().to_dict())
    values = {k: v for k, v in arch.items() if k != "model_type"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it knows {sorted(known - _NOT_ARCHITECTURE)}"
            raise ModelError(f"encoder arch has no {key!r} for {config_class.__name__}{hint}")
    if "hidden_size" in values and "intermediate_size" in known:
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"encoder arch {dict(arch)} is no {config_class.__name__}: {error}") from error


def architecture_identity(config: Any) -> dict[str, Any]:
    """What of a transformers config can change an output: everything but names, paths and bookkeeping."""
    values = config.to_dict()
    return {k: v for k, v in sorted(values.items()) if k not in _NOT_ARCHITECTURE and not k.startswith("_")}


def library_versions() -> dict[str, str]:
    """Versions that can change an output. Builds for CPU and CUDA share a version, hence features."""
    import transformers

    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def _model_type(family: str, declared: str) -> str:
    if family not in FAMILIES:
        raise ModelError(f"unknown encoder family {family!r}; image encoders are {sorted(FAMILIES)}")
    kind = _TWO_TOWERS.get(declared, declared) or FAMILIES[family][0]
    if kind not in FAMILIES[family]:
        raise ModelError(f"weights of type {declared!r} are no {family}; that family has {list(FAMILIES[family])}")
    return kind


def _stored_config(folder: Path, family: str) -> tuple[Architecture, Any]:
    """Architecture and config of a weights folder; of a two-tower checkpoint, those of its image side."""
    import transformers

    values = read_json(folder / "config.json")
    if family == "radio" and radio.is_published(values):
        return ARCHITECTURES["radio"], transformers.RadioConfig(**radio.form_of(folder, values))
    architecture = ARCHITECTURES[_model_type(family, str(values.get("model_type", "")))]
    if "vision_config" in values:
        projection = {"projection_dim": values["projection_dim"]} if "projection_dim" in values else {}
        values = {**values["vision_config"], **projection}
    return architecture, getattr(transformers, architecture.config).from_dict(values)


def _stored_preprocessing(folder: Path, architecture: Architecture, height: int, width: int) -> Preprocessing:
    """Normalisation from preprocessor_config.json where the folder has one, else the family's."""
    mean, std = architecture.normalisation
    path = folder / "preprocessor_config.json"
    if path.exists():
        values = read_json(path)
        factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
        if abs(factor * 255 - 1) > 1e-3:
            raise ModelError(f"{path}: rescale_factor {factor} is not 1/255; such an encoder is not supported")
        if not values.get("do_normalize", True):
            mean, std = _UNIT
        else:
            mean, std = tuple(values.get("image_mean", mean)), tuple(values.get("image_std", std))
    return Preprocessing(height=height, width=width, mean=mean, std=std)


class HFEncoder(FrozenEncoder):
    """An image encoder of transformers; see the module for its outputs. Made by :func:`load_encoder`.

    With weights from a folder the network is built at the first :meth:`encode` (or :meth:`load`), so that a process
    that only needs the identity and the shapes, because everything is cached, holds no weights.
    """

    input_kind = InputKind.IMAGE

    def __init__(
        self,
        architecture: Architecture,
        config: Any,
        preprocessing: Preprocessing,
        *,
        layers: Sequence[int],
        dtype: str,
        folder: Path | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.architecture, self.config, self.preprocessing = architecture, config, preprocessing
        self.dtype_name, self.dtype = dtype, torch_dtype(dtype)
        self.folder, self.seed = folder, seed
        self.patch = int(config.patch_size)
        self.layers = tuple(layers) or (config.num_hidden_layers,)
        self.model: nn.Module | None = None
        self._digest = ""
        self._check()
        if folder is None:
            self.load()

    def _check(self) -> None:
        depth = self.config.num_hidden_layers
        wrong = [layer for layer in self.layers if not 1 <= layer <= depth]
        if wrong:
            raise ModelError(f"encoder layers {wrong} do not exist: layers are counted from 1 to {depth}")
        p = self.preprocessing
        if p.height < 1 or p.width < 1 or p.height % self.patch or p.width % self.patch:
            raise ModelError(
                f"encoder input {p.height}x{p.width} must be a positive multiple of the patch size {self.patch}; "
                f"{max(1, round(p.height / self.patch)) * self.patch}x"
                f"{max(1, round(p.width / self.patch)) * self.patch} would do"
            )
        if getattr(self.config, "vision_use_head", True) is False:
            raise ModelError("this SigLIP has no pooling head, hence no summary token (vision_use_head=false)")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        return self.preprocessing.height // self.patch, self.preprocessing.width // self.patch

    def build_random(self) -> nn.Module:
        """The network as its config initialises it, from the global generator; works on the meta device."""
        import transformers

        return getattr(transformers, self.architecture.model)._from_config(self.config, attn_implementation="sdpa")

    def load(self) -> HFEncoder:
        """Build the network now; WeightsError when the folder does not fit. Returns self."""
        if self.model is not None:
            return self
        import transformers

        if self.folder is None:
            self.model = seeded(self.build_random, self.seed)
            self._digest = tensor_digest(self.model.state_dict())
            cast_stored(self.model, self.dtype)
        else:
            with quiet_transformers():
                self.model = load_strict(
                    getattr(transformers, self.architecture.model), self.folder, self.dtype,
                    other_tower=_TEXT_SIDE, may_lack=radio.LAYER_SCALE, config=self.config, attn_implementation="sdpa",
                )  # fmt: skip
            # The identity may have been asked for long before.
            self._digest = same_digest(stored_digest(self.folder), self._digest, self.folder)
        self.freeze()
        return self

    def identity(self) -> Mapping[str, Any]:  # noqa: D102
        if not self._digest:
            assert self.folder is not None
            self._digest = stored_digest(self.folder)
        return {
            "kind": "image",
            "model": self.architecture.model,
            "architecture": architecture_identity(self.config),
            "weights": self._digest,
            "layers": list(self.layers),
            "dtype": self.dtype_name,
            "attention": "sdpa",
            "preprocessing": self.preprocessing.identity(),
            "libraries": library_versions(),
            "padding": [self.preprocessing.height, self.preprocessing.width],
            "layout": self.layout_version,
        }

    def outputs(self) -> Mapping[str, TensorSpec]:  # noqa: D102
        width = self.config.hidden_size
        summaries, summary_width = 1, width
        if self.architecture.config == "RadioConfig":
            summaries = len(self.config.summary_idxs)
        if self.architecture.config == "CLIPVisionConfig":
            summary_width = self.config.projection_dim
        return {
            "tokens": TensorSpec(shape=(len(self.layers), *self.grid, width), dtype=self.dtype_name),
            "summary": TensorSpec(shape=(summaries, summary_width), dtype=self.dtype_name),
        }

    def prepare(self, value: np.ndarray, transform: Mapping[str, Any]) -> Tensor:
        """uint8 (H, W, 3) -> normalised float32 (3, height, width); ``transform`` as in preprocess.py."""
        return self.preprocessing(value, transform)

    def encode(self, inputs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Prepared images -> tokens (B, layers, h, w, C) and summary (B, k, C'), in the compute dtype."""
        model = self.load().model
        assert model is not None
        device = next(model.parameters()).device
        pixels = torch.stack(list(inputs)).to(device=device, dtype=self.dtype)
        taps: dict[int, Tensor] = {}
        stack = model.get_submodule(self.architecture.layers)
        # Hooks keep the tapped layers only; `output_hidden_states` would keep them all until the end.
        handles = [
            stack.get_submodule(str(layer - 1)).register_forward_hook(_keep(taps, layer)) for layer in set(self.layers)
        ]
        try:
            output = self._forward(model, pixels)
        finally:
            for handle in handles:
                handle.remove()
        norm = model.get_submodule(self.architecture.norm) if self.architecture.norm else nn.Identity()
        skip = self.architecture.prefix(self.config)
        tokens = torch.stack([norm(taps[layer][:, skip:]) for layer in self.layers], dim=1)
        return {"tokens": tokens.unflatten(2, self.grid), "summary": self._summary(output)}

    def _forward(self, model: nn.Module, pixels: Tensor) -> Any:
        if self.architecture.config != "Siglip2VisionConfig":
            options = {"interpolate_pos_encoding": True} if self.architecture.interpolate else {}
            return model(pixel_values=pixels, **options)
        # NaFlex takes flattened patches, channels last in each.
        (rows, columns), p = self.grid, self.patch
        patches = pixels.reshape(len(pixels), 3, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
        return model(
            pixel_values=patches.reshape(len(pixels), rows * columns, p * p * 3),
            pixel_attention_mask=None,
            spatial_shapes=torch.tensor([[rows, columns]] * len(pixels), device="cpu"),
        )

    def _summary(self, output: Any) -> Tensor:
        if self.architecture.config == "RadioConfig":
            return output.summary.unflatten(1, (len(self.config.summary_idxs), -1))
        if self.architecture.config == "CLIPVisionConfig":
            return output.image_embeds[:, None]
        return output.pooler_output[:, None]


def cast_stored(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold weights in ``dtype`` but leave what is not stored (rotary frequencies) in float32, as loading does."""
    stored = model.state_dict()
    kept = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    model.to(dtype)
    for name, buffer in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)


def _keep(taps: dict[int, Tensor], layer: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        taps[layer] = output[0] if isinstance(output, tuple) else output

    return hook


def load_encoder(
    family: str,
    weights: str,
    *,
    arch: Mapping[str, Any] | None = None,
    seed: int = 0,
    height: int,
    width: int,
    layers: Sequence[int] = (),
    dtype: str = "bfloat16",
    window: Sequence[int] = (),
) -> HFEncoder:
    """An image encoder of ``family``, not yet holding its weights if they come from a folder.

    ``weights`` is "random" (``arch`` over the family's default architecture, initialised from ``seed``), a local
    folder, or a hub name. ``layers`` are the taps, counted from 1; () takes the last. ``window`` (height, width) is the
    shape of the part of a picture that is read, where it is not the input's. ModelError for sizes or
    settings that cannot be, WeightsError for weights that cannot be had.
    """
    import transformers

    arch = dict(arch or {})
    if weights == RANDOM:
        architecture = ARCHITECTURES[_model_type(family, str(arch.get("model_type", "")))]
        config = random_config(getattr(transformers, architecture.config), arch)
        mean, std = architecture.normalisation
        preprocessing = _seen(Preprocessing(height=height, width=width, mean=mean, std=std), window)
        return HFEncoder(architecture, config, preprocessing, layers=layers, dtype=dtype, folder=None, seed=seed)
    if arch:
        raise ModelError(f"encoder arch {arch} is for weights=random only; {weights!r} has an architecture of its own")
    folder = resolve_folder(weights)
    architecture, config = _stored_config(folder, family)
    preprocessing = _seen(_stored_preprocessing(folder, architecture, height, width), window)
    return HFEncoder(architecture, config, preprocessing, layers=layers, dtype=dtype, folder=folder, seed=seed)


def _seen(preprocessing: Preprocessing, window: Sequence[int]) -> Preprocessing:
    if not window:
        return preprocessing
    height, width = window
    return replace(preprocessing, window=(height, width))


def flops_per_image(encoder: HFEncoder) -> int:
    """Floating-point operations of one image's forward pass, counted on the meta device (no memory, no time)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = encoder.build_random().to(torch.bfloat16).eval()
        pixels = torch.empty(1, 3, encoder.preprocessing.height, encoder.preprocessing.width, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder._forward(model, pixels)
    return int(counter.get_total_flops())


def parameter_count(encoder: HFEncoder) -> int:
    """Parameters of the network, counted on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in encoder.build_random().parameters())


def preprocessing_of(encoder: FrozenEncoder) -> Preprocessing:
    """The preprocessing of an image encoder; ModelError for another kind."""
    if not isinstance(encoder, HFEncoder):
        raise ModelError(f"{type(encoder).__name__} takes {encoder.input_kind}, not images")
    return encoder.preprocessing


__all__ = [
    "ARCHITECTURES", "FAMILIES", "Architecture", "HFEncoder", "cast_stored", "flops_per_image", "load_encoder",
    "parameter_count", "preprocessing_of",
]  # fmt: skip
