"""Every reference case in the folder that $LOOM3D_PARITY names, within the tolerances of its README."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

CASES = Path(__file__).with_name("cases.py")
_spec = importlib.util.spec_from_file_location("parity_cases", CASES)
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

FOLDER = os.environ.get("LOOM3D_PARITY", "")
FILES = sorted(Path(FOLDER).glob("*.npz")) if FOLDER else []

OUTPUTS, LOSSES, GRADIENTS = 1e-4, 1e-5, 1e-3
_NOT_OURS = ("loss_total_independent", "patch_start", "grad_norms")
"""Restatements, constants, and what is compared on its own."""


def read_case(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Meta and all tensors of a case by their full names."""
    with np.load(path) as stored:
        tensors = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "meta"}
        return json.loads(str(stored["meta"])), tensors


def seeded_state(meta: Mapping[str, Any], *, aliases: bool) -> dict[str, Tensor]:
    """The weights of a case that carries none: they follow from its seed."""
    generator = torch.Generator().manual_seed(meta["seed"] + 1)
    state = {}
    for name in sorted(meta["parameters"]):
        shape = meta["parameters"][name]
        if len(shape) > 1:
            state[name] = torch.randn(shape, generator=generator) * 0.7 / math.sqrt(math.prod(shape[1:]))
        else:
            state[name] = torch.randn(shape, generator=generator) * 0.05
            state[name] += "norm" in name and name.endswith("weight")
    if aliases:
        state |= {second: state[first] for second, first in meta["aliases"].items()}
    return state


def close(got: Tensor, expected: Tensor, tolerance: float, name: str, rounding: float = 0.0) -> None:
    """Within ``tolerance`` of the scale of what is expected; infinite where that is (a field of view of 0).

    ``rounding`` is allowed beside it: a gradient that is zero but for rounding has no scale of its own.
    """
    assert got.shape == expected.shape, name
    finite = expected.isfinite()
    assert torch.equal(got.detach()[~finite].to(expected.dtype), expected[~finite]), f"{name}: not finite elsewhere"
    if not finite.any():
        return
    got, expected = got[finite], expected[finite]
    scale = expected.abs().max().clamp_min(1e-12)
    error = float(((got.detach().double() - expected.double()).abs().max() - rounding) / scale)
    assert error <= tolerance, f"{name}: {error:.2e} of its scale, allowed {tolerance:g}"


@pytest.mark.skipif(not FOLDER, reason="LOOM3D_PARITY is not set")
@pytest.mark.parametrize("aliases", [False, True], ids=["", "aliases"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_case(path: Path, aliases: bool) -> None:
    meta, tensors = read_case(path)
    kind = meta["config"]["model"]
    if kind not in cases.KINDS:
        pytest.skip(f"{path.name}: tests/parity/cases.py knows {', '.join(cases.KINDS)}, not {kind}")
    if aliases and not meta.get("aliases"):
        pytest.skip(f"{path.name} has no second names")
    state = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("sd/")}
    if not state and "parameters" in meta:
        state = seeded_state(meta, aliases=aliases)
    inputs = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in/")}
    model = cases.model_from_case(meta)
    cases.load_case(model, meta, state)
    outputs = cases.run_case(model, meta, inputs)
    expected = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("out/")}
    compared = expected.keys() - set(_NOT_OURS)
    assert compared <= outputs.keys()
    for name in sorted(compared):
        close(outputs[name], expected[name], LOSSES if name.startswith("loss") else OUTPUTS, name)
    gradients = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("grad/")}
    if "loss" in outputs:
        outputs["loss"].backward()
    largest = max((float(gradient.abs().max()) for gradient in gradients.values()), default=0.0)
    rounding = largest * torch.finfo(torch.float32).eps
    for name, gradient in gradients.items():
        close(cases.gradient(model, name), gradient, GRADIENTS, f"gradient of {name}", rounding)
    names = meta.get("grad_norm_names", [])
    for name, norm in zip(names, expected.get("grad_norms", torch.empty(0)), strict=True):
        close(cases.gradient(model, name).norm(), norm, GRADIENTS, f"norm of the gradient of {name}")
    without_loss = kind == "prope" or meta.get("mode") == "predict"
    assert gradients or names or without_loss, f"{path.name} compares no gradient"
    assert compared, f"{path.name} compares nothing"


def invented(**changes: Any) -> dict[str, Any]:
    """A configuration of a case's form."""
    config = {
        "model": "mast3r", "pos_embed": "RoPE100", "img_size": [64, 64], "head_type": "catmlp+dpt",
        "output_mode": "pts3d+desc24", "depth_mode": ["exp", "-inf", "inf"], "conf_mode": ["exp", 1, "inf"],
        "enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2, "dec_embed_dim": 24, "dec_depth": 4,
        "dec_num_heads": 2, "two_confs": True, "desc_conf_mode": ["exp", 0, "inf"],
    }  # fmt: skip
    return {"config": config | changes}


def views(shapes: list[tuple[int, int]], *, batch: int = 1) -> dict[str, Tensor]:
    """Images of the given sizes with everything that the losses need."""
    generator = torch.Generator().manual_seed(3)
    inputs: dict[str, Tensor] = {}
    for number, (height, width) in enumerate(shapes, 1):
        corners = torch.tensor([width, height])
        inputs |= {
            f"view{number}/img": torch.randn(batch, 3, height, width, generator=generator),
            f"view{number}/pts3d": torch.randn(batch, height, width, 3, generator=generator),
            f"view{number}/camera_pose": torch.eye(4).expand(batch, 4, 4),
            f"view{number}/valid_mask": torch.rand(batch, height, width, generator=generator) < 0.9,
            f"view{number}/sky_mask": torch.rand(batch, height, width, generator=generator) < 0.1,
            f"view{number}/corres": (torch.rand(batch, 40, 2, generator=generator) * corners).long(),
            f"view{number}/valid_corres": torch.rand(batch, 40, generator=torch.Generator().manual_seed(9)) < 0.5,
            f"view{number}/is_metric_scale": torch.ones(batch, dtype=torch.bool),
            f"view{number}/true_shape": torch.tensor([[height, width]]).expand(batch, 2),
        }
    return inputs


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"dec_depth": 7, "dec_num_heads": 3}, (16, 48)),
        ({"output_mode": "pts3d+desc10", "two_confs": False, "dec_embed_dim": 32}, (48, 32)),
        ({"depth_mode": ["square", "-inf", "inf"], "conf_mode": ["sigmoid", 0, 4], "pos_embed": "RoPE50"}, (32, 32)),
    ],
)
def test_other_configurations_run_and_reach_every_parameter(changes: dict[str, Any], size: tuple[int, int]) -> None:
    meta = invented(**changes)
    torch.manual_seed(0)
    model = cases.model_from_case(meta)
    outputs = cases.run_case(model, meta, views([size, size], batch=2))
    channels = int(meta["config"]["output_mode"].removeprefix("pts3d+desc"))
    assert outputs["pred2/pts3d_in_other_view"].shape == (2, *size, 3)
    assert outputs["pred1/desc"].shape == (2, *size, channels)
    outputs["loss"].backward()
    norms = [cases.gradient(model, name).norm() for name in ("decoder_embed.weight", "dec_blocks2.0.mlp.fc1.weight")]
    assert all(torch.isfinite(norm) and norm > 0 for norm in norms)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_picture_stored_on_its_side_is_read_upright() -> None:
    meta = invented()
    torch.manual_seed(0)
    model = cases.model_from_case(meta)
    upright = views([(48, 32), (32, 48)])
    lying = dict(upright)
    lying["view1/img"] = upright["view1/img"].mT
    with torch.no_grad():
        expected = cases.run_case(model, meta, {k: v for k, v in upright.items() if k.endswith(("img", "true_shape"))})
        got = cases.run_case(model, meta, {k: v for k, v in lying.items() if k.endswith(("img", "true_shape"))})
    torch.testing.assert_close(got["pred1/pts3d"].transpose(1, 2), expected["pred1/pts3d"])
    torch.testing.assert_close(got["pred2/conf"], expected["pred2/conf"])


SPA3R: dict[str, Any] = {
    "model": "spa3r", "embed_dim": 48, "num_heads": 3, "num_queries": 6, "encoder_layers": 1, "decoder_layers": 3,
    "vggt": {
        "model": "vggt", "patch_size": 14, "image_size": 42, "num_register_tokens": 3, "embed_dim": 32, "num_heads": 2,
        "vit_depth": 1, "depth": 3, "camera_head": {"trunk_depth": 1, "iterations": 2},
        "dpt": {"features": 8, "out_channels": [4, 8, 8, 8], "layers": [0, 1, 2, 2]},
    },
    "semantic": {"dim": 10, "patch_size": 32}, "loss": "l1 + cosine, target views (the paper's variant)",
    "qk_norm_global": "rmsnorm",
}  # fmt: skip


def test_other_configurations_of_spa3r_in_every_mode() -> None:
    torch.manual_seed(0)
    meta = {"config": SPA3R, "mode": "loss", "asymmetric": False}
    model = cases.model_from_case(meta)
    inputs = {
        "images": torch.rand(2, 3, 3, 28, 56),
        "view_mask": torch.tensor([[False, True, False], [False, False, True]]),
    }
    outputs = cases.run_case(model, meta, inputs)
    mask = inputs["view_mask"]
    assert outputs["agg_last"].shape == (2, 3, 4 + 8, 64)
    assert outputs["rays"].shape == (6, 8, 3)
    assert outputs["pred_sem"].shape == outputs["dino_target"].shape == (2, 3, 8, 10)
    error = outputs["pred_geo"] - outputs["agg_last"][:, :, 4:]
    torch.testing.assert_close(outputs["loss/geo/l1"], error.abs()[mask].mean())
    terms = [outputs[f"loss/{name}"] for name in ("geo/l1", "geo/cos", "sem/l1", "sem/cos", "depth_prob")]
    torch.testing.assert_close(outputs["loss"], torch.stack(terms).sum())
    outputs["loss"].backward()
    assert cases.gradient(model, "query_embed.weight").any()
    with torch.no_grad():
        context = torch.stack([inputs["images"][i][~mask[i]] for i in range(2)])
        alone = cases.run_case(model, {**meta, "mode": "predict"}, {"images": context})
        torch.testing.assert_close(alone["f_ctx"], outputs["f_ctx"])
        torch.testing.assert_close(alone["latents"], outputs["encoder"][:, :6])
        joint = cases.run_case(model, {**meta, "asymmetric": True}, inputs)
        torch.testing.assert_close(joint["latents"], outputs["latents"], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(joint["agg_last"], outputs["agg_last"], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "views", "size"),
    [
        ({"patch_size": 8, "image_size": 40, "num_register_tokens": 1}, 1, (40, 40)),
        (
            {"embed_dim": 48, "num_heads": 3, "depth": 6, "camera_head": {"trunk_depth": 1, "iterations": 2}},
            4,
            (14, 42),
        ),
        (
            {"dpt": {"features": 24, "out_channels": [8, 12, 16, 20], "layers": [1, 1, 3, 2]}, "vit_depth": 1},
            2,
            (42, 70),
        ),
        ({"qk_norm_global": "rmsnorm"}, 3, (28, 112)),
    ],
)
def test_other_configurations_of_vggt(changes: dict[str, Any], views: int, size: tuple[int, int]) -> None:
    config = {
        "model": "vggt", "patch_size": 14, "image_size": 56, "num_register_tokens": 4, "embed_dim": 32, "num_heads": 2,
        "vit_depth": 2, "depth": 4, "camera_head": {"trunk_depth": 2, "iterations": 4},
        "dpt": {"features": 16, "out_channels": [8, 8, 8, 8], "layers": [0, 1, 2, 3]}, **changes,
    }  # fmt: skip
    meta = {"config": config}
    torch.manual_seed(0)
    model = cases.model_from_case(meta)
    state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in model.state_dict().items()}
    cases.load_case(model, meta, state)
    outputs = cases.run_case(model, meta, {"images": torch.rand(2, views, 3, *size), "enc": torch.rand(2, views, 9)})
    patches = math.prod(size) // config["patch_size"] ** 2
    tokens = 1 + config["num_register_tokens"] + patches
    assert outputs[f"agg{config['depth'] - 1}"].shape == (2, views, tokens, 2 * config["embed_dim"])
    assert outputs["vit_patchtokens"].shape == (2 * views, patches, config["embed_dim"])
    assert outputs["points"].shape == (2, views, *size, 3)
    assert f"pose{config['camera_head']['iterations'] - 1}" in outputs
    outputs["loss"].backward()
    unused = ("point_head.", "aggregator.patch_embed.mask_token", "camera_head.empty_pose_tokens")
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert [name for name in missing if not name.startswith(unused)] == []


def test_unknown_kinds_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"config.model='nerf'.*there are mast3r"):
        cases.model_from_case({"config": {"model": "nerf"}})
    model = cases.model_from_case(invented())
    with pytest.raises(ValueError, match=r"no tensor that is published as 'dec_blocks\.9\.attn'"):
        cases.gradient(model, "dec_blocks.9.attn")
    with pytest.raises(ValueError, match="has no gradient"):
        cases.gradient(model, "decoder_embed.weight")
