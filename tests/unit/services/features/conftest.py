"""A tiny encoder, pictures on disk, and the requests for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.schema import CacheConfig, ClusterConfig, EncoderConfig, RunConfig, ServiceConfig, StorageConfig
from services.contracts import FeatureRequest, ImageRef
from services.data.digests import content_digest
from services.features.keys import feature_key

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(**changes: Any) -> RunConfig:
        encoder = EncoderConfig(
            arch=TINY, height=56, width=56, dtype="float32", batch_size=4, **changes.pop("encoder", {})
        )
        pooled = EncoderConfig(family="pooled", upstream="features", arch={"height": 2, "width": 2}, dtype="float32")
        config = RunConfig(
            storage=StorageConfig(root=str(tmp_path / "root")),
            encoders={"features": encoder, "small": pooled},
            service=ServiceConfig(**{"deadline_s": 20.0, "threads": 1, "replicas": 0, **changes.pop("service", {})}),
            cache=CacheConfig(**changes.pop("cache", {})),
            cluster=ClusterConfig(mode="inline"),
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture
def make_requests(tmp_path: Path) -> Callable[..., list[FeatureRequest]]:
    """``count`` different pictures, named after their number and ``tag``."""

    def make(count: int, *, encoder: str = "features", tag: str = "a") -> list[FeatureRequest]:
        requests = []
        for number in range(count):
            path = tmp_path / f"{tag}{number}.png"
            if not path.exists():
                pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
            digest = content_digest(ImageRef(path=str(path)))
            image = FeatureRequest(
                key=feature_key([digest]),
                encoder="features",
                sample_id=f"{tag}{number}",
                images=(ImageRef(path=str(path)),),
                digests=(digest,),
            )
            if encoder == "features":
                requests.append(image)
            else:
                requests.append(
                    FeatureRequest(
                        key=feature_key((), upstream=image.key),
                        encoder=encoder,
                        sample_id=image.sample_id,
                        upstream=image,
                    )
                )
        return requests

    return make
