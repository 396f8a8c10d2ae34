from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import models
from models.errors import ModelError, WeightsError

#: Families that are parts of other models: no recipe trains them by themselves.
PARTS = ("mast3r-", "radio-", "spatial-vae-", "uniugg-vit-", "uniugg-spatial-decoder-", "vggt-", "spa3-vlm-adapter-")


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_builds_on_meta_with_its_roles(name: str) -> None:
    spec = models.spec(name)
    assert spec.name == name
    with torch.device("meta"):
        module = models.build(name)
    assert all(p.is_meta for p in module.parameters())
    assert sum(p.numel() for p in module.parameters()) > 0
    assert bool(spec.roles) != name.startswith(PARTS)
    for role in spec.roles:
        assert spec.role(role.name) is role
    with pytest.raises(KeyError, match="has no role"):
        spec.role("nobody")


def test_names_and_globs() -> None:
    assert models.list_models("probe-*") == ["probe-base", "probe-small", "probe-tiny"]
    assert models.list_models("nothing*") == []


def test_unknown_names_and_overrides_say_what_is_near() -> None:
    with pytest.raises(ModelError, match=r"no model 'prob-tiny'; did you mean probe-tiny"):
        models.build("prob-tiny")
    with pytest.raises(ModelError, match=r"no setting 'chanels'; it has channels"):
        models.build("probe-tiny", chanels=3)
    with pytest.raises(ModelError, match="classes must be at least 1, got 0"):
        models.build("probe-tiny", classes=0)


def test_import_brings_no_framework() -> None:
    code = (
        "import sys, models; models.build('probe-tiny');"
        "print([m for m in ('ray', 'deepspeed', 'peft', 'hydra', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Published(nn.Module):
    """Two layers whose published names differ from ours."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))

    def reference_names(self) -> dict[str, str]:
        return {"first.weight": "stem.w", "first.bias": "stem.b"}


def published_state() -> dict[str, torch.Tensor]:
    return {
        "stem.w": torch.full((3, 2), 2.0),
        "stem.b": torch.full((3,), 3.0),
        "second.weight": torch.full((1, 3), 4.0),
        "second.bias": torch.full((1,), 5.0),
    }


def test_load_reference_by_published_names() -> None:
    module = Published()
    report = models.load_reference(module, published_state())
    assert report.complete
    assert report.loaded == ("second.bias", "second.weight", "stem.b", "stem.w")
    assert torch.equal(module.first.weight, torch.full((3, 2), 2.0))
    assert torch.equal(module.second.bias, torch.full((1,), 5.0))


def test_load_reference_lists_what_does_not_fit_and_loads_nothing() -> None:
    module = Published()
    before = module.first.bias.detach().clone()
    state = published_state()
    del state["stem.w"]
    state["second.weight"] = torch.zeros(1, 4)
    state["extra"] = torch.zeros(1)
    with pytest.raises(WeightsError) as failure:
        models.load_reference(module, state)
    message = str(failure.value)
    assert "missing (1): stem.w" in message
    assert "unexpected (1): extra" in message
    assert "second.weight: expected (1, 3), got (1, 4)" in message
    assert torch.equal(module.first.bias, before)
    report = models.load_reference(module, state, strict=False)
    assert not report.complete
    assert report.loaded == ("second.bias", "stem.b")
    assert torch.equal(module.first.bias, torch.full((3,), 3.0))


def test_load_reference_skips_by_glob() -> None:
    module = Published()
    state = {**published_state(), "teacher.head.w": torch.zeros(1)}
    del state["stem.w"]
    report = models.load_reference(module, state, skip=["teacher.*", "stem.w"])
    assert report.complete
    assert report.skipped == ("stem.w", "teacher.head.w")


def test_load_reference_on_meta() -> None:
    with torch.device("meta"):
        module = Published()
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in published_state().items()}
    assert models.load_reference(module, meta).complete
    assert module.first.weight.is_meta
    with pytest.raises(WeightsError, match=r"missing \(1\): stem.w"):
        models.load_reference(module, {k: v for k, v in meta.items() if k != "stem.w"})
    models.load_reference(module, published_state())
    assert not module.first.weight.is_meta
    assert torch.equal(module(torch.ones(1, 2)), torch.full((1, 1), 3 * 7.0 * 4 + 5))


def test_spec_mapping_is_found_again_after_build(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from models import checkpoints

    spec = dataclasses.replace(models.spec("probe-tiny"), to_published=lambda m: {"segmentation.bias": "seg.b"})
    monkeypatch.setattr(checkpoints, "spec", lambda name: spec)
    module = models.build("probe-tiny", classes=3)
    state = {("seg.b" if k == "segmentation.bias" else k): v for k, v in module.state_dict().items()}
    state["seg.b"] = torch.tensor([1.0, 2.0, 3.0])
    assert models.load_reference(module, state).complete
    assert module.state_dict()["segmentation.bias"].tolist() == [1.0, 2.0, 3.0]
