"""What an encoder costs, from its architecture alone: the network is built on the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.preflight import trained
from actors.preflight.published import ARCHITECTURES as PUBLISHED
from configs.schema import EncoderConfig, RunConfig
from models.encoders.hf import HFEncoder
from models.errors import WeightsError
from models.spec import TensorSpec
from services.features.encode import ragged_length
from services.features.requests import encoder_config
from services.streams.inputs import used_encoders

if TYPE_CHECKING:
    from models.encoders.qwen import QwenVision

#: Activations alive at once in a transformer block, in widths of the network: input, residual, the MLP's hidden layer
#: (4) and its activation (4), query, key and value (3).
WIDTH_FACTOR = 13

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int64": 8, "int32": 4, "uint8": 1}


@dataclass(frozen=True, kw_only=True)
class EncoderCost:
    """One frozen encoder: weights, work and output of one input."""

    name: str
    parameters: int
    weight_bytes: int
    flops: int
    """Of one input's forward pass."""
    outputs: dict[str, TensorSpec]
    record_bytes: int
    """Of one input's outputs in the store, with the configured codec."""
    available: bool
    """Whether the weights are random or on this machine."""
    working_bytes: int
    """Of one input while it is encoded: the widest layer's activations."""

    def memory(self, inputs: int) -> int:
        """Bytes of a replica that encodes ``inputs`` at a time, outputs included."""
        return self.weight_bytes + inputs * (self.working_bytes + self.record_bytes)


def encoder_costs(config: RunConfig) -> dict[str, EncoderCost]:
    """The cost of every encoder of the run, in an order in which those that others read from come first."""
    found: dict[str, EncoderCost] = {}
    for name in used_encoders(config):
        for needed in reversed([*with_upstreams(name, config)]):
            if needed not in found:
                found[needed] = encoder_cost(needed, config)
    return found


def with_upstreams(name: str, config: RunConfig) -> Iterator[str]:
    """``name`` and, one after the other, the encoders that it reads from. ConfigError for one that is not there."""
    while name:
        yield name
        name = encoder_config(name, config).upstream


def encoder_cost(name: str, config: RunConfig) -> EncoderCost:
    """The cost of ``encoders.<name>``; FLOPs are 0 where they are not counted (texts, pooled records).

    Weights are not loaded, and weights of a published name, or of a run, need not be there yet. WeightsError when the
    architecture cannot be known; ModelError for sizes that the network cannot have.
    """
    from models.encoders import hf
    from models.encoders.base import InputKind
    from models.encoders.families import input_kind
    from models.encoders.uniugg import PARTS

    settings = config.encoders[name]
    available = True
    if settings.family in PARTS:
        available = trained.is_there(settings)
        made = trained.describe(
            name, config, None if not settings.upstream else encoder_cost(settings.upstream, config).outputs
        )
        outputs, parameters, flops = made.outputs, made.parameters, made.flops
    elif settings.family == "qwen2_5_vl":
        tower, available = _describe_tower(settings)
        outputs, parameters, flops = dict(tower.outputs()), tower.parameter_count(), tower.flops_per_image()
    elif input_kind(settings.family) is InputKind.IMAGE:
        encoder, available = _describe(settings)
        outputs, parameters, flops = dict(encoder.outputs()), hf.parameter_count(encoder), hf.flops_per_image(encoder)
    else:
        from services.features.encode import build_encoder

        other = build_encoder(name, config)
        count = getattr(other, "parameter_count", None)  # of one that holds no weights yet
        parameters = count() if count else sum(p.numel() for p in other.parameters())
        outputs, flops = dict(other.outputs()), 0
    item, views = BYTES[settings.dtype], ragged_length(name, config)
    return EncoderCost(
        name=name,
        parameters=parameters,
        weight_bytes=parameters * item,
        flops=flops,
        outputs=outputs,
        record_bytes=record_bytes(outputs, config.cache.codec, views),
        available=available,
        working_bytes=_widest(outputs, views) * WIDTH_FACTOR * item,
    )


def _widest(outputs: Mapping[str, TensorSpec], views: int) -> int:
    """Numbers of one layer's tokens: the last of the tapped ones; of a view set, of all its views."""
    shape = outputs["tokens"].shape if "tokens" in outputs else ()
    if shape and shape[0] is None:
        return views * math.prod(axis or 0 for axis in shape[1:])
    return math.prod(axis or 0 for axis in shape[1:]) if shape else 0


def record_bytes(outputs: Mapping[str, TensorSpec], codec: str, views: int = 0) -> int:
    """Bytes of one record in the store: its tensors, or with fp8 one byte a number and a float32 scale a token,
    but for outputs that are to be exact.

    ``views`` are those of a view set, whose number is open in ``outputs``.
    """
    total = 0
    for spec in outputs.values():
        numbers = math.prod(views if axis is None else axis for axis in spec.shape)
        if codec == "fp8_e4m3" and not spec.exact:
            total += numbers + 4 * numbers // max(spec.shape[-1] or 1, 1)
        else:
            total += numbers * BYTES[spec.dtype]
    return total


def _describe_tower(settings: EncoderConfig) -> tuple[QwenVision, bool]:
    """Qwen2.5-VL's vision tower without its weights, and whether these can be had."""
    from models.encoders.qwen import QwenVision

    sizes: dict[str, Any] = {"height": settings.height, "width": settings.width, "dtype": settings.dtype}
    try:
        return QwenVision(settings.weights, arch=settings.arch, seed=settings.seed, **sizes), True
    except WeightsError:
        if settings.weights not in PUBLISHED:
            raise
    return QwenVision("random", arch=PUBLISHED[settings.weights], **sizes), False


def _describe(settings: EncoderConfig) -> tuple[HFEncoder, bool]:
    """The encoder without its weights, and whether these can be had.

    One with random weights is described like one from a folder that was not read yet.
    """
    import transformers

    from models.encoders import hf

    if settings.weights != "random":
        try:
            stored = hf.load_encoder(
                settings.family,
                settings.weights,
                height=settings.height,
                width=settings.width,
                layers=settings.layers,
                dtype=settings.dtype,
            )
            return stored, True
        except WeightsError:
            if settings.weights not in PUBLISHED:
                raise
    arch = dict(PUBLISHED.get(settings.weights, settings.arch))
    kind = str(arch.pop("model_type", "")) or hf.FAMILIES[settings.family][0]
    architecture = hf.ARCHITECTURES[kind]
    mean, std = architecture.normalisation
    described = hf.HFEncoder(
        architecture,
        hf.random_config(getattr(transformers, architecture.config), arch),
        hf.Preprocessing(height=settings.height, width=settings.width, mean=mean, std=std),
        layers=settings.layers,
        dtype=settings.dtype,
        folder=Path("not-read"),
        seed=settings.seed,
    )
    return described, settings.weights == "random"
