"""Configurations that nobody published numbers for, against VGGT and Spa3R written out plainly.

The plain form is held to the published numbers first, where they are there.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import written_spa3r as written

_spec = importlib.util.spec_from_file_location("parity_tests", Path(__file__).with_name("test_parity.py"))
assert _spec is not None
assert _spec.loader is not None
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)
cases, assert_close = parity.cases, parity.close

FOLDER = os.environ.get("LOOM3D_PARITY", "")


def random_state(model: torch.nn.Module, seed: int, prefix: str = "") -> dict[str, Tensor]:
    """Values by published names at which everything matters: no layer scale is small, no norm plain."""
    from models.checkpoints import published_names

    generator, state = torch.Generator().manual_seed(seed), {}
    for ours, published in published_names(model).items():
        tensor = model.state_dict()[ours]
        assert isinstance(published, str)
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1 and "token" not in published and "embed" not in published.rpartition(".")[0][-9:]:
            state[published] = noise * 0.7 / tensor[0].numel() ** 0.5
        elif published.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            state[published] = 1 + 0.2 * noise
        else:
            state[published] = 0.2 * noise
    # Fields of view of about a radian, as cameras have; at 0 nothing is defined.
    last = f"{prefix}camera_head.pose_branch.fc2"
    state[f"{last}.weight"][7:] *= 0.05
    state[f"{last}.bias"][7:] = 0.5
    return state


def vggt_config(**changes: Any) -> dict[str, Any]:
    return {
        "model": "vggt", "patch_size": 14, "image_size": 56, "num_register_tokens": 4, "embed_dim": 32, "num_heads": 2,
        "vit_depth": 1, "depth": 3, "camera_head": {"trunk_depth": 1, "iterations": 2},
        "dpt": {"features": 8, "out_channels": [4, 8, 12, 8], "layers": [0, 1, 2, 2]}, **changes,
    }  # fmt: skip


def spa3r_config(inner: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "model": "spa3r", "embed_dim": 48, "num_heads": 3, "num_queries": 5, "encoder_layers": 2, "decoder_layers": 1,
        "vggt": vggt_config(**(inner or {})), "semantic": {"dim": 10, "patch_size": 32}, "mask_ratio": 0.5,
        "loss": "smooth_l1 + cosine, all views (the released variant)", "qk_norm_global": "layernorm", **changes,
    }  # fmt: skip


def roles(*rows: str) -> Tensor:
    """ "ctt" -> [False, True, True]."""
    return torch.tensor([[letter == "t" for letter in row] for row in rows])


@torch.no_grad()
@pytest.mark.skipif(not FOLDER, reason="LOOM3D_PARITY is not set")
def test_what_is_written_out_is_what_was_published() -> None:
    meta, tensors = parity.read_case(Path(FOLDER) / "spa3r_a_asym.npz")
    state = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("sd/")}
    found = written.spa3r(
        tensors["in/images"], tensors["in/view_mask"], state, meta["config"], asymmetric=True, smooth=True,
        all_views=True,
    )  # fmt: skip
    for name, value in found.items():
        if f"out/{name}" in tensors:
            assert_close(value, tensors[f"out/{name}"], 1e-5 if name.startswith("loss") else 1e-4, name)
    meta, tensors = parity.read_case(Path(FOLDER) / "vggt_a.npz")
    state = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("sd/")}
    assert_vggt_as_written(
        state, meta["config"], tensors["in/images"], {n[4:]: t for n, t in tensors.items() if "out/" in n}
    )


def assert_vggt_as_written(
    state: dict[str, Tensor], config: dict[str, Any], images: Tensor, expected: dict[str, Tensor]
) -> None:
    outputs = written.aggregated(images, None, state, config)
    for layer, output in enumerate(outputs):
        assert_close(output, expected[f"agg{layer}"], 1e-4, f"agg{layer}")
    for number, pose in enumerate(written.poses(outputs, state, config)):
        assert_close(pose, expected[f"pose{number}"], 1e-5, f"pose{number}")
    size = (images.shape[-2], images.shape[-1])
    depth, depth_conf, points, points_conf = written.depth_and_points(outputs, size, state, config)
    assert_close(depth[..., None], expected["depth"], 1e-4, "depth")
    assert_close(depth_conf, expected["depth_conf"], 1e-4, "depth_conf")
    assert_close(points, expected["points"], 1e-4, "points")
    assert_close(points_conf, expected["points_conf"], 1e-4, "points_conf")


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (2, 1, 56, 56)),  # one view, on the grid that was learnt
        ({}, (1, 3, 28, 112)),  # as many patches as the learnt grid, of another shape
        ({"patch_size": 8, "image_size": 24, "num_register_tokens": 1}, (1, 10, 8, 24)),  # more views than a chunk
        ({"embed_dim": 48, "num_heads": 1, "vit_depth": 2}, (2, 2, 42, 14)),
        ({"embed_dim": 40, "num_heads": 5, "depth": 5}, (1, 4, 14, 70)),  # heads of 8 channels, one row of patches
        ({"dpt": {"features": 24, "out_channels": [8, 4, 4, 16], "layers": [3, 0, 1, 1]}, "depth": 4}, (1, 2, 70, 42)),
        ({"qk_norm_global": "rmsnorm"}, (2, 3, 42, 56)),
    ],
)
def test_vggt(changes: dict[str, Any], shape: tuple[int, ...]) -> None:
    config = vggt_config(**changes)
    meta = {"config": config}
    model = cases.model_from_case(meta)
    state = random_state(model, seed=len(str(changes)))
    cases.load_case(model, meta, state)
    images = torch.rand(*shape[:2], 3, *shape[2:], generator=torch.Generator().manual_seed(1))
    assert_vggt_as_written(state, config, images, cases.run_case(model, meta, {"images": images}))


ONE_PASS, TWO_PASSES = True, False


@pytest.mark.parametrize(
    ("asymmetric", "config", "mask", "size"),
    [
        (ONE_PASS, spa3r_config(), roles("ct"), (28, 42)),  # one context view
        (TWO_PASSES, spa3r_config(), roles("ct"), (28, 42)),
        (ONE_PASS, spa3r_config(), roles("cttc", "ctct", "cctt"), (42, 28)),  # other views of each sample
        (TWO_PASSES, spa3r_config(), roles("cttc", "ctct"), (14, 28)),
        (ONE_PASS, spa3r_config({"qk_norm": "rmsnorm"}, qk_norm_global="rmsnorm"), roles("cct"), (56, 56)),
        (
            TWO_PASSES, spa3r_config(embed_dim=40, num_heads=5, encoder_layers=1, decoder_layers=2), roles("ctttc"),
            (14, 56),
        ),
        (
            ONE_PASS,
            spa3r_config({"patch_size": 16, "image_size": 64, "num_register_tokens": 2, "embed_dim": 24}, num_heads=1),
            roles("ctc", "cct"), (32, 80),
        ),
        (
            ONE_PASS, spa3r_config(loss="l1 + cosine, target views (the paper's variant)"), roles("ccct", "cctc"),
            (28, 28),
        ),
        (TWO_PASSES, spa3r_config(semantic={"dim": 7, "patch_size": 14}, num_queries=1), roles("ctt"), (42, 28)),
    ],
)  # fmt: skip
def test_spa3r(asymmetric: bool, config: dict[str, Any], mask: Tensor, size: tuple[int, int]) -> None:
    meta = {"config": config, "mode": "loss", "asymmetric": asymmetric}
    model = cases.model_from_case(meta)
    state = random_state(model, seed=int(mask.sum()))
    cases.load_case(model, meta, state)
    images = torch.rand(*mask.shape, 3, *size, generator=torch.Generator().manual_seed(2))
    trained = {name for name in state if not name.startswith(("aggregator", "camera", "depth_head", "point", "dino"))}
    leaves = {name: tensor.clone().requires_grad_(name in trained) for name, tensor in state.items()}
    words = config["loss"]
    expected = written.spa3r(
        images, mask, leaves, config, asymmetric=asymmetric, smooth="smooth" in words, all_views="all views" in words
    )
    got = cases.run_case(model, meta, {"images": images, "view_mask": mask})
    for name, value in expected.items():
        assert_close(got[name], value.detach(), 1e-5 if name.startswith("loss") else 1e-4, name)
    expected["loss/total"].backward()
    got["loss"].backward()
    rounding = max(float(leaves[name].grad.abs().max()) for name in trained) * torch.finfo(torch.float32).eps  # type: ignore[union-attr]
    for name in sorted(trained):
        gradient = leaves[name].grad
        assert gradient is not None, name
        assert_close(cases.gradient(model, name), gradient, 1e-3, f"gradient of {name}", rounding)


@torch.no_grad()
def test_all_context_is_what_answers_are_made_of() -> None:
    config = spa3r_config()
    meta = {"config": config, "mode": "predict"}
    model = cases.model_from_case(meta)
    state = random_state(model, seed=9)
    cases.load_case(model, meta, state)
    for views, size in ((1, (28, 42)), (4, (42, 42))):
        images = torch.rand(2, views, 3, *size, generator=torch.Generator().manual_seed(3))
        grid = (size[0] // 14, size[1] // 14)
        last = written.aggregated(images, None, state, config["vggt"])[-1][:, :, -grid[0] * grid[1] :]
        expected = written.encoded(last, grid, state, config)[:, : config["num_queries"]]
        assert_close(cases.run_case(model, meta, {"images": images})["latents"], expected, 1e-4, "latents")


def vlm_config(text: dict[str, Any], vision: dict[str, Any], **geometry: Any) -> dict[str, Any]:
    language = {
        "vocab_size": 120, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
        "mrope_section": [1, 1, 2], "image_token_id": 110, "video_token_id": 111, "vision_start_token_id": 112, **text,
    }  # fmt: skip
    language["vision_config"] = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
        "out_hidden_size": language["hidden_size"], "fullatt_block_indexes": [1], "window_size": 56, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, **vision,
    }  # fmt: skip
    return {"model": "spa3-vlm", "spa3r": spa3r_config(**geometry), "qwen2_5_vl": language}


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "grids", "frames"),
    [
        (vlm_config({}, {}), [(4, 6)], (1, 28, 42)),
        (vlm_config({"tie_word_embeddings": False, "num_key_value_heads": 1}, {}), [(4, 6), (4, 6)], (2, 56, 42)),
        (
            vlm_config({"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3,
                        "mrope_section": [2, 2, 4]}, {"depth": 3, "fullatt_block_indexes": [0, 2]}),
            [(6, 4), (4, 8), (2, 2)], (3, 28, 28),
        ),
        (vlm_config({"rope_theta": 5e4}, {"window_size": 112}, embed_dim=40, num_heads=5), [(10, 6)] * 2, (4, 14, 70)),
    ],
)  # fmt: skip
def test_spa3_vlm_is_transformers_with_other_image_features(
    config: dict[str, Any], grids: list[tuple[int, int]], frames: tuple[int, int, int]
) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    meta, text, draw = {"config": config}, config["qwen2_5_vl"], torch.Generator().manual_seed(4)
    model = cases.model_from_case(meta)
    state = random_state(model, seed=len(grids), prefix="geometry_encoder.spa3r.")
    if text["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    cases.load_case(model, meta, state)
    image, start = text["image_token_id"], text["vision_start_token_id"]
    blocks = [[start, *[image] * (rows * columns // 4), start + 1] for rows, columns in grids]
    ids = torch.tensor([[1, 2, *[token for block in blocks for token in block], 3, 4, 5, 6]])
    labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100, ids)
    inputs = {
        "frames": torch.rand(1, frames[0], 3, *frames[1:], generator=draw),
        "pixel_values": torch.randn(sum(r * c for r, c in grids), 1176, generator=draw),
        "grid": torch.tensor([[1, *grid] for grid in grids]), "ids": ids, "labels": labels,
    }  # fmt: skip
    got = cases.run_case(model, meta, inputs)
    geometry = written.below(state, "geometry_encoder.spa3r")
    grid = (frames[1] // 14, frames[2] // 14)
    last = written.aggregated(inputs["frames"], None, geometry, config["spa3r"]["vggt"])[-1]
    latents = written.encoded(last[:, :, -grid[0] * grid[1] :], grid, geometry, config["spa3r"])
    latents = latents[0, : config["spa3r"]["num_queries"]]
    base: Any = model.vlm.language
    seen = torch.cat(base.model.get_image_features(inputs["pixel_values"], inputs["grid"]).pooler_output)
    read = written.fused(seen, latents, state, text["num_attention_heads"])
    assert_close(got["fused"], read, 1e-4, "fused")
    features: Any = (read,)
    base.model.get_image_features = lambda *_, **__: BaseModelOutputWithPooling(pooler_output=features)
    whole = base(
        input_ids=ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["grid"], labels=labels,
        mm_token_type_ids=(ids == image).int(),
    )  # fmt: skip
    assert_close(got["logits"], whole.logits, 1e-4, "logits")
    assert_close(got["loss"], whole.loss, 1e-5, "loss")
