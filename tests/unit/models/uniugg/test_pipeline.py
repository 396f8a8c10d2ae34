"""From a picture and a pose to points and pictures, with random parts: shapes, geometry, equal to the parts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import models
from models.errors import ModelError, WeightsError
from models.geometry.poses import inverse, make_pose
from models.geometry.projection import transform
from models.pretrained import save_pretrained
from models.uniugg.diffusion import sample
from models.uniugg.encoder import normalise
from models.uniugg.pipeline import Pipeline
from tests.support.uniugg_batches import IMAGE, RAY, generation

SIZE = (32, 48)
PROMPT = [5, *[IMAGE] * 6, 6, *[RAY] * 6, 7]
NAMES = {
    "encoder": "uniugg-vit-tiny", "spatial_decoder": "uniugg-spatial-decoder-tiny", "vae": "spatial-vae-tiny",
    "llm": "uniugg-llm-tiny", "diffusion": "uniugg-unet-tiny",
}  # fmt: skip
PICTURE = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
K = torch.tensor([[70.0, 0.0, 49.5], [0.0, 70.0, 29.5], [0.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {part: models.build(name) for part, name in NAMES.items()}


@pytest.fixture(scope="module")
def pipeline(parts: dict[str, nn.Module]) -> Pipeline:
    return Pipeline(parts, prompt=PROMPT, size=SIZE)


def poses(number: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    moves = torch.randn(number, 3, generator=g) * 0.2
    return make_pose(torch.eye(3).expand(number, 3, 3), moves)


SETTINGS: dict[str, Any] = {"steps": 2, "guidance": 1.5, "seed": 3}


def test_shapes_and_the_depth_of_the_imagined_camera(pipeline: Pipeline):
    made = pipeline.imagine(PICTURE, K, poses(3), batch_size=2, **SETTINGS)
    assert len(made) == 3
    assert made.tokens.shape == (3, 2, 3, 96)
    for name in ("reference", "target"):
        assert getattr(made, f"{name}_points").shape == (3, *SIZE, 3)
        assert getattr(made, f"{name}_colours").shape == (3, *SIZE, 3)
        assert float(getattr(made, f"{name}_confidence").min()) >= 1.0
    camera = transform(made.target_points, inverse(poses(3)))
    torch.testing.assert_close(made.depth, camera[..., 2])


def test_equal_to_the_parts_by_hand(pipeline: Pipeline, parts: dict[str, Any]):
    made = pipeline.imagine(PICTURE, K, poses(2), **SETTINGS)
    cut, camera = pipeline.cut(PICTURE, K)
    draw = torch.tensor([3, 3])
    with torch.no_grad():
        tokens = parts["encoder"](normalise(torch.as_tensor(cut)[None])).tokens.expand(2, -1, -1, -1)
        batch = generation(2) | {
            "tokens": tokens[:, None], "K": camera.expand(2, 2, 3, 3), "input_ids": torch.tensor([PROMPT] * 2),
            "pose": torch.stack([torch.eye(4).expand(2, 4, 4), poses(2)], 1), "draw": draw,
        }  # fmt: skip
        condition = parts["llm"](batch, translation_scale="metres")["condition"]
        z = sample(parts["diffusion"], condition, size=(4, 6), draw=draw, steps=2, guidance=1.5, eta=0.0)
        second = parts["vae"].decode(z)
        torch.testing.assert_close(made.tokens, second)
        torch.testing.assert_close(made.target_points, parts["spatial_decoder"](tokens, second)[1]["pts3d"])


def test_the_cut_keeps_a_point_on_its_pixel(pipeline: Pipeline):
    """A bright pixel of the picture is where the cut camera projects its ray."""
    picture = np.zeros((60, 100, 3), dtype=np.uint8)
    picture[20:23, 50:53] = 255
    cut, camera = pipeline.cut(picture, K)
    assert cut.shape == (*SIZE, 3)
    row, column = (float(np.average(axis, weights=cut[..., 0] / 255 + 0.0)) for axis in np.indices(SIZE))
    ray = torch.linalg.inv(K) @ torch.tensor([51.0, 21.0, 1.0])
    u, v, w = (camera @ ray).tolist()
    assert (u / w, v / w) == (pytest.approx(column, abs=0.1), pytest.approx(row, abs=0.1))
    with pytest.raises(ModelError, match="a picture is uint8"):
        pipeline.cut(picture.astype(np.float32), K)


def test_clouds_and_pictures_of_them(pipeline: Pipeline):
    made = pipeline.imagine(PICTURE, K, poses(1), **SETTINGS)
    target = pipeline.point_cloud(made, 0, confidence=1.0, points="target")
    cut, _ = pipeline.cut(PICTURE, K)
    union = pipeline.point_cloud(made, 0, confidence=1.0, points="union", reference=cut)
    assert (len(target.points), len(union.points)) == (32 * 48, 2 * 32 * 48)
    torch.testing.assert_close(union.colours[32 * 48 :], torch.as_tensor(cut).flatten(0, 1) / 255.0)
    median = float(made.target_confidence.median())
    assert len(pipeline.point_cloud(made, 0, confidence=median, points="target").points) < 32 * 48
    seen = pipeline.render(made, 0, union, radius=1.0, fill=2)
    assert seen.image.shape == (*SIZE, 3)
    assert 0 <= seen.coverage <= 1
    assert torch.equal(seen.covered, seen.depth > 0)
    with pytest.raises(ModelError, match=r"generate\.points='all'"):
        pipeline.point_cloud(made, 0, confidence=1.0, points="all")


def test_parts_come_from_the_folders_of_runs(pipeline: Pipeline, parts: dict[str, Any], tmp_path: Path):
    for part, module in parts.items():
        save_pretrained(module, tmp_path / part, NAMES[part], module.settings)
    loaded = Pipeline.load({part: tmp_path / part for part in parts}, prompt=PROMPT, size=SIZE)
    a = loaded.imagine(PICTURE, K, poses(1), **SETTINGS)
    torch.testing.assert_close(a.tokens, pipeline.imagine(PICTURE, K, poses(1), **SETTINGS).tokens)
    with pytest.raises(WeightsError, match="part 'vae' must be a SpatialVae, this is a StudentViT"):
        Pipeline.load({part: tmp_path / part for part in parts} | {"vae": tmp_path / "encoder"}, prompt=[], size=SIZE)
    with pytest.raises(ModelError, match=r"no parts \['projector'\]"):
        Pipeline.load({"projector": tmp_path}, prompt=[], size=SIZE)


def test_the_direct_variant_needs_neither_vae_nor_diffusion(parts: dict[str, Any]):
    three = {part: parts[part] for part in ("encoder", "spatial_decoder")}
    direct = Pipeline({**three, "llm": models.build("uniugg-direct-tiny")}, prompt=PROMPT, size=SIZE)
    assert direct.imagine(PICTURE, K, poses(1), **SETTINGS).tokens.shape == (1, 2, 3, 96)
    with pytest.raises(WeightsError, match=r"the parts \['vae', 'diffusion'\] are missing"):
        Pipeline({**three, "llm": parts["llm"]}, prompt=PROMPT, size=SIZE)
    with pytest.raises(ModelError, match="multiples of the patch, 16"):
        Pipeline(parts, prompt=PROMPT, size=(30, 48))


def test_encoder_and_llm_are_enough_to_be_asked(parts: dict[str, Any]):
    two = {part: parts[part] for part in ("encoder", "llm")}
    asked = Pipeline(two, prompt=PROMPT, size=SIZE, imagines=False)
    cut, _ = asked.cut(PICTURE, K)
    (answer,) = asked.generate_text([[5, *[IMAGE] * 6, 9]], asked.see(cut[None]), max_new_tokens=2, stop=[])
    assert len(answer) == 2
    with pytest.raises(WeightsError, match="opened without a spatial decoder"):
        asked.imagine(PICTURE, K, poses(1), **SETTINGS)
    with pytest.raises(WeightsError, match=r"to answer questions, the parts \['encoder'\] are missing"):
        Pipeline({"llm": parts["llm"]}, prompt=PROMPT, size=SIZE, imagines=False)


def test_depth_scale_comes_from_the_reference_alone(parts: dict[str, Any]):
    scaled = Pipeline(parts, prompt=PROMPT, size=SIZE, translation_scale="depth")
    batch = scaled._batch(torch.randn(1, 2, 3, 96), K[None], poses(1))
    assert batch["depth"].shape == (1, 1, *SIZE)
    assert scaled.imagine(PICTURE, K, poses(1), **SETTINGS).tokens.isfinite().all()
    with pytest.raises(ModelError, match="there is no pose"):
        scaled.imagine(PICTURE, K, poses(1)[:0], **SETTINGS)


def test_questions_about_what_was_imagined(pipeline: Pipeline):
    made = pipeline.imagine(PICTURE, K, poses(1), **SETTINGS)
    question = [5, *[IMAGE] * 6, 9]
    (answer,) = pipeline.generate_text([question], made.tokens, max_new_tokens=3, stop=[])
    assert len(answer) == 3
