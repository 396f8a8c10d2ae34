"""Spa3R beside and behind VGGT: the container of both, and the encoder of latents in the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from models.encoders.base import FrozenEncoder, InputKind
from models.encoders.families import family_class, input_kind
from models.encoders.uniugg import READS
from models.encoders.vggt import Vggt
from models.encoders.weights import stored_digest
from models.errors import ModelError, WeightsError
from models.pretrained import save_pretrained
from models.registry import spec
from models.spa3r.frozen import Spa3rLatents
from models.spa3r.losses import FieldObjective
from models.spa3r.model import Spa3R
from models.spa3r.reference import Spa3rReference
from models.spec import TensorSpec

VGGT: dict[str, Any] = {
    "width": 16, "heads": 2, "depth": 2, "vit_depth": 1, "camera_depth": 1, "camera_heads": 2, "image_size": 28,
    "dpt_layers": (0, 0, 1, 1), "dpt_levels": (4, 4, 4, 4), "dpt_features": 8,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "channels": 32, "width": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "queries": 5,
    "targets": {"geo": 32, "sem": 6},
}  # fmt: skip
RELEASED = FieldObjective(loss="smooth_l1", loss_views="all", targets=("geo", "sem"), depth_probe=True)
ROLES = torch.tensor([[False, True, False, True], [False, False, True, True]])


class Semantic(nn.Module):
    """A convolution in the place of DINOv3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, stride=16)

    def forward(self, pictures: Tensor) -> Tensor:
        assert pictures.shape[-2:] == (224, 224)
        return self.conv(pictures).permute(0, 2, 3, 1)


def container(**settings: Any) -> Spa3rReference:
    torch.manual_seed(0)
    vggt, spa3r = models.build("vggt-tiny", **{**VGGT, **settings}), models.build("spa3r-tiny", **SETTINGS)
    assert isinstance(vggt, Vggt)
    assert isinstance(spa3r, Spa3R)
    with torch.no_grad():
        # An untrained camera head may see a field of view of 0.
        vggt.camera_head.pose_branch.fc2.bias.add_(torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1.0]))
        vggt.camera_head.pose_branch.fc2.weight.mul_(0.1)
    return Spa3rReference(vggt, spa3r, Semantic())


def images(views: int = 4) -> Tensor:
    return torch.rand(2, views, 3, 28, 42, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_one_pass_and_two_passes() -> None:
    module, pictures = container(), images()
    joint = module.frozen(pictures, ROLES, asymmetric=True)
    apart = module.frozen(pictures, ROLES, asymmetric=False)
    alone = torch.stack([pictures[i][~ROLES[i]] for i in range(2)])
    expected = module.vggt(alone).features
    torch.testing.assert_close(apart.context, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(joint.context, expected, rtol=1e-4, atol=1e-4)
    everyone = module.vggt(pictures)
    torch.testing.assert_close(apart.features, everyone.features)
    torch.testing.assert_close(apart.pose, everyone.poses[-1])
    assert everyone.depth is not None
    assert apart.depth is not None
    assert torch.equal(apart.depth, everyone.depth[..., ::14, ::14])
    assert float((joint.features - everyone.features).abs().max()) > 1e-3
    torch.testing.assert_close(joint.features[ROLES], joint.last[:, :, 5:][ROLES])


def test_losses_and_gradients_of_the_container_reach_spa3r_alone() -> None:
    module = container()
    seen, field, losses = module(images(), ROLES, RELEASED, asymmetric=False)
    assert set(losses) == set(RELEASED.terms)
    error = field.predicted["geo"] - seen.features
    small = torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)
    torch.testing.assert_close(losses["geo_l1"], small.mean())
    targets = FieldObjective(loss="l1", loss_views="targets", targets=("geo", "sem"), depth_probe=True)
    of_targets = module(images(), ROLES, targets, asymmetric=False)[2]
    torch.testing.assert_close(of_targets["geo_l1"], error.abs()[ROLES].mean())
    sum(losses.values()).backward()
    reached = {name.split(".")[0] for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert reached == {"spa3r"}


@torch.no_grad()
def test_the_published_names_lead_to_both_and_the_norm_follows_them() -> None:
    source = container(qk_norm="rmsnorm")
    names = source.reference_names()
    state = {str(names.get(name, name)): tensor for name, tensor in source.state_dict().items()}
    assert {"projection.weight", "aggregator.camera_token", "camera_head.token_norm.weight", "dino.conv.weight"} <= set(
        state
    )
    assert not any(name.startswith(("vggt.", "spa3r.")) for name in state)
    target = container()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1.0)
    assert models.load_reference(target, {f"model.{name}": tensor for name, tensor in state.items()}).complete
    torch.testing.assert_close(target.predict(images()), source.predict(images()))
    with pytest.raises(WeightsError, match=r"missing \(1\): query_embed.weight"):
        models.load_reference(target, {name: t for name, t in state.items() if name != "query_embed.weight"})


class Upstream(FrozenEncoder):
    """What the service has of VGGT's view sets."""

    input_kind = InputKind.VIEWS

    def __init__(self, digest: str = "a" * 64, channels: int = 32, axes: int = 5) -> None:
        super().__init__()
        self.digest, self.shape = digest, (None, 1, 2, 3, channels)[5 - axes :]

    def identity(self) -> dict[str, Any]:
        return {"kind": "views", "weights": self.digest}

    def outputs(self) -> dict[str, TensorSpec]:
        return {"tokens": TensorSpec(shape=self.shape, dtype="float32")}

    def prepare(self, value: Any, transform: Any) -> Any:
        raise AssertionError("nobody asks")

    def encode(self, inputs: Any) -> Any:
        raise AssertionError("nobody asks")


ARCH = {name: value for name, value in SETTINGS.items() if name != "channels"}


def record(views: int, seed: int = 0) -> dict[str, Tensor]:
    return {"tokens": torch.randn(views, 1, 2, 3, 32, generator=torch.Generator().manual_seed(seed))}


def latents(encoder: Spa3rLatents, *records: dict[str, Tensor]) -> Tensor:
    return encoder([encoder.prepare(one, {}) for one in records])["latents"]


def trained(folder: Path, **extra: Any) -> Spa3R:
    torch.manual_seed(3)
    module = models.build("spa3r-tiny", **SETTINGS)
    assert isinstance(module, Spa3R)
    save_pretrained(module, folder, "spa3r-tiny", {**spec("spa3r-tiny").defaults, **SETTINGS}, extra=extra)
    return module.eval()


def test_a_trained_part_gives_its_latents(tmp_path: Path) -> None:
    module = trained(tmp_path, **{READS: "a" * 64})
    assert family_class("spa3r") is Spa3rLatents
    assert input_kind("spa3r") is InputKind.RECORD
    encoder = Spa3rLatents(Upstream(), "none", weights=str(tmp_path), dtype="float32")
    with torch.no_grad():
        for views in (1, 3):
            expected = module.encode(record(views)["tokens"][None, :, 0].flatten(2, 3), (2, 3))
            torch.testing.assert_close(latents(encoder, record(views)), expected)
        pair = latents(encoder, record(2), record(2, seed=1))
        torch.testing.assert_close(pair[1:], latents(encoder, record(2, seed=1)), rtol=1e-4, atol=1e-5)
    (name, found), *rest = encoder.outputs().items()
    assert not rest
    assert (name, found.shape, found.dtype) == ("latents", (5, 32), "float32")
    kept = sum(parameter.numel() for parameter in encoder.parameters())
    assert encoder.parameter_count() == kept < sum(p.numel() for p in module.parameters())
    assert encoder.flops(4) > encoder.flops(2) > 0


def test_its_identity_follows_weights_upstream_and_codec(tmp_path: Path) -> None:
    trained(tmp_path)
    encoder = Spa3rLatents(Upstream(), "none", weights=str(tmp_path), dtype="float32")
    identity = encoder.identity()
    assert identity["weights"] == stored_digest(tmp_path)
    others = [
        Spa3rLatents(Upstream("b" * 64), "none", weights=str(tmp_path), dtype="float32"),
        Spa3rLatents(Upstream(), "fp8", weights=str(tmp_path), dtype="float32"),
        Spa3rLatents(Upstream(), "none", weights=str(tmp_path), dtype="bfloat16"),
        Spa3rLatents(Upstream(), "none", arch=ARCH, dtype="float32"),
        Spa3rLatents(Upstream(), "none", arch=ARCH, seed=1, dtype="float32"),
    ]
    identities = [str(identity), *(str(other.identity()) for other in others)]
    assert len(set(identities)) == len(identities)
    same = Spa3rLatents(Upstream(), "none", arch=ARCH, seed=1, dtype="float32")
    assert same.identity() == others[-1].identity()
    torch.testing.assert_close(latents(same, record(2)), latents(others[-1], record(2)))


def test_a_folder_in_the_published_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.spa3r import frozen

    module = container()
    names = module.reference_names()
    state = {f"model.{names.get(name, name)}": tensor.clone() for name, tensor in module.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        frozen.Spa3rPart, "describe", lambda *_: {"model": "spa3r-tiny", "settings": SETTINGS}
    )  # the published folder is of the paper's size
    encoder = Spa3rLatents(Upstream(), "none", weights=str(tmp_path), dtype="float32")
    with torch.no_grad():
        expected = module.spa3r.encode(record(2)["tokens"][None, :, 0].flatten(2, 3), (2, 3))
    torch.testing.assert_close(latents(encoder, record(2)), expected)


def test_a_published_folder_is_taken_for_the_paper_s_size(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    encoder = Spa3rLatents(Upstream(channels=2048), "none", weights=str(tmp_path))
    assert encoder.outputs()["latents"].shape == (256, 768)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    trained(tmp_path, **{READS: "a" * 64})
    with pytest.raises(WeightsError, match=r"trained behind an encoder with sha256 a{16}.*has b{16}"):
        Spa3rLatents(Upstream("b" * 64), "none", weights=str(tmp_path)).identity()
    with pytest.raises(WeightsError, match="reads features of 32 channels, the encoder before it gives 16"):
        Spa3rLatents(Upstream(channels=16), "none", weights=str(tmp_path))
    with pytest.raises(ModelError, match="`upstream` must name a vggt encoder"):
        Spa3rLatents(Upstream(axes=4), "none", arch=ARCH)
    encoder = Spa3rLatents(Upstream(), "none", weights=str(tmp_path))
    with pytest.raises(ModelError, match=r"takes tokens \(views, 1, 2, 3, 32\), got \(0, 1, 2, 3, 32\)"):
        encoder.prepare({"tokens": torch.empty(0, 1, 2, 3, 32)}, {})
    with pytest.raises(ModelError, match="has no transform"):
        encoder.prepare(record(2), {"flip": True})
    module = models.build("spa3r-tiny", **{**SETTINGS, "queries": 6})
    save_pretrained(module, tmp_path / "other", "spa3r-tiny", {**spec("spa3r-tiny").defaults, **SETTINGS})
    with pytest.raises(WeightsError, match=r"query_embed.weight: expected \(5, 32\), got \(6, 32\)"):
        latents(Spa3rLatents(Upstream(), "none", weights=str(tmp_path / "other")), record(2))
