"""Qwen2.5-VL's vision tower as a frozen encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.encoders.families import CLASSES, family_class, input_kind
from models.encoders.qwen import QwenVision, tower_input
from models.errors import ModelError, WeightsError
from models.spa3r.vlm.frames import frame_size
from tests.support.spa3_vlm import LANGUAGE, WIDTH, small_vlm

ARCH = LANGUAGE["vision_config"]
IMAGE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def encoder(weights: str = "random", **changes: Any) -> QwenVision:
    settings: dict[str, Any] = {
        "arch": ARCH if weights == "random" else {},
        "height": 56,
        "width": 84,
        "dtype": "float32",
    }
    return QwenVision(weights, **{**settings, **changes})


def test_pixels_reach_the_tower_as_its_own_processor_lays_them_out() -> None:
    from transformers import Qwen2VLImageProcessor

    made = encoder()
    images = [np.random.default_rng(n).integers(0, 256, (56, 84, 3), dtype=np.uint8) for n in (1, 2)]
    theirs = Qwen2VLImageProcessor(do_resize=False)(images=images, return_tensors="pt")
    patches, grid = tower_input(torch.stack([made.prepare(image, {}) for image in images]), made.config)
    assert torch.equal(grid, theirs["image_grid_thw"])
    torch.testing.assert_close(patches, theirs["pixel_values"].float(), atol=1e-6, rtol=0)


def test_outputs_are_what_is_declared_and_pictures_do_not_mix() -> None:
    made = encoder()
    first, second = made.prepare(IMAGE, {}), made.prepare(IMAGE[::-1], {})
    out = made([first, second])
    for name, spec in made.outputs().items():
        assert out[name].shape[1:] == spec.shape, name
    assert out["tokens"].shape == (2, 1, 2, 3, WIDTH)
    torch.testing.assert_close(out["summary"][:, 0], out["tokens"].mean((1, 2, 3)))
    torch.testing.assert_close(out["tokens"][1], made([second])["tokens"][0])
    half = encoder(dtype="bfloat16")([first])["tokens"]
    assert half.dtype == torch.bfloat16
    assert (half.float() - out["tokens"][:1]).abs().max() < 0.05 * out["tokens"].abs().max()


def test_a_request_may_have_a_size_of_its_own() -> None:
    made = encoder()
    size = frame_size(90, 120)
    prepared = made.prepare(IMAGE, size.visual_transform())
    assert prepared.shape == (3, 392, 504)
    assert made([prepared])["tokens"].shape == (1, 1, *size.grid, WIDTH)
    with pytest.raises(ModelError, match=r"60x84: Qwen2\.5-VL takes positive multiples of 28.*56x84 would do"):
        made.prepare(IMAGE, {"size": [60, 84]})
    with pytest.raises(ModelError, match="56x0"):
        encoder(width=0)
    with pytest.raises(ModelError, match="unknown transform parameters"):
        made.prepare(IMAGE, {"rotate": 1})


def test_the_tower_of_a_folder_is_the_model_s_own(tmp_path: Path) -> None:
    model = small_vlm(seed=3, vision=True)
    model.language.save_pretrained(tmp_path)
    made = encoder(str(tmp_path))
    digest = made.identity()["weights"]
    assert made.model is None, "who only asks for the name holds no weights"
    prepared = made.prepare(IMAGE, {})
    tokens = made([prepared])["tokens"][0, 0].flatten(0, 1)
    patches, grid = tower_input(prepared[None], made.config)
    assert torch.equal(tokens, model.encode_images(patches, grid)[0])
    assert made.parameter_count() == sum(p.numel() for p in model.language.model.visual.parameters())
    stored = load_file(tmp_path / "model.safetensors")
    tuned = {name: tensor + ("layers.0" in name) for name, tensor in stored.items()}
    save_file(tuned, tmp_path / "model.safetensors")
    assert encoder(str(tmp_path)).identity()["weights"] == digest, "a tuned language model has the same features"
    save_file({name: tensor + 1 for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    assert encoder(str(tmp_path)).identity()["weights"] != digest
    save_file({name: t for name, t in stored.items() if "merger" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="no vision tower for this config: missing"):
        encoder(str(tmp_path)).load()
    with pytest.raises(ModelError, match="is for weights=random only"):
        encoder(str(tmp_path), arch=ARCH)


def test_identity_follows_what_decides_an_output() -> None:
    same = [encoder().identity(), encoder().identity()]
    assert same[0] == same[1]
    others = [
        encoder(seed=1),
        encoder(height=84),
        encoder(dtype="bfloat16"),
        encoder(arch={**ARCH, "window_size": 112}),
    ]
    assert all(other.identity() != same[0] for other in others)
    assert family_class("qwen2_5_vl") is QwenVision
    assert input_kind("qwen2_5_vl") == QwenVision.input_kind
    assert "qwen2_5_vl" in CLASSES


def test_flops_are_those_of_the_products_that_run() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    made = encoder(height=112, width=112)
    prepared = made.prepare(IMAGE, {})
    made.load()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made.encode([prepared])
    # The counter knows no attention on a CPU: 64 patches see 16 in one layer and all in the other, twice 16 channels.
    attention = 2 * 2 * 64 * 16 * (16 + 64)
    assert made.flops_per_image() == counter.get_total_flops() + attention
