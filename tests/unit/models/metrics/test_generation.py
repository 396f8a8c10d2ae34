"""Pictures judged together, and the networks behind FID and FD-DINOv2."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import WeightsError
from models.metrics.distances import FrechetDistance, KernelDistance
from models.metrics.generation import GenerationMetrics, Judges, load_judges, to_bytes
from models.metrics.images import psnr
from models.metrics.inception import FidInception, load_inception, resize_like_tensorflow1


def batch(count: int = 6, size: int = 32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    true = torch.rand(count, 3, size, size, generator=g)
    return (true + 0.1 * torch.randn(true.shape, generator=g)).clamp(0, 1), true


class Mean(torch.nn.Module):
    """Stands in for Inception: mean and spread of each channel."""

    def forward(self, pictures: Tensor) -> Tensor:
        assert pictures.dtype == torch.uint8
        flat = pictures.float().flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], 1)


def test_scores_of_several_pictures_and_groups_add_up() -> None:
    predicted, true = batch()
    judges = Judges(inception=Mean())  # type: ignore[arg-type]
    groups = [["angle<=15"]] * 2 + [["angle>15"]] * 4
    whole, a, b = (GenerationMetrics(kid_subsets=3, kid_subset_size=4) for _ in range(3))
    for metrics, rows in ((whole, slice(0, 6)), (a, slice(0, 4)), (b, slice(4, 6))):
        pictures = {"projected": predicted[rows], "rgb": true[rows].flip(0)}
        coverage = {"projected": torch.full((len(true[rows]),), 0.5)}
        scores = metrics.update(judges, pictures, true[rows], coverage=coverage, groups=groups[rows])
        torch.testing.assert_close(scores["projected/psnr"], psnr(predicted[rows], true[rows]))
    a = pickle.loads(pickle.dumps(a))  # what ranks exchange
    a.merge(b)
    numbers = a.compute()
    same = {k: v for k, v in whole.compute().items() if k.startswith("projected")}
    assert {k: v for k, v in numbers.items() if k.startswith("projected")} == pytest.approx(same, rel=1e-6)
    assert numbers["projected/coverage"] == 0.5
    assert numbers["projected/psnr@angle<=15"] == pytest.approx(float(psnr(predicted, true)[:2].mean()))
    fid, kid = FrechetDistance(), KernelDistance(subsets=3, subset_size=4)
    features = Mean()(to_bytes(predicted)), Mean()(to_bytes(true))
    fid.update(*features)
    kid.update(*features)
    assert numbers["projected/fid"] == pytest.approx(fid.compute(), rel=1e-6)
    assert numbers["projected/kid"] == pytest.approx(kid.compute()["mean"])
    assert numbers["projected/kid_subset_size"] == 4
    assert not {name for name in numbers if "lpips" in name or "dinov2" in name}


def test_without_weights_a_score_is_not_reported(tmp_path: Path) -> None:
    predicted, true = batch()
    judges = load_judges()
    assert judges.reported == ()
    metrics = GenerationMetrics()
    metrics.update(judges, {"rgb": predicted}, true)
    assert set(metrics.compute()) == {"rgb/psnr", "rgb/ssim"}
    for setting in ("lpips_weights", "inception_weights", "dinov2_weights"):
        with pytest.raises(WeightsError, match="nothing"):
            load_judges(**{setting: str(tmp_path / "nothing")})


def test_real_networks_by_path(weights_dir: Path) -> None:
    judges = load_judges(lpips_weights=str(weights_dir / "alexnet"), dinov2_weights=str(weights_dir / "dinov2-small"))
    assert judges.reported == ("lpips", "fd_dinov2")
    predicted, true = batch(4, 64)
    metrics = GenerationMetrics()
    metrics.update(judges, {"noisy": predicted, "same": true}, true)
    numbers = metrics.compute()
    assert numbers["same/lpips"] == 0
    assert numbers["noisy/lpips"] > 0.001
    assert numbers["same/fd_dinov2"] == pytest.approx(0, abs=1e-3)
    assert numbers["noisy/fd_dinov2"] > 0.1
    assert metrics.fd_dinov2["noisy"].real.mean().shape == (384,)
    assert not any(name.endswith(("/fid", "/kid")) for name in numbers)


def test_resize_follows_the_rule_of_tensorflow_1() -> None:
    ramp = torch.arange(4.0).view(1, 1, 1, 4)
    # Output i reads the source at i * 4 / 6; beyond the last pixel it stays there.
    assert resize_like_tensorflow1(ramp, 1, 6).flatten().tolist() == pytest.approx([0, 2 / 3, 4 / 3, 2, 8 / 3, 3])
    picture = torch.rand(1, 3, 10, 14)
    corners = F.interpolate(picture, (10, 14), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_like_tensorflow1(picture, 10, 14), corners)


def test_inception_is_whole_and_takes_bytes() -> None:
    with torch.device("meta"):
        model = FidInception()
    # 94 convolutions with four tensors of batch norm each (and a counter), and the classifier of 1008 classes.
    assert len(model.state_dict()) == 94 * 6 + 2
    assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith("fc.")) == 21_785_568
    features = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device="meta"))
    assert features.shape == (1, 2048)
    with pytest.raises(ValueError, match="FID takes uint8"):
        model(torch.zeros(1, 3, 64, 64, device="meta"))


def test_other_weights_are_no_fid(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "imagenet.pth")
    with pytest.raises(WeightsError, match=r"does not hold the Inception weights of FID(.|\n)*missing \("):
        load_inception(tmp_path / "imagenet.pth")
    with pytest.raises(WeightsError, match="no path is given for the Inception weights"):
        load_inception("")
