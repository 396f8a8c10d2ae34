"""Encoders as the service runs them: from requests to records, by shape, in micro-batches, errors in their place."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from configs.schema import EncoderConfig, RunConfig
from models.encoders.base import FrozenEncoder, InputKind
from models.encoders.families import CLASSES, family_class, input_kind
from models.encoders.weights import RANDOM, is_here, same_digest
from models.errors import InputError, ModelError
from models.spec import TensorSpec
from services.contracts import FeatureRequest, Record, Tensor
from services.data.images import describe, load_image
from services.errors import USER_ERRORS, ConfigError, DataError
from services.features import codecs
from services.features.requests import encoder_config, view_requests
from services.streams.inputs import needed_encoders

Answer = Record | BaseException
Upstream = Callable[[Sequence[FeatureRequest]], Sequence[Answer]]
"""Gives the records that a chained encoder reads."""

CHAINED = (InputKind.RECORD, InputKind.VIEWS)
"""Kinds of input that other encoders make."""

_TORCH = {"bfloat16": torch.bfloat16}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int64": 8, "uint8": 1, "bool": 1}
_RAGGED = 64
"""Assumed length of a ragged axis where only an estimate of bytes is wanted, and nothing is known of it."""


def build_encoder(name: str, config: RunConfig) -> FrozenEncoder:
    """The encoder ``encoders.<name>`` of the run, with those it reads from. Weights from a folder load at first use.

    ConfigError for an unknown name or a chain that bites its tail; ModelError and WeightsError from the encoder,
    WeightsError also when the weights are not those of ``encoders.<name>.digest``.
    """
    return _build(name, config, ())


def pin_weights(config: RunConfig) -> RunConfig:
    """The same run, each encoder bound to the weights that it has now, in every process that the config is sent to.

    One that the run does not use, and whose weights are not here, stays as it is.
    """
    absent = {name for name, given in config.encoders.items() if given.weights != RANDOM and not is_here(given.weights)}
    unused = absent - set(needed_encoders(config)) if absent else absent
    pinned = {
        name: settings
        if name in unused
        else dataclasses.replace(settings, digest=_weights_of(build_encoder(name, config)))
        for name, settings in config.encoders.items()
    }
    return dataclasses.replace(config, encoders=pinned)


def _weights_of(encoder: FrozenEncoder) -> str:
    """Digest of an encoder's own weights; "" for one that has none."""
    return str(encoder.identity().get("weights", ""))


def _build(name: str, config: RunConfig, before: tuple[str, ...]) -> FrozenEncoder:
    encoder = _make(name, config, before)
    settings = encoder_config(name, config)
    if settings.digest:
        same_digest(_weights_of(encoder), settings.digest, f"encoders.{name} ({settings.weights})")
    return encoder


def _make(name: str, config: RunConfig, before: tuple[str, ...]) -> FrozenEncoder:
    if name in before:
        raise ConfigError(f"encoders read each other in a circle: {' -> '.join((*before, name))}")
    settings = encoder_config(name, config)
    kind = input_kind(settings.family)
    if kind not in CHAINED:
        if settings.upstream:
            raise ConfigError(
                f"encoders.{name}.upstream={settings.upstream!r}, but {settings.family} reads {kind}s, not records"
            )
        if settings.family in CLASSES:
            return _own_vit(name, settings)
        from models.encoders.hf import load_encoder
        from models.encoders.text import load_text_encoder

        load: Any = load_text_encoder
        if kind is InputKind.IMAGE:
            load = functools.partial(load_encoder, window=settings.window)
        return load(
            settings.family,
            settings.weights,
            arch=settings.arch,
            seed=settings.seed,
            height=settings.height,
            width=settings.width,
            layers=settings.layers,
            dtype=settings.dtype,
        )
    if not settings.upstream:
        raise ConfigError(f"encoders.{name}.upstream must name an encoder: {settings.family} reads records")
    before_kind = input_kind(encoder_config(settings.upstream, config).family)
    if kind is InputKind.VIEWS and before_kind not in (InputKind.IMAGE, InputKind.RECORD):
        raise ConfigError(
            f"encoders.{name}.upstream={settings.upstream!r} reads {before_kind}s: {settings.family} takes the records "
            "of single pictures"
        )
    upstream = _build(settings.upstream, config, (*before, name))
    try:
        return _behind(upstream, settings, stored_codec(config))
    except TypeError as error:
        raise ConfigError(f"encoders.{name}.arch={settings.arch} does not fit {settings.family}: {error}") from error


def _own_vit(name: str, settings: EncoderConfig) -> FrozenEncoder:
    """A ViT of the registry, trained by a run or published."""
    if settings.layers:
        raise ConfigError(
            f"encoders.{name}.layers={settings.layers}: {settings.family} gives its last layer only; set []"
        )
    own: dict[str, Any] = {"side": settings.side} if settings.side else {}
    return family_class(settings.family)(
        settings.weights,
        arch=settings.arch,
        seed=settings.seed,
        height=settings.height,
        width=settings.width,
        dtype=settings.dtype,
        **own,
    )


def _behind(upstream: FrozenEncoder, settings: EncoderConfig, codec: str) -> FrozenEncoder:
    """An encoder of the records of ``upstream``, one by one or as a set of views."""
    from models.encoders.chain import PCAProjection, PooledTokens

    options, weights, seed, dtype = dict(settings.arch), settings.weights, settings.seed, settings.dtype
    if settings.family in CLASSES:
        return family_class(settings.family)(upstream, codec, weights=weights, arch=options, seed=seed, dtype=dtype)
    if settings.family == "pooled":
        return PooledTokens(upstream, codec, dtype=dtype, **options)
    return PCAProjection(upstream, codec, weights=weights, seed=seed, dtype=dtype, **options)


def stored_codec(config: RunConfig) -> str:
    """Codec of the records of this run: that of the cache, or none where nothing is cached."""
    return "none" if config.cache.mode == "never" else config.cache.codec


def to_record(outputs: Mapping[str, torch.Tensor], index: int) -> Record:
    """One input's tensors out of a batch on CPU, copied; bfloat16 as int16 bits."""
    record: Record = {}
    for name, batch in outputs.items():
        tensor = batch[index].detach().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        data = tensor.view(torch.int16).numpy() if dtype == "bfloat16" else tensor.numpy()
        record[name] = Tensor(data=data.copy(), dtype=dtype)
    return record


def to_torch(tensor: Tensor) -> torch.Tensor:
    """A stored tensor as a torch tensor of its own memory (mapped arrays are read-only)."""
    copied = torch.from_numpy(np.array(tensor.data, order="C"))
    return copied.view(_TORCH[tensor.dtype]) if tensor.dtype in _TORCH else copied


def record_bytes(outputs: Mapping[str, TensorSpec], ragged: int = _RAGGED) -> int:
    """Bytes of a record of these shapes; an estimate where an axis is ragged, taken to be ``ragged`` long."""
    return sum(
        int(np.prod([ragged if axis is None else axis for axis in spec.shape], dtype=np.int64))
        * _ITEM_BYTES[spec.dtype]
        for spec in outputs.values()
    )


def ragged_length(name: str, config: RunConfig, *, sets: bool = False) -> int:
    """Length to take for ragged axes of encoder ``name`` in estimates.

    Of an encoder of view sets, the views of a middling set; so too for any encoder with ``sets``.
    """
    while name and not sets:
        settings = encoder_config(name, config)
        sets, name = input_kind(settings.family) is InputKind.VIEWS, settings.upstream
    least, most = config.recipe.view_set.views
    return -(-(least + most) // 2) if sets else _RAGGED


def exact_outputs(encoder: FrozenEncoder) -> frozenset[str]:
    """Outputs that a lossy codec must leave alone."""
    return frozenset(name for name, spec in encoder.outputs().items() if spec.exact)


def as_stored(answers: Sequence[Answer], config: RunConfig, encoder: Encoder) -> list[Answer]:
    """Answers of an encoder as the cache would give them back, so that a miss and a later hit are the same numbers.

    The store must get the records from before: coding twice is not coding once.
    """
    codec = stored_codec(config)
    if codec == "none":
        return list(answers)
    exact = exact_outputs(encoder.model)
    return [codecs.decode(codecs.encode(codec, a, exact)[0]) if isinstance(a, dict) else a for a in answers]


class Encoder:
    """One frozen encoder of a run, ready to answer requests. May be shared by threads; one forward pass at a time.

    ``upstream`` gives the records that a chained encoder reads; by default they are encoded here.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        *,
        upstream: Upstream | None = None,
        device: str = "",
    ) -> None:
        self.name = name
        self.model = build_encoder(name, config)
        settings = encoder_config(name, config)
        self.batch_size = max(1, settings.batch_size)
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._placed = False
        self._lock = threading.Lock()
        # Decoding an image releases the interpreter's lock, so a few threads hide it behind the forward pass.
        self._readers = ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2)), thread_name_prefix=f"read-{name}")
        self._upstream = upstream
        self._config = config
        if settings.upstream and upstream is None:
            before = Encoder(settings.upstream, config, device=device)
            self._upstream = before.encode

    def encode(self, requests: Sequence[FeatureRequest]) -> list[Answer]:
        """One answer a request, in order: its record, or the error of that input (unreadable image, ...).

        Records are as the encoder gives them; see :func:`as_stored` for what a lossy cache makes of them.
        An error of the encoder itself (weights, memory) is raised.
        """
        answers: dict[int, Answer] = {}
        ready: list[tuple[int, Any]] = []
        for index, prepared in enumerate(self._prepare(requests)):
            if isinstance(prepared, BaseException):
                answers[index] = prepared
            else:
                ready.append((index, prepared))
        groups: dict[Any, list[tuple[int, Any]]] = defaultdict(list)
        for index, prepared in ready:
            groups[_shape(prepared)].append((index, prepared))
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                self._forward(group[start : start + self.batch_size], requests, answers)
        return [answers[index] for index in range(len(requests))]

    def _prepare(self, requests: Sequence[FeatureRequest]) -> list[Any]:
        sources: Sequence[Any] = [None] * len(requests)
        if self._upstream is not None and self.model.input_kind is InputKind.VIEWS:
            sources = self._views(requests, self._upstream)
        elif self._upstream is not None and self.model.input_kind is InputKind.RECORD:
            sources = self._upstream([_upstream_of(request) for request in requests])
        return list(self._readers.map(self._prepare_one, requests, sources))

    def _views(self, requests: Sequence[FeatureRequest], upstream: Upstream) -> list[list[Answer]]:
        """The record of each view of each request. A picture that is in several sets is asked for once."""
        wanted = [view_requests(request, self._config) for request in requests]
        once = {request.key: request for views in wanted for request in views}
        found = dict(zip(once, upstream(list(once.values())), strict=True))
        return [[found[request.key] for request in views] for views in wanted]

    def _prepare_one(self, request: FeatureRequest, source: Any) -> Any:
        try:
            return self.model.prepare(_raw_input(request, self.model.input_kind, source), request.transform)
        except InputError as error:
            return DataError(f"{_source(request)}: encoder {request.encoder!r}: {error}")
        except USER_ERRORS as error:
            return error

    def _forward(self, group: list[tuple[int, Any]], requests: Sequence[FeatureRequest], answers: dict) -> None:
        with self._lock:
            if not self._placed:
                load = getattr(self.model, "load", None)
                if load is not None:
                    load()
                self.model.to(self._device)
                self._placed = True
            outputs = self.model([prepared for _, prepared in group])
            # One transfer a tensor and batch, not one a record.
            outputs = {name: tensor.cpu() for name, tensor in outputs.items()}
        broken = _not_finite(outputs)
        for position, (index, _) in enumerate(group):
            if position in broken:
                answers[index] = _poisoned(requests[index], broken[position])
            else:
                answers[index] = to_record(outputs, position)

    def close(self) -> None:
        """Stop the reader threads."""
        self._readers.shutdown(wait=False, cancel_futures=True)


def _upstream_of(request: FeatureRequest) -> FeatureRequest:
    if request.upstream is None:
        raise ModelError(f"encoder {request.encoder!r} reads records, but the request has no upstream")
    return request.upstream


def _raw_input(request: FeatureRequest, kind: InputKind, source: Any) -> Any:
    """What ``prepare`` takes; ``source``: what the encoder before gave. DataError for an input that cannot be read."""
    if kind is InputKind.VIEWS and source is not None:
        for answer in source:
            if isinstance(answer, BaseException):
                raise answer
        records = [{name: to_torch(tensor) for name, tensor in answer.items()} for answer in source]
        return list(zip(records, request.roles, strict=True))
    if kind is InputKind.RECORD:
        if isinstance(source, BaseException):
            raise source
        assert source is not None
        return {name: to_torch(tensor) for name, tensor in source.items()}
    if kind is InputKind.TEXT:
        if request.text is None:
            raise DataError(f"sample {request.sample_id!r}: encoder {request.encoder!r} takes text and there is none")
        return request.text
    if request.pixels is not None:
        return request.pixels
    if kind is InputKind.VIEWS:
        return [(load_image(ref), role) for ref, role in zip(request.images, request.roles, strict=True)]
    if len(request.images) != 1:
        raise DataError(
            f"sample {request.sample_id!r}: encoder {request.encoder!r} takes one image, got {len(request.images)}"
        )
    return load_image(request.images[0])


def _shape(prepared: Any) -> Any:
    if isinstance(prepared, Mapping):
        return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(prepared.items()))
    return tuple(prepared.shape)


def _not_finite(outputs: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """Position in the batch -> name of an output with NaN or infinity."""
    broken: dict[int, str] = {}
    for name, tensor in outputs.items():
        if tensor.is_floating_point():
            finite = torch.isfinite(tensor).flatten(1).all(dim=1)
            broken |= dict.fromkeys(torch.nonzero(~finite).flatten().tolist(), name)
    return broken


def _poisoned(request: FeatureRequest, name: str) -> DataError:
    """Such a record would poison training long after; it is the error of its input instead."""
    return DataError(f"{_source(request)}: encoder {request.encoder!r} gives NaN or infinity in {name!r}")


def _source(request: FeatureRequest) -> str:
    """What a request is about, for messages."""
    return describe(request.images[0]) if request.images else request.sample_id
