"""From a planned sample to what an encoder is asked for. Only the manifest is read; no pixels, no encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from configs.schema import EncoderConfig, RunConfig
from models.encoders.base import InputKind
from models.encoders.families import input_kind
from services.contracts import FeatureRequest, ImageRef, PlanSample, View, ViewRole
from services.errors import ConfigError, DataError
from services.features.keys import feature_key


class ManifestLike(Protocol):
    """What is needed of a manifest."""

    def views(self, entry_id: str, places: Sequence[int], /) -> Sequence[View]:
        """Some views of a scene, or images of an item, with absolute paths. DataError when there is no such view."""

    def digests(self, entry_id: str, places: Sequence[int], /) -> Sequence[str]:
        """Their content digests."""


def encoder_config(name: str, config: RunConfig) -> EncoderConfig:
    """The settings of ``encoders.<name>``; ConfigError lists the encoders there are."""
    if name not in config.encoders:
        raise ConfigError(f"there is no encoder {name!r}; the config has encoders {sorted(config.encoders)}")
    return config.encoders[name]


def feature_requests(
    sample: PlanSample,
    manifest: ManifestLike,
    encoder_name: str,
    config: RunConfig,
    *,
    transform: Mapping[str, Any] | None = None,
    pixels: Sequence[np.ndarray] | None = None,
) -> list[FeatureRequest]:
    """What ``sample`` needs of an encoder: one request a view, or one for all views where it reads them together.

    ``transform`` holds per-sample parameters of the preprocessing; they are part of the key. ``pixels`` are pictures
    uint8 (H, W, 3) that stand for those of the views (they were augmented), for encoders that read one at a time;
    their content is the key. DataError when the sample names a view that its scene does not have, or the encoder
    takes text (see :func:`text_request`).
    """
    settings = encoder_config(encoder_name, config)
    kind = input_kind(settings.family)
    if kind is InputKind.TEXT:
        raise DataError(f"encoder {encoder_name!r} takes text; sample {sample.id!r} gives it pictures")
    if kind is InputKind.RECORD:
        before = feature_requests(sample, manifest, settings.upstream, config, transform=transform, pixels=pixels)
        return [_chained(encoder_name, request) for request in before]
    if pixels is not None:
        if kind is not InputKind.IMAGE:
            raise ConfigError(f"encoder {encoder_name!r} reads {kind}; data.augment is for encoders of single pictures")
        return [_shown(sample, encoder_name, picture, transform) for picture in pixels]
    images, digests = _pictures(sample, manifest)
    if kind is InputKind.IMAGE:
        # The role of a single picture changes nothing of its features, so it stays out of the key.
        return [
            _request(sample, encoder_name, (image,), (digest,), (), transform)
            for image, digest in zip(images, digests, strict=True)
        ]
    return [_request(sample, encoder_name, images, digests, sample.views, transform)]


def feature_request(
    sample: PlanSample,
    manifest: ManifestLike,
    encoder_name: str,
    config: RunConfig,
    *,
    transform: Mapping[str, Any] | None = None,
) -> FeatureRequest:
    """The single request of a sample. DataError when it has several views and the encoder reads them one by one."""
    requests = feature_requests(sample, manifest, encoder_name, config, transform=transform)
    if len(requests) != 1:
        raise DataError(
            f"sample {sample.id!r} has {len(requests)} views and encoder {encoder_name!r} reads one; "
            "ask for feature_requests"
        )
    return requests[0]


def text_request(text: str, sample_id: str, encoder_name: str) -> FeatureRequest:
    """The request for the features of a text."""
    return FeatureRequest(key=feature_key((), text=text), encoder=encoder_name, sample_id=sample_id, text=text)


def view_requests(request: FeatureRequest, config: RunConfig) -> list[FeatureRequest]:
    """What makes the record of each view of ``request``, in order, for an encoder of view sets that reads records.

    They are the requests that the views alone would have, so sets share what was made of a picture.
    """
    upstream = encoder_config(request.encoder, config).upstream
    return [
        _of_view(upstream, image, digest, request, config)
        for image, digest in zip(request.images, request.digests, strict=True)
    ]


def _of_view(name: str, image: ImageRef, digest: str, request: FeatureRequest, config: RunConfig) -> FeatureRequest:
    settings = encoder_config(name, config)
    if input_kind(settings.family) is InputKind.RECORD:
        return _chained(name, _of_view(settings.upstream, image, digest, request, config))
    return FeatureRequest(
        key=feature_key([digest], transform=request.transform),
        encoder=name,
        sample_id=request.sample_id,
        images=(image,),
        digests=(digest,),
        transform=dict(request.transform),
    )


def _pictures(sample: PlanSample, manifest: ManifestLike) -> tuple[tuple[ImageRef, ...], tuple[str, ...]]:
    wanted = [view.index for view in sample.views]
    if not wanted:
        raise DataError(f"sample {sample.id!r} asks for no view of {sample.item!r}; an encoder of pictures needs one")
    views, digests = manifest.views(sample.item, wanted), manifest.digests(sample.item, wanted)
    return tuple(view.image for view in views), tuple(digests)


def _request(
    sample: PlanSample,
    encoder_name: str,
    images: tuple[ImageRef, ...],
    digests: tuple[str, ...],
    views: tuple[ViewRole, ...],
    transform: Mapping[str, Any] | None,
) -> FeatureRequest:
    roles = tuple(view.role for view in views)
    return FeatureRequest(
        key=feature_key(digests, roles=[role.value for role in roles], transform=transform),
        encoder=encoder_name,
        sample_id=sample.id,
        images=images,
        digests=digests,
        roles=roles,
        transform=dict(transform or {}),
    )


def _shown(
    sample: PlanSample, encoder_name: str, picture: np.ndarray, transform: Mapping[str, Any] | None
) -> FeatureRequest:
    """A request that carries its picture."""
    shape = "x".join(str(axis) for axis in picture.shape)
    digest = hashlib.sha256(f"pixels {shape} ".encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()
    return FeatureRequest(
        key=feature_key([digest], transform=transform),
        encoder=encoder_name,
        sample_id=sample.id,
        digests=(digest,),
        transform=dict(transform or {}),
        pixels=picture,
    )


def _chained(encoder_name: str, upstream: FeatureRequest) -> FeatureRequest:
    return FeatureRequest(
        key=feature_key((), upstream=upstream.key),
        encoder=encoder_name,
        sample_id=upstream.sample_id,
        digests=upstream.digests,
        upstream=upstream,
    )
