"""The two frozen encoders against the whole network; layouts of weights; sets that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import models
from models.encoders.vggt import Vggt, frozen
from models.encoders.vggt.frozen import VggtPatches, VggtViews
from models.errors import ModelError, WeightsError
from models.pretrained import save_pretrained
from models.registry import spec

SIZE: dict[str, Any] = {"height": 28, "width": 42, "dtype": "float32"}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 28, 42, 3), dtype=np.uint8)
ROLES = ("context", "target", "context", "target")


def both(weights: str = "random", **options: Any) -> tuple[VggtPatches, VggtViews]:
    patches = VggtPatches(weights, **SIZE, **options)
    return patches, VggtViews(patches, "none", weights=weights, dtype="float32", **options)


def records(patches: VggtPatches, images: np.ndarray = IMAGES) -> list[dict[str, Tensor]]:
    made = patches([patches.prepare(image, {}) for image in images])
    return [{name: value[i] for name, value in made.items()} for i in range(len(images))]


def answer(views: VggtViews, given: list[dict[str, Tensor]], roles: tuple[str, ...] = ROLES) -> dict[str, Tensor]:
    made = views([views.prepare(list(zip(given, roles, strict=True)), {})])
    return {name: value[0] for name, value in made.items()}


def pixels() -> Tensor:
    return torch.from_numpy(IMAGES).permute(0, 3, 1, 2)[None].float() / 255


@torch.no_grad()
def test_the_two_stages_are_the_whole() -> None:
    patches, views = both()
    whole = patches.part.load()
    assert isinstance(whole, Vggt)
    given = records(patches)
    for roles, hidden in ((ROLES, torch.tensor([[False, True, False, True]])), (("context",) * 4, None)):
        made, expected = answer(views, given, roles), whole(pixels(), hidden)
        torch.testing.assert_close(made["tokens"].flatten(1), expected.features[0].flatten(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made["pose"], expected.poses[-1][0], rtol=1e-4, atol=1e-5)
        assert expected.depth is not None
        corners = expected.depth[0, :, ::14, ::14]
        torch.testing.assert_close(made["depth"], corners, rtol=1e-4, atol=1e-5)
    specs = {name: (found.shape[1:], found.dtype) for name, found in views.outputs().items()}
    assert specs == {n: (tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for n, t in made.items()}
    assert all(found.shape[0] is None for found in views.outputs().values())
    assert views.outputs_of(4)["tokens"].shape == tuple(made["tokens"].shape)


def test_shapes_sizes_and_work_are_known_without_weights() -> None:
    patches, views = both()
    assert patches.model is None
    assert {name: found.shape for name, found in patches.outputs().items()} == {
        "tokens": (1, 2, 3, 64), "summary": (1, 64)
    }  # fmt: skip
    held = sum(parameter.numel() for parameter in VggtViews(patches, "none", dtype="float32").load().parameters())
    assert views.parameter_count() == held
    assert views.parameter_count() + patches.parameter_count() < sum(
        parameter.numel() for parameter in patches.part.load().parameters()
    ), "the point head is in neither"
    assert views.flops(4, 2) < views.flops(4) < views.flops(8)
    assert patches.flops_per_image() > 0


def test_without_depth_there_is_no_depth_head() -> None:
    patches, views = both(arch={"depth_map": False})
    made = answer(views, records(patches))
    assert set(made) == set(views.outputs()) == {"tokens", "pose"}
    assert views.model is not None
    assert not hasattr(views.model, "depth_head")
    assert views.identity() != both()[1].identity()


def test_the_number_of_layers_can_be_set_beside_the_depth_map() -> None:
    patches, views = both(arch={"depth": 5, "depth_map": False})
    assert set(answer(views, records(patches))) == {"tokens", "pose"}
    assert views.model is not None
    assert len(views.model.aggregator.global_blocks) == 5


def test_dtypes() -> None:
    patches = VggtPatches("random", height=28, width=42, dtype="bfloat16")
    views = VggtViews(patches, "none", dtype="bfloat16")
    made = answer(views, records(patches))
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        "tokens": torch.bfloat16, "pose": torch.float32, "depth": torch.float32
    }  # fmt: skip
    assert {views.outputs()[name].dtype for name in ("pose", "depth")} == {"float32"}


def test_sets_of_one_batch_are_answered_each_for_itself() -> None:
    patches, views = both()
    given = records(patches)
    first, second = list(zip(given, ROLES, strict=True)), list(zip(given[::-1], ROLES, strict=True))
    together = views([views.prepare(first, {}), views.prepare(second, {})])
    torch.testing.assert_close(together["tokens"][1], answer(views, given[::-1])["tokens"], rtol=1e-4, atol=1e-5)
    fewer = views.prepare(list(zip(given, ("context", "target", "context", "context"), strict=True)), {})
    assert fewer["targets"].shape != views.prepare(first, {})["targets"].shape, "which keeps them out of one batch"


def published_folder(folder: Path, *, pickled: bool = False, biases: bool = True) -> str:
    torch.manual_seed(1)
    state = models.build("vggt-tiny").state_dict()
    if not biases:
        state = {n: t for n, t in state.items() if ".global_blocks." not in n or "_norm.bias" not in n}
    state["track_head.some.weight"] = torch.zeros(3)
    folder.mkdir()
    if pickled:
        torch.save(state, folder / "model.pt")
    else:
        (folder / "config.json").write_text('{"img_size": 112}')
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return str(folder)


@torch.no_grad()
def test_the_published_layout_in_either_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "PUBLISHED", "vggt-tiny")
    torch.manual_seed(1)
    whole = models.build("vggt-tiny").eval()
    expected = whole(pixels()).features[0].flatten(1)
    for pickled in (False, True):
        patches, views = both(published_folder(tmp_path / str(pickled), pickled=pickled))
        made = answer(views, records(patches), ("context",) * 4)
        torch.testing.assert_close(made["tokens"].flatten(1), expected, rtol=1e-4, atol=1e-4)
        assert views.identity()["architecture"]["qk_norm"] == "layernorm"
        assert len(str(views.identity()["weights"])) == 64
    released = published_folder(tmp_path / "released", biases=False)
    patches, views = both(released)
    assert views.identity()["architecture"]["qk_norm"] == "rmsnorm"
    assert not torch.allclose(answer(views, records(patches), ("context",) * 4)["tokens"].flatten(1), expected)


def test_a_norm_that_the_weights_do_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "PUBLISHED", "vggt-tiny")
    released = published_folder(tmp_path / "released", biases=False)
    asked = both(released, arch={"qk_norm": "rmsnorm"})
    assert asked[1].identity() == both(released)[1].identity(), "asking changes no key of a feature"
    with pytest.raises(WeightsError, match=r"qk_norm=layernorm, but .*released has rmsnorm in its global blocks"):
        VggtPatches(released, **SIZE, arch={"qk_norm": "layernorm"})


def test_a_folder_of_ours(tmp_path: Path) -> None:
    torch.manual_seed(2)
    settings = dict(spec("vggt-tiny").defaults)
    save_pretrained(models.build("vggt-tiny"), tmp_path / "ours", "vggt-tiny", settings)
    patches, views = both(str(tmp_path / "ours"))
    assert answer(views, records(patches))["pose"].shape == (4, 9)
    other = VggtPatches("random", **SIZE)
    with pytest.raises(WeightsError, match="two stages have different weights"):
        VggtViews(other, "none", weights=str(tmp_path / "ours"), dtype="float32").identity()


def test_weights_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "PUBLISHED", "vggt-tiny")
    with pytest.raises(WeightsError, match="no such folder"):
        VggtPatches(str(tmp_path / "nothing"), **SIZE)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.pt").write_bytes(b"no archive at all")
    with pytest.raises(WeightsError, match=r"model.pt cannot be read as a file of tensors"):
        VggtPatches(str(tmp_path / "broken"), **SIZE)
    (tmp_path / "program").mkdir()
    torch.save({"weights": Path("anything")}, tmp_path / "program" / "model.pt")
    with pytest.raises(WeightsError, match=r"model.pt"):
        VggtPatches(str(tmp_path / "program"), **SIZE)
    folder = Path(published_folder(tmp_path / "changed"))
    patches = VggtPatches(str(folder), **SIZE)
    patches.identity()
    torch.manual_seed(9)
    save_file(models.build("vggt-tiny").state_dict(), folder / "model.safetensors")
    with pytest.raises(WeightsError, match="changed after"):
        patches.load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sets: [], "at least one view"),
        (lambda sets: [(sets[0][0], "target"), *sets[1:]], "view 0 of a set is a target"),
        (lambda sets: [sets[0], ({"tokens": torch.zeros(1, 3, 2, 64)}, "context")], "one size for all"),
    ],
)
def test_sets_that_cannot_be(change: Any, message: str) -> None:
    patches, views = both()
    with pytest.raises(ModelError, match=message):
        views.prepare(change(list(zip(records(patches), ROLES, strict=True))), {})


def test_encoders_that_do_not_fit_together() -> None:
    patches = VggtPatches("random", **SIZE)
    with pytest.raises(ModelError, match=r"reads tokens \(1, h, w, 384\).*vggt_patches encoder of the same weights"):
        VggtViews(patches, "none", arch={"model": "vggt-small"})
    with pytest.raises(ModelError, match="depth_map='yes' must be true or false"):
        VggtViews(patches, "none", arch={"depth_map": "yes"})
    with pytest.raises(ModelError, match="30x42 pixels"):
        VggtPatches("random", height=30, width=42)
    with pytest.raises(WeightsError, match=r"uniugg-vit-tiny; family vggt takes vggt-\*"):
        VggtViews(patches, "none", arch={"model": "uniugg-vit-tiny"})


@torch.no_grad()
def test_one_view_is_a_set_that_is_its_own_context() -> None:
    patches, views = both()
    made = answer(views, records(patches, IMAGES[:1]), ("context",))
    expected = patches.part.load()(pixels()[:, :1])
    torch.testing.assert_close(made["tokens"].flatten(1), expected.features[0].flatten(1), rtol=1e-4, atol=1e-4)
    assert made["pose"].shape == (1, 9)
