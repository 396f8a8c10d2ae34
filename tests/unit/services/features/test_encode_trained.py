"""Trained parts through the service: from a config to records, chained, pinned, estimated, refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from actors.preflight.encoders import encoder_cost
from configs.schema import EncoderConfig, RunConfig
from models.pretrained import save_pretrained
from services.errors import ConfigError, WeightsError
from services.features.encode import Encoder, build_encoder, pin_weights, to_torch


@pytest.fixture
def config(make_config: Any, tmp_path: Path) -> RunConfig:
    """A ViT and a VAE as runs leave them, behind each other."""
    torch.manual_seed(0)
    for part, name in (("encoder", "uniugg-vit-tiny"), ("vae", "spatial-vae-tiny")):
        module: Any = models.build(name)
        save_pretrained(module, tmp_path / part, name, module.settings)
    shape: dict[str, Any] = {"height": 32, "width": 48, "dtype": "float32"}
    vae: dict[str, Any] = {"weights": str(tmp_path / "vae"), "upstream": "vit", "dtype": "float32"}
    encoders = {
        "vit": EncoderConfig(family="uniugg_vit", weights=str(tmp_path / "encoder"), **shape),
        "vae": EncoderConfig(family="uniugg_vae", **vae),
        "reconstruction": EncoderConfig(family="uniugg_reconstruction", **vae),
        "mast3r": EncoderConfig(family="mast3r", **shape),
    }
    return dataclasses.replace(make_config(), encoders={**make_config().encoders, **encoders})


def test_from_pictures_to_posteriors(config: RunConfig, make_requests: Any):
    pictures = [dataclasses.replace(r, encoder="vit") for r in make_requests(2)]
    behind = [dataclasses.replace(r, encoder="vae", upstream=r, images=()) for r in pictures]
    tokens = [to_torch(r["tokens"]) for r in Encoder("vit", config).encode(pictures)]
    made = Encoder("vae", config).encode(behind)
    vae: Any = build_encoder("vae", config).load().vae
    for given, record in zip(tokens, made, strict=True):
        with torch.no_grad():
            mean, logvar = vae.encode(given)
        torch.testing.assert_close(to_torch(record["mean"]), mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(to_torch(record["logvar"]), logvar[0], atol=1e-5, rtol=1e-5)
    rebuilt = Encoder("reconstruction", config).encode(
        [dataclasses.replace(r, encoder="reconstruction") for r in behind]
    )
    assert to_torch(rebuilt[0]["tokens"]).shape == (1, 2, 3, 96)


def test_a_run_is_bound_to_the_parts_that_it_began_with(config: RunConfig, tmp_path: Path):
    pinned = pin_weights(config)
    assert {len(pinned.encoders[name].digest) for name in ("vit", "vae", "reconstruction", "mast3r")} == {64}
    build_encoder("vae", pinned)
    other: Any = models.build("spatial-vae-tiny")
    save_pretrained(other, tmp_path / "vae", "spatial-vae-tiny", other.settings)
    with pytest.raises(WeightsError, match=r"encoders\.vae .*changed after the run began"):
        build_encoder("vae", pinned)


def test_costs_are_known_without_the_weights(config: RunConfig):
    vit, vae, mast3r = (encoder_cost(name, config) for name in ("vit", "vae", "mast3r"))
    assert vit.parameters == sum(p.numel() for p in models.build("uniugg-vit-tiny").parameters())
    assert vit.flops > 0
    assert vae.parameters == sum(p.numel() for p in models.build("spatial-vae-tiny").parameters())
    assert vae.record_bytes == 2 * 4 * 4 * 6 * 4
    assert mast3r.record_bytes == (4 * 6 + 1) * 64 * 4


def test_layers_are_not_for_these(config: RunConfig):
    settings = dataclasses.replace(config.encoders["vit"], layers=[1])
    tapped = dataclasses.replace(config, encoders={**config.encoders, "vit": settings})
    with pytest.raises(ConfigError, match=r"encoders\.vit\.layers=\[1\]: uniugg_vit gives its last layer only"):
        build_encoder("vit", tapped)
